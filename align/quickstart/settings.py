"""How large the quickstart is."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Sizes:
    """What every quickstart has: sizes and learning rates, and its rollout engine. Lengths in tokens."""

    train_prompts: int = 256
    eval_prompts: int = 1024
    members: int = 5
    reward_epochs: int = 5
    reward_learning_rate: float = 2e-3
    uncertainty_weight: float = 0.5
    bon_prompts: int = 32
    bon_n: int = 512
    prompts_per_step: int = 64
    steps: int = 100
    eval_every: int = 10
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
    """Of the toy world, where a token is a word.

    longest_text: words of the longest answers that the policy learns to speak from. fondness: of each annotator for a
    filler word, in points of gold for every time it occurs (`toy.annotator_score`); there are as many annotators as
    reward models, and pair i is judged by annotator i mod that number. label_noise: share of the labels that are
    flipped after that. own_pairs: every reward model learns from the pairs of one annotator; otherwise from all.
    """

    sft_rows_per_prompt: int = 64
    sft_learning_rate: float = 2e-3
    longest_text: int = 11
    pairs: int = 6000
    eval_pairs: int = 300
    fondness: float = 2.0
    label_noise: float = 0.15
    own_pairs: bool = True


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
