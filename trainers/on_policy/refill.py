"""Dynamic sampling: prompts whose samples all have one score teach nothing, and others are drawn in their place."""

from collections.abc import Callable, Sequence

import numpy as np

from align.rollout.seeds import derive_seed
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import stream_scores
from align.trainers.weighting.base import Weighting


def without_signal(group: list[Sample], weighting: Weighting) -> bool:
    """Whether a prompt's completions, the greedy one included, have the same score in every stream; those that are left
    out do not count."""
    scores = [stream_scores(sample, weighting) for sample in group if not sample.left_out]
    return all(other == scores[0] for other in scores[1:])


class DynamicSampling:
    """DAPO's (Yu et al. 2025, arXiv 2503.14476), with a limit.

    The prompts that fill up are drawn at random from the whole data, not from the epoch's order: by seed, step, round
    and the place in the global batch alone, so that a resumed run, or one on other processes, draws the same.

    Args:
        rounds: the most times that a rollout's groups are replaced; what has no signal then is kept.
        batch: prompts of a rollout, of all processes.
    """

    def __init__(self, rounds: int, batch: int, rows: Sequence[dict], seed: int, ranks: Ranks, recorder: Recorder):
        self.rounds, self.batch, self.rows, self.seed = rounds, batch, rows, seed
        self.ranks, self.recorder = ranks, recorder

    def fill(
        self,
        rollout: ScoredRollout,
        indices: list[int],
        step: int,
        weighting: Weighting,
        draw: Callable[[list[dict], list[int]], ScoredRollout],
        join: Callable[[], object],
    ) -> None:
        """Replace groups in place. indices: of the rollout's prompts in the global batch. draw: completes prompts and
        scores them; its indices, for the seeds, go on beyond the batch. join: takes part in calls of the engine
        and of rewards that others need, where processes share them. All processes must call it."""
        each = len(rollout.samples) // len(indices)
        groups = [slice(i * each, (i + 1) * each) for i in range(len(indices))]

        def empty() -> list[int]:
            found = enumerate(zip(groups, rollout.extra, strict=True))
            return [i for i, (own, extra) in found if without_signal(rollout.samples[own] + extra, weighting)]

        missing = empty()
        self._record("without_signal", missing, indices)
        used = 0
        while used < self.rounds and int(self.ranks.total(len(missing))):
            used += 1
            if missing:
                prompts = [self.rows[self._row(step, used, indices[i])] for i in missing]
                made = draw(prompts, [indices[i] + used * self.batch for i in missing])
                for number, i in enumerate(missing):
                    rollout.samples[groups[i]] = made.samples[number * each : (number + 1) * each]
                    rollout.extra[i] = made.extra[number]
                missing = empty()
            else:
                join()
        self.recorder.record("dynamic_sampling/rounds", used)
        self._record("left", missing, indices)

    def _row(self, step: int, used: int, index: int) -> int:
        generator = np.random.default_rng(derive_seed(self.seed, "refill", step, used, index))
        return int(generator.integers(len(self.rows)))

    def _record(self, name: str, missing: list[int], indices: list[int]) -> None:
        self.recorder.record(f"dynamic_sampling/{name}", len(missing) / len(indices), len(indices))
