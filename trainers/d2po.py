"""D2PO: online DPO whose reward model learns along (Singhal et al. 2024, arXiv 2405.01511).

A discriminator, a reward model, ranks what the policy writes (silver labels). At the beginning of every cycle of
rollouts a few of the pairs, those it is least sure of, get gold labels, and it is trained on them: a few gold labels
keep it right about the policy as that moves. All else is online DPO.
"""

from dataclasses import dataclass, field
from pathlib import Path

from align.errors import ConfigError
from align.trainers.on_policy.discriminator import Discriminator, DiscriminatorOptions
from align.trainers.on_policy.pair_selection import make_pairs
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample
from align.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

FOLDER = "discriminator"
"""Of the trained discriminator, in the folder of the final model."""


@dataclass
class D2POConfig(DiscriminatorOptions, OnlineDPOConfig):  # type: ignore[misc]  # the loss_type of pairs
    """Options of online DPO, and of the discriminator. Defaults as in the released code, where it has other ones."""

    beta: float = field(default=0.05, metadata={"help": "Strength of the KL constraint to the reference."})


class D2POTrainer(OnlineDPOTrainer):
    """Arguments as those of `OnlineDPOTrainer`. `reward` is the discriminator: one reward of type classifier, which is
    trained; `gold_reward` labels pairs for it, and is scored in evaluations."""

    _tag_names = ["align", "d2po"]
    config_class = D2POConfig
    args: D2POConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.gold is None:
            raise ConfigError("D2PO needs gold_reward: what labels the pairs that the discriminator learns from")
        self.discriminator = Discriminator(self.args, self.rewards, self.gold, self.accelerator, self.recorder)

    def pairs_of(self, rollout: ScoredRollout, indices: list[int]) -> list[Sample]:
        step = self.state.global_step
        with self.phase("gold"):
            return self.discriminator.label(make_pairs(rollout), indices, step, step // self.args.steps_per_rollout)

    def save_further_files(self, folder: Path) -> None:
        super().save_further_files(folder)
        if self.args.should_save:
            self.discriminator.save(folder)

    def load_state(self, state: dict, folder: Path) -> None:
        super().load_state(state, folder)
        self.discriminator.load(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            self.discriminator.save_model(Path(output_dir or self.args.output_dir) / FOLDER)
