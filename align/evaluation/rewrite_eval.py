"""What rewrites that keep the meaning do to a reward's scores and rankings."""

import time

from align.data.bad_rows import BadRows
from align.evaluation.pair_report import rewrite_entry
from align.evaluation.pair_scores import PairScores, score_pairs
from align.evaluation.pairs import Pairs, sample_places
from align.evaluation.rewrites import Rewrite, rewrite_row

SHOWN = 120  # characters of an example


def evaluate_rewrites(
    result: dict,
    rewards: dict,
    pairs: Pairs,
    scores: dict[str, PairScores],
    rewrites: list[Rewrite],
    limits: dict,
    seed: int,
) -> None:
    """Add `rewrites` to the result and to each of its rewards.

    limits: "pairs", how many are rewritten (a random sample), and "max_bad_share" of a rewrite's pairs.
    """
    from tqdm import tqdm

    if not rewrites:
        return
    started = time.perf_counter()
    places = sample_places(len(pairs), limits["pairs"], seed)
    sample = pairs.select(places)
    result["setup"]["pairs rewritten"] = len(sample)
    for reward in rewards:
        result["rewards"][reward]["rewrites"] = {}
    with tqdm(total=len(rewrites) * len(rewards), unit="rewrite", desc="rewrites") as progress:
        for rewrite in rewrites:
            changed, rewritten = _rewritten(rewrite, sample, seed)
            result["rewrites"][rewrite.name] = {
                "does": rewrite.does,
                "target": rewrite.target,
                "changed": len(changed),
                "example": _example(sample, changed, rewritten),
            }
            originals = sample.select(changed)
            for name, reward in rewards.items():
                if changed:
                    after = score_pairs(reward, rewritten)
                    _check_refused(after, rewritten, rewrite, name, limits["max_bad_share"])
                    before = scores[name].select([places[i] for i in changed])
                    entry = rewrite_entry(before, after, float(scores[name].both.std()), originals, seed)
                    result["rewards"][name]["rewrites"][rewrite.name] = entry
                progress.update(1)
    result["phases"]["rewrites"] = time.perf_counter() - started


def _rewritten(rewrite: Rewrite, sample: Pairs, seed: int) -> tuple[list[int], Pairs]:
    """The places of the pairs that the rewrite changes, and these pairs rewritten."""
    places, prompts, chosen, rejected = [], [], [], []
    for place in range(len(sample)):
        row, prompt = sample.rows[place], sample.prompts[place]
        answers = (sample.chosen[place], sample.rejected[place])
        (new_prompt, better), (_, worse) = (rewrite_row(rewrite, prompt, a, seed=seed, row=row) for a in answers)
        if (new_prompt, better, worse) != (prompt, *answers):
            places.append(place)
            prompts.append(new_prompt)
            chosen.append(better)
            rejected.append(worse)
    rewritten = sample.select(places)
    rewritten.prompts, rewritten.chosen, rewritten.rejected = prompts, chosen, rejected
    return places, rewritten


def _check_refused(after: PairScores, rewritten: Pairs, rewrite: Rewrite, name: str, max_bad_share: float) -> None:
    report = BadRows(f"{rewritten.source}, rewritten by {rewrite.name}", total=len(rewritten))
    for place in after.failed:
        report.add(rewritten.rows[place], f"reward {name!r} refuses it (first: {after.reason})")
    report.check(max_bad_share)


def _example(sample: Pairs, changed: list[int], rewritten: Pairs) -> dict | None:
    """The first text that differs, before and after, around where the two part."""
    if not changed:
        return None
    first = sample.select(changed[:1])
    texts = zip(*((p.prompts[0], p.chosen[0], p.rejected[0]) for p in (first, rewritten)), strict=True)
    old, new = next((old, new) for old, new in texts if old != new)
    if not isinstance(old, str):
        old, new = ("\n".join(message["content"] for message in text) for text in (old, new))
    apart = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, apart - SHOWN // 3)
    return {"before": old[start : start + SHOWN], "after": new[start : start + SHOWN]}
