"""From samples to the reward matrix [samples, rewards], and from its columns to one score."""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError, RewardError
from align.reward_models.base import Reward, RewardBatch, joined, score_together, within
from align.reward_models.judges import JudgeReward
from align.trainers.on_policy.environments import CLASS_COLUMN, FAILURE_COLUMN, REWARD_COLUMN, EnvironmentReward
from align.trainers.on_policy.samples import Sample
from align.trainers.weighting.base import weighted_sum

if TYPE_CHECKING:
    from align.trainers.on_policy.early_scores import EarlyScores

logger = logging.getLogger(__name__)

OF_SCORES = ("mean", "std")  # of a reward, as `Recorder.record_spread` logs them


class RewardColumns:
    """Named rewards with fixed weights. `spec` is a `Reward`, a spec for `build_reward`, or a list of either."""

    def __init__(self, spec: Any, weights: list[float] | None, *, tokenizer=None):
        from align.reward_models.build import build_reward

        specs = spec if isinstance(spec, (list, tuple)) else [spec]
        if not specs:
            raise ConfigError("no reward is given: name at least one under `rewards:`")
        self.rewards = [item if isinstance(item, Reward) else build_reward(item, tokenizer=tokenizer) for item in specs]
        self.names = [reward.name for reward in self.rewards]
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"two rewards have the same name in {self.names}: give each its own `name`")
        # TRL's weights are those of the given rewards, beside which an environment's own counts as it is
        own = sum(isinstance(reward, EnvironmentReward) for reward in self.rewards)
        weights = [1.0] * len(self.rewards) if weights is None else weights
        weights = weights + [1.0] * own if len(weights) == len(self.rewards) - own else weights
        if len(weights) != len(self.rewards):
            raise ConfigError(f"{len(weights)} reward_weights for {len(self.rewards)} rewards {self.names}")
        self.weights = dict(zip(self.names, weights, strict=True))
        self.warned = False  # of a completion that no reward applies to
        self.trainer_state: Callable[[], Any] = lambda: None  # a trainer sets it

    @property
    def name(self) -> str:
        return "+".join(self.names)

    def fill(
        self, samples: list[Sample], early: "EarlyScores | None" = None
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Score every sample once with every reward; fills rewards, extras, shown, score and left_out. Returns what the
        rewards log by name, and what the user's functions do under names of their own. early: the scores of these
        samples that have begun."""
        metrics: dict[str, list[float]] = {}
        outputs = self.scores(samples, early)
        for name, output in outputs.items():
            for sample, score, missing in zip(samples, output.scores.tolist(), output.missing.tolist(), strict=True):
                if not missing:
                    sample.rewards[name] = score
            for key, values in output.extras.items():
                if key in OF_SCORES:
                    raise RewardError(
                        f"reward {name!r} has a number (or a part of a composite) called {key!r}, and "
                        f"rewards/{name}/{key} is logged of its scores: rename it"
                    )
                for sample, value in zip(samples, values.tolist(), strict=True):
                    if not math.isnan(value):  # of a part that does not apply
                        sample.extras[f"{name}/{key}"] = value
            for key, shown in output.columns.items():
                for sample, value in zip(samples, shown, strict=True):
                    sample.shown[f"{name}/{key}"] = value
            if output.failed is not None:
                for sample, failed in zip(samples, output.failed.tolist(), strict=True):
                    sample.left_out |= failed
            metrics |= {f"rewards/{name}/{key}": values for key, values in output.metrics.items()}
        for sample in samples:
            sample.score = weighted_sum(sample.rewards, self.weights)
            if not sample.rewards and not sample.left_out and not self.warned:
                self.warned = True
                logger.warning(
                    "All reward functions returned None for the following kwargs: %s. The completion is in no loss and "
                    "in no baseline; this is said once",
                    {"completion": sample.completion, **{k: v for k, v in sample.prompt.items() if k != "prompt_ids"}},
                )
            sample.left_out |= not sample.rewards
        return metrics, joined(output.given for output in outputs.values())

    def scores(self, samples: list[Sample], early: "EarlyScores | None" = None) -> dict:
        """Of every reward by name. Where one is `placed`, all ranks must call it, also with no samples."""
        if early is not None:
            return dict(zip(self.names, early.outputs(samples), strict=True))
        batch = self.batch(samples) if samples else RewardBatch([], [])
        return dict(zip(self.names, score_together(self.rewards, batch, partial=True), strict=True))

    def batch(self, samples: list[Sample]) -> RewardBatch:
        """What the rewards look at."""
        prompts: dict[int, int] = {}  # the samples of a prompt hold one and the same mapping
        episodes = [sample.episode for sample in samples]
        of_environment: dict[str, list] = {}
        played = [None if episode is None else episode.played for episode in episodes]
        if episodes[0] is not None:
            of_environment = {
                REWARD_COLUMN: [None if episode is None else episode.reward for episode in episodes],
                FAILURE_COLUMN: [None if episode is None else episode.failure for episode in episodes],
                CLASS_COLUMN: [None if episode is None else episode.environment for episode in episodes],
            }
        return RewardBatch(
            prompts=[sample.prompt["prompt"] for sample in samples],
            completions=[sample.completion for sample in samples],
            prompt_ids=[sample.prompt["prompt_ids"] for sample in samples],
            completion_ids=[sample.completion_ids for sample in samples],
            columns={
                name: [sample.prompt[name] for sample in samples]
                for name in samples[0].prompt
                if name not in ("prompt", "prompt_ids", "row", "chosen_ids", "rejected_ids")
            }
            | of_environment,
            rows=[sample.prompt["row"] for sample in samples] if "row" in samples[0].prompt else None,
            ended=[not sample.truncated for sample in samples],
            groups=[prompts.setdefault(id(sample.prompt), len(prompts)) for sample in samples],
            environments=played if any(one is not None for one in played) else None,
            trainer_state=self.trainer_state(),
        )

    def totals(self, samples: list[Sample], early: "EarlyScores | None" = None) -> list[float | None]:
        """The weighted sum only, None where there is no score, leaving the samples as they are (for a gold reward)."""
        scores, found = self.scores(samples, early), []
        for i in range(len(samples)):
            row = {name: float(o.scores[i]) for name, o in scores.items() if not o.missing[i]}
            failed = any(o.failed is not None and bool(o.failed[i]) for o in scores.values())
            found.append(weighted_sum(row, self.weights) if row and not failed else None)
        return found


def gold_columns(spec: Any, tokenizer) -> RewardColumns | None:
    """The rewards that evaluations score beside the others, whose models are on a GPU in evaluations only; None of
    None. ConfigError for a judge: evaluations draw single completions, which it has nothing to compare with."""
    if spec is None:
        return None
    columns = RewardColumns(spec, None, tokenizer=tokenizer)
    for reward in columns.rewards:
        reward.offload()
    judges = [reward.name for reward in within(columns.rewards) if isinstance(reward, JudgeReward)]
    if judges:
        raise ConfigError(
            f"gold_reward: {judges[0]} is a judge, whose score is a completion's win rate among its prompt's own, one "
            "half in the mean whatever the policy: name a reward that scores single completions, or compare two models "
            "with align compare --judge"
        )
    return columns
