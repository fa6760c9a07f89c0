"""D2PO: online DPO whose reward model learns along (Singhal et al. 2024, arXiv 2405.01511).

A discriminator, a reward model, ranks what the policy writes (silver labels). At the beginning of every cycle of
rollouts a few of the pairs, those it is least sure of, get gold labels, and it is trained on them: a few gold labels
keep it right about the policy as that moves. All else is online DPO.
"""

from dataclasses import dataclass, field
from pathlib import Path

from align.distributed.checkpoints import flush_files
from align.errors import ConfigError
from align.trainers.on_policy.discriminator import Discriminator
from align.trainers.on_policy.pair_selection import make_pairs
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample
from align.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

FOLDER = "discriminator"
"""Of the trained discriminator, in the folder of the final model."""
CHOICES = ("uncertain", "random")


@dataclass
class D2POConfig(OnlineDPOConfig):
    """Options of online DPO, and of the discriminator. Defaults as in the released code, where it has other ones."""

    beta: float = field(default=0.05, metadata={"help": "Strength of the KL constraint to the reference."})
    gold_labels: int = field(
        default=16, metadata={"help": "Pairs that the gold reward labels in a rollout of a cycle's beginning."}
    )
    gold_label_every: int = field(
        default=4, metadata={"help": "Rollouts in a cycle: the first has gold labels, and the discriminator learns."}
    )
    gold_label_budget: int | None = field(
        default=None, metadata={"help": "Gold labels of the whole run; then the discriminator stays. Default: no end."}
    )
    gold_label_choice: str = field(
        default="uncertain",
        metadata={
            "help": "uncertain: the pairs whose scores differ least are labelled. random: any.",
            "choices": list(CHOICES),
        },
    )
    discriminator_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the discriminator."})
    discriminator_epochs: int = field(default=4, metadata={"help": "Passes over the new labels."})
    discriminator_batch_size: int = field(default=16, metadata={"help": "Pairs of a step of the discriminator."})
    discriminator_lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of an adapter that is trained, with the head, instead of all of its weights."},
    )


class D2POTrainer(OnlineDPOTrainer):
    """Arguments as those of `OnlineDPOTrainer`. `reward` is the discriminator: one reward of type classifier, which is
    trained; `gold_reward` labels pairs for it, and is scored in evaluations."""

    _tag_names = ["align", "d2po"]
    paper = "Singhal et al. 2024, arXiv 2405.01511"
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
            folder = Path(output_dir or self.args.output_dir) / FOLDER
            self.discriminator.save_model(folder)
            flush_files(folder)
