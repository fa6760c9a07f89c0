"""Evaluation of reward models: accuracy, calibration, length bias, robustness to rewrites, agreement, best-of-n."""

import gc
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.data.rows import load_rows
from align.errors import ConfigError
from align.evaluation.bon_table import BonTable
from align.evaluation.pair_report import LONGER, describe_pairs
from align.evaluation.pair_sample import PairSample
from align.evaluation.pairs import read_pairs, sample_places
from align.evaluation.rewrite_sample import rewrite_sample
from align.evaluation.rewrites import choose_rewrites
from align.evaluation.strict_json import plain, refuse_non_finite
from align.evaluation.summary import package_versions
from align.reward_models.base import Reward
from align.reward_models.build import build_reward
from align.reward_models.specs import parse_rewards

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FORMAT = "align.reward_eval/1"
REWRITE_PAIRS = 500
DEFAULTS = {  # those that are not None, of the options that need data, rewrites or completions
    "split": "train",
    "rewrites": ["all"],
    "rewrite_pairs": REWRITE_PAIRS,
    "gold": "gold",
    "completion_column": "completion",
}


def evaluate_reward(
    rewards: Any,
    data: "str | Path | Dataset | None" = None,
    *,
    split: str = "train",
    config: str | None = None,
    chat: bool | None = None,
    max_pairs: int | None = None,
    max_bad_share: float = 0.0,
    rewrites: Sequence[str] = ("all",),
    rewrite_pairs: int = REWRITE_PAIRS,
    completions: str | Path | None = None,
    gold: str = "gold",
    prompt_column: str | None = None,
    completion_column: str = "completion",
    min_answers: int | None = None,
    output_dir: str | Path | None = None,
    title: str = "Evaluation of reward models",
    seed: int = 0,
) -> dict:
    """Evaluate rewards on preference pairs, on a table of completions with a gold score, or both.

    Args:
        rewards: a reward, a spec (`build_reward`), a function, or a list of these.
        data: preference pairs: a file, folder or hub name (`load_rows`, with `split` and `config`), or a Dataset.
        chat: make plain texts into a user's and an assistant's message, of completions too; default: for RewardBench's
            subsets only.
        max_pairs: evaluate a random sample of so many pairs (rows of RewardBench 2), the same for every reward.
        max_bad_share: share of the rows that may be left out, because they are no pairs or a reward refuses them.
        rewrites: names in `align.evaluation.rewrites.REWRITES`, or "all" or "none"; rewrite_pairs: on a random sample
            of so many pairs.
        completions: a table with completions of several answers per prompt and the column `gold`, for best-of-n.
        output_dir: write reward_eval.json, reward_eval.html and figures there. seed: of samples, rewrites, bootstrap.

    Returns what reward_eval.json holds (docs/reward_evaluation.md). Raises ConfigError, DataError or RewardError.
    """
    names = [rewrites] if isinstance(rewrites, str) else list(rewrites)
    of_pairs = {"max_pairs": max_pairs, "config": config, "split": split, "rewrites": names}
    of_table = {"gold": gold, "prompt_column": prompt_column, "min_answers": min_answers}
    _check_options(data, completions, of_pairs, {**of_table, "completion_column": completion_column}, rewrite_pairs)
    if not 0 <= max_bad_share < 1:
        raise ConfigError(f"max_bad_share must be at least 0 and less than 1, got {max_bad_share}")
    wanted = choose_rewrites(names)
    specs = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    taken = [LONGER] if completions is None else [LONGER, gold]
    check_specs(specs, taken)
    result = _empty_result(title, seed)
    sample = table = None
    if data is not None:
        dataset = load_rows(data, split, config) if isinstance(data, str | Path) else data
        pairs, report = read_pairs(dataset, rows=sample_places(len(dataset), max_pairs, seed), chat=chat)
        sample = PairSample(pairs, report, max_bad_share, rewrite_sample(wanted, pairs, rewrite_pairs, seed))
        result["setup"].update(data=pairs.source, split=split, rows=report.total)
    with tempfile.TemporaryDirectory() as temporary:
        if completions is not None:
            path = Path(output_dir or temporary) / "scores.parquet"
            table = BonTable(Path(completions), path, gold, prompt_column, completion_column, min_answers, bool(chat))
        _score_and_describe(result, loaded_one_by_one(specs, taken), sample, table, seed)
    return _finished(result, output_dir)


def _check_options(data, completions, of_pairs: dict, of_table: dict, rewrite_pairs: int) -> None:
    """Raise ConfigError for nothing to evaluate, and for options of what is not evaluated."""
    if data is None and completions is None:
        raise ConfigError(
            "give preference pairs (data), a table of completions with a gold score (completions), or both"
        )
    if data is None:
        _refuse_ignored("data", of_pairs)
    if data is None or of_pairs["rewrites"] == ["none"]:
        _refuse_ignored("rewrites", {"rewrite_pairs": rewrite_pairs})
    if completions is None:
        _refuse_ignored("completions", of_table)


def _refuse_ignored(needed: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value != DEFAULTS.get(name):
            raise ConfigError(f"{name} has no meaning without {needed}")


def _empty_result(title: str, seed: int) -> dict[str, Any]:
    sections = ("rewards", "baselines", "comparisons", "rewrites", "agreement", "best_of_n")
    return {
        "format": FORMAT,
        "title": title,
        "setup": {"seed": seed},
        **{name: {} for name in sections},
        "notes": [],
        "versions": package_versions(),
        "phases": {},
    }


def _score_and_describe(
    result: dict, rewards: Iterator[Reward], sample: PairSample | None, table: BonTable | None, seed: int
) -> None:
    for reward in rewards:
        started = time.perf_counter()
        result["rewards"][reward.name] = {}
        if sample is not None:
            sample.score(reward)
        if table is not None:
            table.score(reward)
        result["phases"][f"score with {reward.name}"] = time.perf_counter() - started
        del reward  # or it would stay while the next one is loaded
    started = time.perf_counter()
    if sample is not None:
        describe_pairs(result, sample, seed)
    if table is not None:
        table.describe(result, seed)
    result["phases"]["numbers"] = time.perf_counter() - started


def _finished(result: dict, output_dir: str | Path | None) -> dict:
    for note in result["notes"]:
        logger.warning("%s", note)
    result = plain(result, "reward_eval")
    refuse_non_finite(result, "reward_eval")
    if output_dir is not None:
        from align.evaluation.reward_page import write_reward_eval  # matplotlib and jinja2

        write_reward_eval(output_dir, result)
    return result


def check_specs(specs: list, taken: list[str]) -> None:
    """Raise ConfigError for what is wrong with the specs, before the first model is loaded."""
    if not specs:
        raise ConfigError("there is no reward to evaluate")
    names: list[str] = []
    for parsed in parse_rewards(specs):
        name = parsed.name if isinstance(parsed, Reward) else parsed.stated_name
        if not isinstance(parsed, Reward):
            parsed.check()
        _refuse_taken(name, [*taken, *names])
        names += [name] if name else []


def _refuse_taken(name: str | None, taken: list[str]) -> None:
    if name in taken:
        raise ConfigError(f"two scores are named {name!r}: name one of them, {{type: ..., name: other}}")


def loaded_one_by_one(specs: list, taken: list[str]) -> Iterator[Reward]:
    """Each reward in turn, so that several large models need the memory of one. taken: names that none
    may have."""
    for spec in specs:
        reward = build_reward(spec)
        _refuse_taken(reward.name, taken)
        taken = [*taken, reward.name]
        yield reward
        del reward
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
