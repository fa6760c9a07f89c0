"""From samples to the reward matrix [samples, rewards], and from its columns to one score."""

from typing import Any

from align.errors import ConfigError
from align.reward_models.base import Reward, RewardBatch
from align.trainers.on_policy.samples import Sample
from align.trainers.weighting.base import weighted_sum


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
        weights = [1.0] * len(self.rewards) if weights is None else weights
        if len(weights) != len(self.rewards):
            raise ConfigError(f"{len(weights)} reward_weights for {len(self.rewards)} rewards {self.names}")
        self.weights = dict(zip(self.names, weights, strict=True))

    @property
    def name(self) -> str:
        return "+".join(self.names)

    def fill(self, samples: list[Sample]) -> None:
        """Score every sample once with every reward; fills rewards, extras and score."""
        for name, output in self.scores(samples).items():
            for sample, score in zip(samples, output.scores.tolist(), strict=True):
                sample.rewards[name] = score
            for key, values in output.extras.items():
                for sample, value in zip(samples, values.tolist(), strict=True):
                    sample.extras[f"{name}/{key}"] = value
        for sample in samples:
            sample.score = weighted_sum(sample.rewards, self.weights)

    def scores(self, samples: list[Sample]) -> dict:
        batch = RewardBatch(
            prompts=[sample.prompt["prompt"] for sample in samples],
            completions=[sample.completion for sample in samples],
            prompt_ids=[sample.prompt["prompt_ids"] for sample in samples],
            completion_ids=[sample.completion_ids for sample in samples],
            columns={
                name: [sample.prompt[name] for sample in samples]
                for name in samples[0].prompt
                if name not in ("prompt", "prompt_ids", "row")
            },
            rows=[sample.prompt["row"] for sample in samples] if "row" in samples[0].prompt else None,
            ended=[not sample.truncated for sample in samples],
        )
        return {reward.name: reward.score(batch) for reward in self.rewards}

    def totals(self, samples: list[Sample]) -> list[float]:
        """The weighted sum only, leaving the samples as they are (for a gold reward)."""
        scores = self.scores(samples)
        columns = [scores[name].scores.tolist() for name in self.names]
        return [
            weighted_sum(dict(zip(self.names, row, strict=True)), self.weights) for row in zip(*columns, strict=True)
        ]
