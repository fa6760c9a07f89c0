"""Rewards for which the policy judges its own completions, and the engine that they ask."""

from collections.abc import Iterable

from align.errors import ConfigError
from align.reward_models.base import Reward, within
from align.reward_models.judges import JudgeReward
from align.reward_models.self_judge import Generates, SelfJudge
from align.trainers.on_policy.config import OnPolicyConfig


def self_judges(rewards: Iterable[Reward]) -> list[SelfJudge]:
    found = [reward.judge for reward in within(rewards) if isinstance(reward, JudgeReward)]
    return [judge for judge in found if isinstance(judge, SelfJudge)]


def room_of_judges(rewards: Iterable[Reward], tokenizer, args: OnPolicyConfig) -> int:
    """Tokens of the longest question that the policy is asked, with its answer; 0 if it is asked none."""
    return max((judge.tokens(tokenizer, **limits_of(args)) for judge in self_judges(rewards)), default=0)


def bind_judges(rewards: Iterable[Reward], engine: Generates, tokenizer, args: OnPolicyConfig) -> None:
    """Give the rewards that ask the policy its engine."""
    for judge in self_judges(rewards):
        if args.rollouts_ahead:
            raise ConfigError(
                f"reward {judge.name!r} asks the policy through the rollout engine, which with rollouts_ahead has "
                "older weights and draws the next rollout meanwhile: leave rollouts_ahead out",
                key="rollouts_ahead",
            )
        if args.engine_options.sharing > 1:
            raise ConfigError(
                f"reward {judge.name!r}: each process asks the policy as often as its answers need, and those that "
                "share an engine (rollout.tensor_parallel) must all ask together: set rollout.tensor_parallel: 1, or "
                "use a server",
                key="rollout.tensor_parallel",
            )
        judge.bind(engine, tokenizer, judge.tokens(tokenizer, **limits_of(args)))


def limits_of(args: OnPolicyConfig) -> dict[str, int]:
    return {"prompt": args.max_prompt_length, "completion": args.max_completion_length}
