"""docs/coming_from_trl.md against TRL's configs and ours: no option is left out of the page, none on it exists here."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import trl

from align.config.arguments import instead_of
from align.config.options import options_of
from align.config.other_names import REMOVED
from align.trainers.dpo import DPOConfig
from align.trainers.reward import RewardConfig
from align.trainers.sft import OWNED, UNUSED, SFTConfig

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from_trl.md").read_text(encoding="utf-8")
CONFIGS = ((DPOConfig, trl.DPOConfig), (SFTConfig, trl.SFTConfig), (RewardConfig, trl.RewardConfig))


def named(section: str) -> set[str]:
    """Options in the first column of a section's table."""
    rows = [row for row in section.splitlines() if row.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def test_the_page_lists_what_differs():
    _, defaults, refused, *_ = PAGE.split("\n## ")
    ours = [{f.name: f for f in fields(config)} for config, _ in CONFIGS]
    theirs = [{f.name: f for f in fields(config)} for _, config in CONFIGS]
    gone = {name for a, b in zip(ours, theirs, strict=True) for name in b.keys() - a.keys()}
    assert not gone
    of_pairs = {f.name for config in (DPOConfig, RewardConfig) for f in fields(config) if instead_of(f)}
    assert named(refused) == of_pairs | UNUSED.keys() | OWNED.keys()
    differ = {
        name
        for a, b in zip(ours, theirs, strict=True)
        for name in a.keys() & b.keys()
        if MISSING not in (a[name].default, b[name].default) and a[name].default != b[name].default
    }
    of_losses = {"f_alpha_divergence_coef"}  # an option of one f_divergence_type
    assert differ - of_losses <= named(defaults)
    assert named(defaults) - {"DPOConfig", "RewardConfig"} <= differ | {"beta"}


def test_the_page_lists_what_is_gone():
    _, _, _, gone, *_ = PAGE.split("\n## ")
    elsewhere = {"truncation_mode", "dataset_kwargs"}  # options of some methods, in the table before
    assert REMOVED.keys() - elsewhere <= named(gone)


@pytest.mark.parametrize(
    ("trainer", "option", "theirs", "method", "ours"),
    [
        ("cpo", "cpo_alpha", "1.0", "dpo", None),
        ("cpo", "simpo_gamma", "0.5", "dpo", None),
        ("online_dpo", "temperature", "0.9", "online_dpo", 1.0),
        ("online_dpo", "max_new_tokens", "64", "online_dpo", None),
        ("online_dpo", "learning_rate", "5e-7", "online_dpo", 1e-6),
        ("kto", "train_sampling_strategy", '"sequential"', "kto", "random"),
    ],
)
def test_defaults_of_further_trainers(trainer, option, theirs, method, ours):
    """Their source is read: to import one of them imports its trainer, and vLLM."""
    place = "trainer" if trainer == "kto" else f"experimental/{trainer}"
    file = Path(trl.__file__).parent / place / f"{trainer}_config.py"
    found = re.search(rf"^    {option}: .*\n? *default=(.*?),$", file.read_text(), flags=re.MULTILINE)
    assert found and found[1] == theirs
    assert options_of(method).get(option, {}).get("default") == ours
