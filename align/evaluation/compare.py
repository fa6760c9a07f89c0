"""Two sets of answers to the same prompts: who wins, by rewards and by judges, at any length and at equal length."""

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from align.config.sections import parse
from align.config.source import parse_value
from align.errors import ConfigError, DataError
from align.evaluation.bootstrap import all_alike, percentile_interval, weight_tiles
from align.evaluation.report import render_page
from align.evaluation.strict_json import write_json
from align.reward_models.judge_specs import JudgeSpec, judge_function
from align.reward_models.judges import Judge, ask

logger = logging.getLogger(__name__)

JSON_NAME, PAGE_NAME, TEMPLATE = "compare.json", "compare.html", "compare.html.j2"
RIDGE, STEPS, SHOWN = 1e-3, 30, 40
EXACT = 1e-9  # a step of Newton's method after which the next would be rounding
WIDTH = 4  # numbers held for a pair in a resample


def paired(a: list[dict], b: list[dict]) -> list[tuple[dict, dict]]:
    """The answers of both with the same row and sample. DataError where the prompts differ, an answer has no partner,
    or it is not known which is whose."""
    for side, answers in (("A", a), ("B", b)):
        if any(row.get("row") is None or row.get("sample") is None for row in answers):
            raise DataError(f"answers of {side} lack row or sample, the numbers by which answers are paired")
        if len({(row["row"], row["sample"]) for row in answers}) < len(answers):
            raise DataError(f"two answers of {side} have the same row and sample")
    others = {(row["row"], row["sample"]): row for row in b}
    if {(row["row"], row["sample"]) for row in a} != others.keys():
        raise DataError(
            f"the two have answers to other rows: {len(a)} and {len(b)} answers, not all of the same prompts"
        )
    pairs = [(row, others[row["row"], row["sample"]]) for row in a]
    for one, other in pairs:
        if one["prompt"] != other["prompt"]:
            raise DataError(f"row {one['row']} has another prompt in the two files")
    return pairs


def by_scores(pairs: list[tuple[dict, dict]], a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """1 where A's score is higher, 0 where B's is, 0.5 at a tie [N]. The same answer twice is a tie: in another batch a
    model gives it a score with other last digits."""
    same = [all(one.get(key) == other.get(key) for key in ("completion", "finish_reason")) for one, other in pairs]
    return np.where(same, 0.5, 0.5 + 0.5 * np.sign(np.asarray(a) - np.asarray(b)))


def by_judge(pairs: list[tuple[dict, dict]], judge: Judge, name: str) -> tuple[np.ndarray, float | None]:
    """(preference for A [N] in [0, 1], share of pairs judged alike in both orders; None without such pairs).

    Every pair is judged twice, A first and B first (`align.reward_models.judges.ask`). A pair without a verdict in
    either order is a tie, and a warning says how many there were.
    """
    prompts = [one["prompt"] for one, _ in pairs]
    texts = [one["completion"] for one, _ in pairs], [other["completion"] for _, other in pairs]
    found = ask(judge, prompts, *texts, name)
    missing = np.isnan(found.preference)
    if missing.any():
        logger.warning(
            "judge %r gave no verdict on %d of %d pairs: they count as ties", name, missing.sum(), len(pairs)
        )
    both = found.consistent[~np.isnan(found.consistent)]
    return np.where(missing, 0.5, found.preference), float(both.mean()) if len(both) else None


def build_judges(words: Sequence[str], rewards: Collection[str]) -> dict[str, Judge]:
    """The judges that command-line words name: file.py:function, or the mapping of a `judge` reward."""
    specs = {word: parse(JudgeSpec, parse_value(word), "--judge") for word in words if word.lstrip().startswith("{")}
    names = judge_names(words, rewards, {word: spec.stated_name for word, spec in specs.items()})
    return {name: specs[word].judge() if word in specs else judge_function(word) for name, word in names.items()}


def judge_names(
    judges: Sequence[str], rewards: Collection[str], stated: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The words of judges by the name that they have in tables: a function's, or the whole word where another judge
    or a reward has that too. stated: names of words that are no functions. ConfigError for a judge that is given
    twice."""
    short = [(stated or {}).get(judge, judge.rpartition(":")[2]) for judge in judges]
    names = {
        judge if short.count(name) > 1 or name in rewards else name: judge
        for name, judge in zip(short, judges, strict=True)
    }
    if len(names) < len(judges):
        twice = next(judge for judge in judges if list(judges).count(judge) > 1)
        raise ConfigError(f"the judge {twice} is given twice")
    return names


def summarise(pairs: list[tuple[dict, dict]], preference: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Win rate of A (a tie is half), shares of wins and ties, and the win rate at equal length; 95 % bootstrap over
    prompts, all answers to one together.

    At equal length: sigmoid(t) of the logistic regression of the preference on t + c tanh(difference in characters /
    its standard deviation), as AlpacaEval's length control (Dubois et al. 2024, arXiv 2404.04475) without its terms for
    instructions; both parameters shrink a little (`RIDGE`), so that they exist when one side wins all.
    """
    rows, index = np.unique([one["row"] for one, _ in pairs], return_inverse=True)
    longer = np.array([len(one["completion"]) - len(other["completion"]) for one, other in pairs], dtype=np.float64)
    spread = longer.std()
    length = np.tanh(longer / spread) if spread else np.zeros_like(longer)
    rates = []
    as_they_are = [np.ones((1, len(rows)))]
    for drawn in chain(as_they_are, weight_tiles(len(rows), WIDTH * len(pairs), seed=seed)):
        weights = drawn[:, index]
        weights /= weights.sum(1, keepdims=True)
        rates.append([weights @ preference, _at_equal_length(preference, length, weights)])
    wins, equal = np.concatenate(rates, axis=1)
    won = _estimate(wins)
    won["low"], won["high"] = all_alike(preference, len(rows), won["low"], won["high"])
    return {
        "win_rate": won,
        "at_equal_length": _estimate(equal),
        "wins": float(np.mean(preference > 0.5)),
        "ties": float(np.mean(preference == 0.5)),
        "losses": float(np.mean(preference < 0.5)),
        "longer": float(np.mean(longer > 0)),
    }


def _estimate(values: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(values[1:])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _at_equal_length(preference: np.ndarray, length: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R] for weights [R, N] that sum to 1: sigmoid of the intercept, by Newton's method."""
    theta = np.zeros((len(weights), 2))
    columns = np.stack([np.ones_like(length), length], 1)
    products = (columns[:, :, None] * columns[:, None, :]).reshape(-1, 4)
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-theta @ columns.T))
        gradient = (weights * (preference - chance)) @ columns - RIDGE * theta
        curve = (weights * chance * (1 - chance) @ products).reshape(-1, 2, 2) + RIDGE * np.eye(2)
        step = np.linalg.solve(curve, gradient[..., None])[..., 0]
        theta = theta + step
        if np.abs(step).max() < EXACT:
            break
    return 1 / (1 + np.exp(-theta[:, 0]))


def write_comparison(folder: str | Path, result: dict[str, Any], pairs: list[tuple[dict, dict]]) -> list[Path]:
    """compare.json, and compare.html with the first texts side by side."""
    folder = Path(folder)
    shown = [
        {"prompt": prompt_text(one["prompt"]), "a": one["completion"], "b": other["completion"], "row": one["row"]}
        for one, other in pairs[:SHOWN]
    ]
    for index, entry in enumerate(shown):
        entry["verdicts"] = {name: found["preference"][index] for name, found in result["by"].items()}
    page = render_page(folder / PAGE_NAME, TEMPLATE, r=result, shown=shown)
    return [page, write_json(folder / JSON_NAME, result)]


def prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
