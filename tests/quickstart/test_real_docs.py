"""docs/real_model.md: its commands exist, and its sizes are those of the settings."""

import re
import shlex
from pathlib import Path

from align.cli.main import build_parser
from align.quickstart.real.model import INSTALL
from align.quickstart.real.settings import REAL

PAGE = (Path(__file__).parents[2] / "docs" / "real_model.md").read_text()


def test_the_commands_have_these_options():
    """What they do is run in small by tests/quickstart/test_real.py."""
    lines = [line for block in re.findall(r"^```text\n(.*?)^```", PAGE, re.S | re.M) for line in block.splitlines()]
    assert INSTALL in lines
    commands = [line for line in lines if line.startswith("align ")]
    assert len(commands) == 2
    for command in commands:
        args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
        assert extra == [] and args.real and args.pairs == "pairs.parquet"
    assert (args.model, args.gold) == ("my-chat-model", "judge.py:score")


def test_the_sizes_are_those_of_the_settings():
    members, held_out = REAL.members * REAL.pairs_per_member, REAL.held_out
    for text in (
        f"prompts of at most {REAL.max_pair_prompt} tokens, answers of at most {REAL.max_answer_length}",
        f"the lowest {REAL.gold_layers} layers of the chat model",
        f"{REAL.gold_pairs} pairs, once",
        f"the lowest {REAL.layers} layers each",
        f"{REAL.pairs_per_member} pairs of its own each, twice",
        f"{REAL.steps} steps of {REAL.prompts_per_step} prompts, up to {REAL.max_completion_length} tokens",
        f"{REAL.bon_prompts} prompts x {REAL.bon_n} answers",
        f"{REAL.gold_pairs + members + held_out} pairs with different prompts are needed, {held_out} of them held out; "
        f"with `--gold` {members + held_out}",
        f"the same {REAL.eval_prompts} of the",
    ):
        assert text in PAGE, text
    assert (REAL.gold_epochs, REAL.reward_epochs, REAL.members) == (1, 2, 3)
    assert REAL.gold_pairs == 4 * REAL.pairs_per_member
