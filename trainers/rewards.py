"""From samples to the reward matrix [samples, rewards], and from its columns to one score."""

from typing import Any

from align.errors import ConfigError
from reward_models.base import Reward, RewardBatch
from trainers.rollouts import Sample


class RewardColumns:
    """Named rewards with fixed weights. `spec` is a `Reward`, a spec for `build_reward`, or a list of either."""

    def __init__(self, spec: Any, weights: list[float] | None, *, tokenizer=None):
        from reward_models.build import build_reward

        specs = spec if isinstance(spec, (list, tuple)) else [spec]
        if not specs:
            raise ConfigError("no reward is given: name at least one under `rewards:`")
        self.rewards = [item if isinstance(item, Reward) else build_reward(item, tokenizer=tokenizer) for item in specs]
        self.names = [reward.name for reward in self.rewards]
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"two rewards have the same name in {self.names}: give each its own `name`")
        self.weights = weights or [1.0] * len(self.rewards)
        if len(self.weights) != len(self.rewards):
            raise ConfigError(f"{len(self.weights)} reward_weights for {len(self.rewards)} rewards {self.names}")

    @property
    def name(self) -> str:
        return "+".join(self.names)

    def fill(self, samples: list[Sample]) -> None:
        """Score every sample once with every reward; fills rewards, extras and score."""
        scores = self.scores(samples)
        for i, sample in enumerate(samples):
            for reward, output in scores.items():
                sample.rewards[reward] = output.scores[i].item()
                for name, values in output.extras.items():
                    sample.extras[f"{reward}/{name}"] = values[i].item()
            sample.score = sum(w * sample.rewards[name] for w, name in zip(self.weights, self.names, strict=True))

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
        )
        return {reward.name: reward.score(batch) for reward in self.rewards}

    def totals(self, samples: list[Sample]) -> list[float]:
        """The weighted sum only, leaving the samples as they are (for a gold reward)."""
        scores = self.scores(samples)
        return [
            sum(w * scores[name].scores[i].item() for w, name in zip(self.weights, self.names, strict=True))
            for i in range(len(samples))
        ]
