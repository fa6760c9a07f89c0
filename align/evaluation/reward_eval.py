"""Evaluation of reward models: accuracy, calibration, length bias, robustness to rewrites, agreement, best-of-n."""

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.bad_rows import BadRows
from align.data.rows import load_rows
from align.errors import ConfigError
from align.evaluation import rewardbench
from align.evaluation.best_of_n import bon_curve
from align.evaluation.pair_report import (
    accuracy_entry,
    agreement_entry,
    calibration_entry,
    comparisons,
    rank_correlation,
    score_entry,
)
from align.evaluation.pair_scores import PairScores, score_pairs
from align.evaluation.pairs import Pairs, prompt_keys, read_pairs, sample_places, text_length
from align.evaluation.preference_metrics import length_bias
from align.evaluation.rewrite_eval import evaluate_rewrites
from align.evaluation.rewrites import choose_rewrites
from align.evaluation.score_table import read_score_table
from align.evaluation.scoring import named_rewards, score_table
from align.evaluation.strict_json import plain, refuse_non_finite
from align.evaluation.summary import build_summary, package_versions
from align.lazy import load

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FORMAT = "align.reward_eval/1"
LONGER = "the longer answer"
REWRITE_PAIRS = 500
SHOWN = 3  # subsets named in a note


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
        chat: make plain texts into a user's and an assistant's message; default: for RewardBench's subsets only.
        max_pairs: evaluate a random sample of so many pairs, the same for every reward.
        max_bad_share: share of the rows that may be left out, because they are no pairs or a reward refuses them.
        rewrites: names in `align.evaluation.rewrites.REWRITES`, or "all" or "none"; rewrite_pairs: on a random sample
            of so many pairs.
        completions: a table with completions of several answers per prompt and the column `gold`, for best-of-n.
        output_dir: write reward_eval.json, reward_eval.html and figures there. seed: of samples, rewrites, bootstrap.

    Returns what reward_eval.json holds (docs/reward_evaluation.md). Raises ConfigError, DataError or RewardError.
    """
    if data is None and completions is None:
        raise ConfigError(
            "give preference pairs (data), a table of completions with a gold score (completions), or both"
        )
    if data is None:
        of_pairs = {"chat": (chat, None), "max_pairs": (max_pairs, None), "config": (config, None)}
        _refuse_ignored("data", {**of_pairs, "split": (split, "train"), "rewrites": (list(rewrites), ["all"])})
    if completions is None:
        of_table = {"prompt_column": (prompt_column, None), "min_answers": (min_answers, None), "gold": (gold, "gold")}
        _refuse_ignored("completions", {**of_table, "completion_column": (completion_column, "completion")})
    if not 0 <= max_bad_share < 1:
        raise ConfigError(f"max_bad_share must be at least 0 and less than 1, got {max_bad_share}")
    wanted = choose_rewrites([rewrites] if isinstance(rewrites, str) else list(rewrites))
    started = time.perf_counter()
    given = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    built = named_rewards(given, reserved=gold if completions is not None else None)
    if not built:
        raise ConfigError("there is no reward to evaluate")
    result: dict = {
        "format": FORMAT,
        "title": title,
        "setup": {"rewards": list(built), "seed": seed},
        "rewards": {name: {} for name in built},
        "baselines": {},
        "comparisons": {},
        "rewrites": {},
        "agreement": {},
        "best_of_n": {},
        "notes": [],
        "versions": package_versions(),
        "phases": {"load": time.perf_counter() - started},
    }
    if data is not None:
        dataset = load_rows(data, split, config) if isinstance(data, str | Path) else data
        pairs, report = read_pairs(dataset, rows=sample_places(len(dataset), max_pairs, seed), chat=chat)
        result["setup"].update(data=pairs.source, split=split, rows=report.total)
        pairs, scores = _score_all(result, built, pairs, report, max_bad_share)
        _describe_pairs(result, built, pairs, scores, seed)
        limits = {"pairs": rewrite_pairs, "max_bad_share": max_bad_share}
        evaluate_rewrites(result, built, pairs, scores, wanted, limits, seed)
    if completions is not None:
        started = time.perf_counter()
        columns = {"gold": gold, "prompt": prompt_column, "completion": completion_column, "min_answers": min_answers}
        _evaluate_best_of_n(result, built, Path(completions), output_dir, columns, seed)
        result["phases"]["best-of-n"] = time.perf_counter() - started
    for note in result["notes"]:
        logger.warning("%s", note)
    result = plain(result, "reward_eval")
    refuse_non_finite(result, "reward_eval")
    if output_dir is not None:
        load("align.evaluation.reward_page:write_reward_eval")(output_dir, result)
    return result


def _refuse_ignored(needed: str, options: dict[str, tuple]) -> None:
    for name, (value, default) in options.items():
        if value != default:
            raise ConfigError(f"{name} has no meaning without {needed}")


# ---- preference pairs -----------------------------------------------------------------------------------------------


def _score_all(
    result: dict, rewards: dict, pairs: Pairs, report: BadRows, max_bad_share: float
) -> tuple[Pairs, dict[str, PairScores]]:
    """The pairs that every reward can score, and their scores; the others are bad rows."""
    from tqdm import tqdm

    if report.bad == report.total:
        report.check(max_bad_share)
    scores = {}
    with tqdm(total=2 * len(pairs) * len(rewards), unit="answer", desc="scoring") as progress:
        for name, reward in rewards.items():
            started = time.perf_counter()
            scores[name] = score_pairs(reward, pairs, progress)
            seconds = time.perf_counter() - started
            result["rewards"][name]["answers_per_second"] = 2 * len(pairs) / seconds
            result["phases"][f"score with {name}"] = seconds
    refused = {place: name for name in reversed(rewards) for place in scores[name].failed}
    for place in sorted(refused):
        name = refused[place]
        report.add(pairs.rows[place], f"reward {name!r} refuses it (first: {scores[name].reason})")
    report.check(max_bad_share)
    kept = [place for place in range(len(pairs)) if place not in refused]
    result["setup"].update(dropped=report.counts, pairs=len(kept))
    return pairs.select(kept), {name: found.select(kept) for name, found in scores.items()}


def _describe_pairs(result: dict, rewards: dict, pairs: Pairs, scores: dict[str, PairScores], seed: int) -> None:
    started = time.perf_counter()
    groups = prompt_keys(pairs)
    lengths = [np.array([text_length(text) for text in texts], float) for texts in (pairs.chosen, pairs.rejected)]
    for name, found in scores.items():
        margins = found.margins
        unit, meaning = _unit(rewards[name])
        result["rewards"][name].update(
            **accuracy_entry(margins, pairs, groups, lengths, seed),
            scores=score_entry(found),
            length=length_bias(found.chosen, found.rejected, *lengths, pairs.labels),
            calibration=calibration_entry(margins * unit, meaning, pairs.labels),
        )
        if not margins.any():
            result["notes"].append(f"{name} gives both answers of every pair the same score: it tells nothing apart")
        if found.members:
            names = [key.replace("/", " ") for key in found.members]
            stacked = np.stack(list(found.members.values()))
            result["agreement"][f"members of {name}"] = agreement_entry(names, stacked, pairs, margins)
    if len(scores) > 1:
        stacked = np.stack([[found.chosen, found.rejected] for found in scores.values()])
        result["agreement"]["rewards"] = agreement_entry(list(scores), stacked, pairs)
    longer = PairScores(*lengths)
    result["baselines"][LONGER] = accuracy_entry(longer.margins, pairs, groups, lengths, seed)
    result["comparisons"] = comparisons({n: s.margins for n, s in {**scores, LONGER: longer}.items()}, pairs, seed)
    result["setup"] |= {
        "prompts": len(set(groups)),
        "texts as messages": pairs.chat,
        "soft labels": pairs.labels is not None,
        "rewardbench": pairs.rewardbench,
    }
    if pairs.rewardbench:
        counts = {name: pairs.subsets.count(name) for name in set(pairs.subsets)}
        lacking = rewardbench.incomplete(counts)
        if lacking:
            more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
            result["notes"].append(f"not RewardBench as published: {', '.join(lacking[:SHOWN])}{more}")
    result["phases"]["numbers"] = time.perf_counter() - started


def _unit(reward: Any) -> tuple[float, str]:
    """What a margin is multiplied by so that sigmoid(margin) is the probability that the model was trained for."""
    normalizer = reward.normalizer if isinstance(reward, load("reward_models.classifier:ClassifierReward")) else None
    if normalizer is None:
        return 1.0, "the score"
    return normalizer.std, f"the score before normalisation (times {normalizer.std:.4g})"


# ---- best-of-n ------------------------------------------------------------------------------------------------------


def _evaluate_best_of_n(
    result: dict, rewards: dict, table: Path, output_dir: str | Path | None, columns: dict, seed: int
) -> None:
    """Score the completions of a table, and what best-of-n by each reward gains in gold."""
    prompt, gold_name = columns["prompt"], columns["gold"]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(output_dir or temporary) / "scores.parquet"
        score_table(table, rewards, path, prompt=prompt or "prompt", completion=columns["completion"])
        scored = read_score_table(
            path, proxies=list(rewards), gold=gold_name, prompt=prompt, completion=columns["completion"]
        )
    gold = scored.by_prompt(gold_name)
    curves = {
        name: bon_curve(
            scored.by_prompt(name), gold, min_answers=columns["min_answers"], name=name, gold_name=gold_name
        )
        for name in rewards
    }
    result["best_of_n"] = build_summary(best_of_n=curves, seed=seed)["best_of_n"]
    for name in rewards:
        result["best_of_n"][name]["rank_correlation"] = rank_correlation(scored.by_prompt(name), gold, seed)
    result["notes"] += list(dict.fromkeys(f"{table}: {note}" for curve in curves.values() for note in curve.notes))
    result["setup"].update({"completions": str(table), "prompts of completions": len(scored.rows), "gold": gold_name})
