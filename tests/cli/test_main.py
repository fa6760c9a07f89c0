"""The `align` command itself: help, exit statuses, errors."""

import argparse
import subprocess
import sys

import pytest

from align.cli import main as command
from align.cli.main import main
from align.errors import AlignError
from align.methods import METHODS


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in [*METHODS, *command.TOOLS, "launch"]:
        assert f"\n    {name}" in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


def every_parser(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from every_parser(sub)


def test_no_argument_takes_a_name_that_the_command_needs():
    """An argument with the dest `run` would replace the function that the command calls."""
    found = list(every_parser(command.build_parser()))
    assert len(found) > len(METHODS) + len(command.TOOLS)
    for sub in found[1:]:
        assert not {"run", "parser", "version"} & {action.dest for action in sub._actions}, sub.prog


def test_unknown_commands_and_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["stf"])
    assert stop.value.code == 2 and "invalid choice: 'stf' (choose from 'sft', " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["overoptimization", "run", "--no_such_option", "1"])
    assert stop.value.code == 2 and "unrecognized arguments: --no_such_option 1\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bon", "scores.csv", "--proxy", "rm0", "rm1", "--ensemble", "wco"])
    error = capsys.readouterr().err
    assert "unrecognized arguments: rm1 (--proxy and --ensemble take one value each time: --proxy A --proxy B)" in error


def failing(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_mistakes_are_one_line_and_a_traceback_on_request(capsys, monkeypatch):
    monkeypatch.delenv("ALIGN_DEBUG", raising=False)
    monkeypatch.setattr("align.cli.overoptimization.run", failing(AlignError("what, where, remedy")))
    assert main(["overoptimization", "run"]) == 2
    assert capsys.readouterr().err == "align: error: what, where, remedy\n"
    assert main(["overoptimization", "run", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ALIGN_DEBUG", "1")
    assert main(["overoptimization", "run"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_a_bug_is_not_hidden(capsys, monkeypatch):
    monkeypatch.setattr("align.cli.overoptimization.run", failing(KeyboardInterrupt()))
    assert main(["overoptimization", "run"]) == 130
    monkeypatch.setattr("align.cli.overoptimization.run", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["overoptimization", "run"])


def test_output_that_is_read_no_more():
    """As in `align configs show sft | head -1`, where `head` has ended before the command writes."""
    program = [sys.executable, "-m", "align", "configs", "show", "sft"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read().strip() == "align: stopped, because its output is read no more"
    assert process.returncode == 141


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_help_of_a_method_has_its_own_options_first(method, capsys):
    assert main([method.name, "--help", "all"]) == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(title)
        for title in (
            "--dry-run",
            f"\nmethod ({method.config.partition(':')[2]}):",
            "\ndata:",
            "\nmodel (trl.ModelConfig):",
            "\ntraining (transformers.TrainingArguments):",
        )
    ]
    assert places == sorted(places)
    own = {
        "sft": "max_length",
        "reward": "center_rewards_coefficient",
        "dpo": "loss_type",
        "kto": "desirable_weight",
        "listwise_dpo": "precompute_ref_log_probs",
        "srpo": "improver_weight",
        "modpo": "objective",
        "sparsepo": "mask_layers",
        "remax": "kl_mode",
        "ppo": "critic_learning_rate",
        "rloo": "num_generations",
        "grpo": "scale_rewards",
        "reinforce_pp": "group_baseline",
        "online_dpo": "num_generations",
        "d2po": "gold_labels",
        "metaapo": "meta_every",
    }[method.name]
    assert places[1] < shown.index(f"--{own} ") < places[2]
    assert shown.index("--weight_decay ") > places[4]
    assert ("--gold_reward " in shown) is (method.rewards and method.gold)
