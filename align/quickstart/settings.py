"""How large the quickstart is."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Sizes:
    """What every quickstart has: sizes and learning rates, and its rollout engine. Lengths in tokens."""

    train_prompts: int = 256
    eval_prompts: int = 512
    members: int = 5
    reward_epochs: int = 2
    reward_learning_rate: float = 2e-3
    uncertainty_weight: float = 0.5
    bon_prompts: int = 32
    bon_n: int = 512
    prompts_per_step: int = 64
    steps: int = 60
    eval_every: int = 6
    eval_samples: int = 1
    learning_rate: float = 1e-3
    beta: float = 0.03
    max_prompt_length: int = 12
    max_completion_length: int = 12
    backend: str = "auto"  # of the rollouts: auto, vllm or transformers

    def fingerprint(self, seed: int) -> dict:
        return {"seed": seed, **asdict(self)}


@dataclass(frozen=True)
class Settings(Sizes):
    """Of the toy world, where a token is a word."""

    sft_rows_per_prompt: int = 32
    sft_learning_rate: float = 5e-3
    pairs: int = 6000
    eval_pairs: int = 300
    label_noise: float = 0.15
    own_pairs: bool = True  # every reward model learns from its own share of the pairs, as from annotators of its own


FULL = Settings()
SMALL = Settings(
    sft_rows_per_prompt=4,
    pairs=200,
    eval_pairs=60,
    members=3,
    reward_epochs=1,
    bon_prompts=8,
    bon_n=32,
    prompts_per_step=16,
    steps=6,
    eval_every=2,
    eval_prompts=24,
)
