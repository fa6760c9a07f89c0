"""docs/on_policy.md: its commands resolve, its programs run, its table names the metrics that there are."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from align.config import configs_dir
from align.config.resolve import resolve
from align.rollout.types import SamplingParams
from align.trainers.on_policy.estimators import ESTIMATORS
from tests.trainers.tiny_runs import (
    assert_same,
    logged,
    on_policy,
    parameters,
    prompts,
    wanted_words,
    what_programs_name,
)

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "on_policy.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.strip().splitlines()]
SHARED = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def metrics(text: str) -> set[str]:
    return set(re.findall(r"`([\w/<>]+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_resolve(command):
    align, method, *tokens = shlex.split(command)
    tokens.remove("--dry-run")
    file = tokens[tokens.index("--config") + 1]
    run = resolve(method, str(configs_dir() / Path(file).name), [t for t in tokens if t not in ("--config", file)])
    assert align == "align" and run.training.output_dir == f"runs/{method}"


def test_programs_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what_programs_name(tokenizer)
    first, second = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    first = first.replace("max_steps=3", "max_steps=3, report_to='none', max_completion_length=8, use_cpu=True")
    variables = {}
    exec(compile(first, "docs/on_policy.md", "exec"), variables)
    assert variables["trainer"].state.global_step == 3
    exec(compile(second, "docs/on_policy.md", "exec"), variables)
    try:
        assert variables["args"].estimator == "pass_at_k"
        Path("my_estimator.py").write_text(second.replace('@register_estimator("pass_at_k")\n', ""))
        for name in ("pass_at_k", "my_estimator.py:PassAtK"):
            trainer_class, args = on_policy("rloo", tmp_path / "own", num_generations=3, estimator=name)
            trainer = trainer_class("my_policy", wanted_words, args, prompts(16))
            trainer.train()
            assert type(trainer.estimator).__name__ == "PassAtK" and len(logged(trainer, "loss")) == 2
    finally:
        ESTIMATORS.pop("pass_at_k")


def test_the_tables_have_every_metric(policy, tmp_path):
    named = set()
    for method in ("ppo", "grpo"):
        cut = {"truncated": "mask", "overlong_buffer": 2}
        trainer_class, args = on_policy(method, tmp_path, num_mini_batches=2, kl_target=1.0, max_steps=4, **cut)
        trainer = trainer_class(policy, wanted_words, args, prompts(16))
        trainer.train()
        named |= {key for entry in trainer.state.log_history for key in entry}
    ours = {key for key in named if not key.startswith(("train_", "time/"))} - {"epoch", "step", "total_flos"}
    ours = {re.sub("^rewards/.*", "rewards/<name>", re.sub("/task", "/<stream>", key)) for key in ours}
    ours.discard("learning_rate")
    table = metrics(DOCS.split("## Further metrics")[1])
    assert table <= {key.replace("task_", "<stream>_") for key in ours}
    assert {key.replace("task_", "<stream>_") for key in ours} <= table | metrics(SHARED)


def test_a_last_step_of_fewer_prompts_and_a_critic_that_warms_up_for_the_whole_run(policy, tmp_path, caplog):
    """What the page says of prompts that do not fill a rollout, and of `critic_warmup_steps`."""
    drawn = []

    def reward(completions, **columns):
        drawn.append(len(completions))
        return wanted_words(completions)

    options = {"max_steps": -1, "num_train_epochs": 1, "num_iterations": 1, "critic_warmup_steps": 2}
    trainer_class, args = on_policy("ppo", tmp_path, **options)
    trainer = trainer_class(policy, reward, args, prompts(10))
    before = parameters(trainer.model)
    trainer.train()
    assert drawn == [8, 2] and trainer.state.global_step == 2
    assert_same(before, parameters(trainer.model))
    assert "critic_warmup_steps is 2 and the run has 2 steps" in caplog.text


def test_the_loss_of_an_evaluation_has_the_beta_of_the_start(policy, tmp_path):
    """docs/training.md: evaluations of a run with `kl_target` compare."""
    options = {"kl_target": 0.01, "kl_gain": 4.0, "beta": 0.5, "eval_strategy": "steps", "eval_steps": 2}
    trainer_class, args = on_policy("rloo", tmp_path, **options)
    trainer = trainer_class(policy, wanted_words, args, prompts(16), prompts(4, 1))
    trainer.train()
    assert trainer.kl.value != 0.5 and "with `kl_target` by the `beta` that it began with" in SHARED
    kl, proxy, loss = (logged(trainer, f"eval_{name}")[-1] for name in ("kl", "proxy", "loss"))
    assert kl != 0 and loss == pytest.approx(0.5 * kl - proxy)


def test_the_pages_name_what_is_refused_and_what_changes_log_probs():
    """Of `check_ahead` and `make_episodes`; and every field of a request that moves its log-probs."""
    ahead = DOCS.split("## Rollouts ahead")[1].split("## Partial rollouts")[0]
    assert "Environments, tools, `dynamic_sampling_rounds` and `threshold_search` are refused" in ahead
    rollouts = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8").split("## Log-probs")[1].split("##")[0]
    changing = {f.name for f in fields(SamplingParams)} - {"max_tokens", "n", "seed", "stop_token_ids"}
    assert {name for name in changing - {"temperature"} if f"`{name}`" not in rollouts} == set()
