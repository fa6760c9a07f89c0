"""Scores of the policies of fronts: what each earns from every gold reward, and how far it is from the reference."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from align.data.collate import right_pad
from align.data.ending import written_text
from align.data.limits import longest_of
from align.errors import ConfigError, DataError
from align.evaluation.bootstrap import percentile_interval, resampled_means
from align.evaluation.front import Front, Point
from align.evaluation.pareto import dominated_share, non_dominated
from align.evaluation.scoring import drawn_batch
from align.modeling.adapters import adapter_start, is_adapter
from align.objectives.reward_weighting import hypervolume
from align.rollout.seeds import derive_seed
from align.rollout.types import SamplingParams

logger = logging.getLogger(__name__)

REFERENCE = "reference"
SEQUENCES_AT_ONCE = 64


@dataclass
class Sampling:
    """How completions are drawn: n per prompt, the same draws (seeds) for every policy."""

    n: int = 4
    max_completion_length: int = 256
    temperature: float = 1.0
    backend: str = "auto"
    seed: int = 0


@dataclass
class PolicyScores:
    """Means over a prompt's completions: scores [P, K], one column per reward; kl [P], nats; length [P], tokens.
    samples: the first completion of every prompt and its scores."""

    scores: np.ndarray
    kl: np.ndarray
    length: np.ndarray
    samples: list[dict]


def score_fronts(
    fronts: dict[str, Front], prompts, rewards: dict, tokenizer, sampling: Sampling
) -> dict[str, list[PolicyScores]]:
    """Scores of every point of every front, by the front's name, and those of the reference policy, under `reference`.

    prompts: the output of `tokenize_prompts`. rewards: by name; their order is the columns'. All fronts must have
    started from one policy, which is the reference of the KL.
    """
    from align.modeling.load import load_policy
    from align.rollout import make_engine

    references = {front.reference for front in fronts.values()}
    if len(references) != 1:
        raise ConfigError(f"fronts are compared from one reference policy; these started from {sorted(references)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = load_policy(references.pop()).to(device).eval()
    longest = longest_of(prompts, "prompt_ids") + sampling.max_completion_length
    engine = make_engine(reference, tokenizer, backend=sampling.backend, max_model_len=longest, seed=sampling.seed)
    try:
        found = {REFERENCE: [score_policy(reference, reference, engine, prompts, rewards, tokenizer, sampling)]}
        version = 0
        for name, front in fronts.items():
            found[name] = []
            for point in front.points:
                version += 1
                policy = load_policy(point.folder).to(device).eval()
                engine.push(policy, version)
                scores = score_policy(policy, reference, engine, prompts, rewards, tokenizer, sampling)
                found[name].append(scores)
                shown = ", ".join(f"{r} {v:.3g}" for r, v in zip(rewards, scores.scores.mean(0), strict=True))
                logger.info("%s, %s: %s, KL %.3g", name, point.name, shown, scores.kl.mean())
    finally:
        engine.close()
    return found


def score_policy(policy, reference, engine, prompts, rewards: dict, tokenizer, sampling: Sampling) -> PolicyScores:
    """Draw from the engine, which holds `policy`; score with every reward; estimate the KL from the same draws."""
    params = [
        SamplingParams(
            max_tokens=sampling.max_completion_length,
            temperature=sampling.temperature,
            n=sampling.n,
            seed=derive_seed(sampling.seed, "front", index),
        )
        for index in range(len(prompts))
    ]
    rows = [prompts[i] for i in range(len(prompts))]
    rollouts = engine.generate([row["prompt_ids"] for row in rows], params)
    drawn = [
        (row, c, written_text(tokenizer, c.token_ids, c.finish_reason == "stop"))
        for row, rollout in zip(rows, rollouts, strict=True)
        for c in rollout.completions
    ]
    batch = drawn_batch(drawn)
    scores = np.stack([reward.score(batch).scores.double().numpy() for reward in rewards.values()], axis=-1)
    pairs = [(row["prompt_ids"], c.token_ids) for row, c, _ in drawn]
    kl = kl_of_draws(policy, reference, pairs, tokenizer.pad_token_id, sampling.temperature)
    length = np.array([len(c.token_ids) for _, c, _ in drawn], dtype=np.float64)
    by_prompt = (len(rows), sampling.n)
    first = range(0, len(drawn), sampling.n)
    samples = [
        {
            "prompt": drawn[i][0]["prompt"],
            "completion": drawn[i][2],
            **dict(zip(rewards, scores[i].tolist(), strict=True)),
        }
        for i in first
    ]
    return PolicyScores(
        scores.reshape(*by_prompt, len(rewards)).mean(1),
        kl.reshape(by_prompt).mean(1),
        length.reshape(by_prompt).mean(1),
        samples,
    )


@torch.no_grad()
def kl_of_draws(policy, reference, pairs: list[tuple], pad_token_id: int, temperature: float) -> np.ndarray:
    """log pi(y|x) - log ref(y|x) of (prompt ids, completion ids), both at the temperature of the draws, in nats: [N].
    Their mean over draws of pi is the KL."""
    from align.modeling.logprobs import token_logps

    found = np.empty(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), SEQUENCES_AT_ONCE):
        rows = order[start : start + SEQUENCES_AT_ONCE]
        ids, attention = right_pad([[*pairs[i][0], *pairs[i][1]] for i in rows], pad_token_id)
        starts = torch.tensor([len(pairs[i][0]) for i in rows])[:, None]
        mask = attention * (torch.arange(ids.shape[1]) >= starts)
        ids, attention, mask = (x.to(policy.device) for x in (ids, attention, mask))
        new, old = (
            token_logps(model, ids, attention, temperature=temperature, mask=mask).double().sum(-1)
            for model in (policy, reference)
        )
        found[rows] = (new - old).cpu().numpy()
    return found


def summarise(
    fronts: dict[str, Front],
    found: dict[str, list[PolicyScores]],
    objectives: list[str],
    *,
    reference_point: list[float] | None = None,
    seed: int = 0,
) -> dict:
    """What `align front` writes as scores.json: means with 95 % intervals over prompts, which points of a front are
    not dominated, in which share of the resamples another front dominates a point, and hypervolumes.

    reference_point: [K], from which hypervolumes are measured; default: the worst mean of all policies, per objective.
    The prompts are resampled once for all policies, so that comparisons are paired.
    """
    means = {name: np.stack([p.scores.mean(0) for p in policies]) for name, policies in found.items()}
    drawn = {name: _resampled(policies, seed) for name, policies in found.items()}
    resampled = {name: samples[..., : len(objectives)] for name, samples in drawn.items()}
    given = reference_point is not None
    corner = np.array(reference_point if given else np.concatenate(list(means.values())).min(0))
    runs = {}
    for name, front in fronts.items():
        best = non_dominated(means[name])
        others = {other: dominated_share(resampled[name], resampled[other]) for other in fronts if other != name}
        volumes = np.array([hypervolume(points, corner.tolist()) for points in resampled[name].tolist()])
        low, high = percentile_interval(volumes)
        volume = hypervolume(means[name].tolist(), corner.tolist())
        runs[name] = {
            "method": front.method,
            "seconds": front.seconds | {"training": float(sum(point.seconds for point in front.points))},
            "hypervolume": {"mean": volume, "low": float(low), "high": float(high)},
            "points": [
                {
                    **_policy_entry(policy, objectives, drawn[name][:, i]),
                    **_point_entry(point),
                    "non_dominated": bool(best[i]),
                    "dominated_share": {other: float(shares[i]) for other, shares in others.items()},
                }
                for i, (point, policy) in enumerate(zip(front.points, found[name], strict=True))
            ],
        }
    return {
        "objectives": objectives,
        "prompts": len(found[REFERENCE][0].kl),
        "reference_point": corner.tolist(),
        "reference_point_is": "given" if given else "the worst mean of all policies, per objective",
        "reference": _policy_entry(found[REFERENCE][0], objectives, drawn[REFERENCE][:, 0]),
        "runs": runs,
    }


def _point_entry(point: Point) -> dict:
    return {"name": point.name, "kind": point.kind, "weights": point.weights, "folder": point.folder}


def _columns(policy: PolicyScores) -> np.ndarray:
    """[P, K + 2]: scores, KL, length."""
    return np.column_stack([policy.scores, policy.kl, policy.length])


def _resampled(policies: list[PolicyScores], seed: int) -> np.ndarray:
    """[resamples, policies, K + 2]: means of `_columns` over the same resamples of the prompts."""
    return np.stack(resampled_means([_columns(policy) for policy in policies], seed=seed), axis=1)


def _policy_entry(policy: PolicyScores, objectives: list[str], samples: np.ndarray) -> dict:
    means, (low, high) = _columns(policy).mean(0), percentile_interval(samples)
    entry = {
        name: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate([*objectives, "kl", "length"])
    }
    return {"scores": {name: entry[name] for name in objectives}, "kl": entry["kl"], "length": entry["length"]}


def as_front(path: str | Path) -> Front:
    """The front in a folder; of a folder with one saved policy, a front of one point."""
    from align.evaluation.front import FILE_NAME, read_front

    folder = Path(path)
    if folder.is_dir() and not (folder / FILE_NAME).exists():
        if is_adapter(folder):
            reference = adapter_start(folder)
            return Front("policy", reference, [], [Point(folder.name, str(folder), {})])
        if (folder / "config.json").exists():
            return Front("policy", "", [], [Point(folder.name, str(folder), {})])
    try:
        return read_front(path)
    except DataError as error:
        raise DataError(f"{error}, or that of a saved policy") from error
