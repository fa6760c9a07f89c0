"""A sample of preference pairs, rewritten in every way that is asked for."""

from dataclasses import dataclass

from align.evaluation.pairs import Pairs, sample_places
from align.evaluation.rewrites import Rewrite, rewrite_row

SHOWN = 120  # characters of an example


@dataclass
class Rewritten:
    """indices: of the pairs that the rewrite changes, among all pairs. pairs: these, rewritten. size: of the sample."""

    rewrite: Rewrite
    indices: list[int]
    pairs: Pairs
    size: int


def rewrite_sample(rewrites: list[Rewrite], pairs: Pairs, count: int, seed: int) -> list[Rewritten]:
    """A random sample of `count` pairs, rewritten by each of `rewrites`."""
    sample = sample_places(len(pairs), count, seed) if rewrites else []
    return [_rewritten(rewrite, pairs, sample, seed) for rewrite in rewrites]


def _rewritten(rewrite: Rewrite, pairs: Pairs, sample: list[int], seed: int) -> Rewritten:
    indices, prompts, chosen, rejected = [], [], [], []
    for index in sample:
        row, prompt = pairs.rows[index], pairs.prompts[index]
        answers = (pairs.chosen[index], pairs.rejected[index])
        (new_prompt, better), (_, worse) = (rewrite_row(rewrite, prompt, a, seed=seed, row=row) for a in answers)
        if (new_prompt, better, worse) != (prompt, *answers):
            indices.append(index)
            prompts.append(new_prompt)
            chosen.append(better)
            rejected.append(worse)
    rewritten = pairs.select(indices)
    rewritten.prompts, rewritten.chosen, rewritten.rejected = prompts, chosen, rejected
    return Rewritten(rewrite, indices, rewritten, len(sample))


def example(original: Pairs, rewritten: Pairs) -> dict | None:
    """The first text that differs, before and after, around where the two part. The same pairs in both."""
    if not len(original):
        return None
    texts = zip(*((p.prompts[0], p.chosen[0], p.rejected[0]) for p in (original, rewritten)), strict=True)
    old, new = next((old, new) for old, new in texts if old != new)
    if not isinstance(old, str):
        old, new = ("\n".join(message["content"] for message in text) for text in (old, new))
    apart = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, apart - SHOWN // 3)
    return {"before": old[start : start + SHOWN], "after": new[start : start + SHOWN]}
