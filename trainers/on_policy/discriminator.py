"""A reward model that learns while it ranks: D2PO's discriminator, from a few pairs of each cycle with gold labels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from align.data.collate import right_pad
from align.distributed.disk import open_to_others
from align.errors import ConfigError, TrainingError
from align.modeling.dropout import disable_dropout
from align.modeling.score_head import head_name
from align.modeling.scores import sequence_scores
from align.objectives.reward_model import bradley_terry_loss
from align.reward_models.classifier import ClassifierReward
from align.rollout.seeds import derive_seed
from align.trainers.core import beside
from align.trainers.core.recorder import Recorder
from align.trainers.core.resumed import own_settings
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample

if TYPE_CHECKING:
    from align.trainers.d2po import D2POConfig

FILE = "discriminator.pt"


@dataclass
class GoldPair:
    """Two completions of a prompt that the gold reward has compared: whole sequences of the discriminator's tokens."""

    index: int  # of the prompt in the rollout's global batch
    better: list[int]
    worse: list[int]


class Discriminator:
    """The one reward of a run as a model that is trained, its optimiser, and the gold labels that are spent.

    Every process holds it whole and in float32, and makes the same steps on the labels of all; the main one's weights
    hold. Its learning rate is constant.

    Args:
        args: the run's.
        rewards: of the run. gold: what labels.
    """

    def __init__(
        self,
        args: "D2POConfig",
        rewards: RewardColumns,
        gold: RewardColumns,
        accelerator: Accelerator,
        recorder: Recorder,
    ):
        (reward,) = rewards.rewards if len(rewards.rewards) == 1 else [None]
        if not isinstance(reward, ClassifierReward):
            raise ConfigError(
                "the rewards of this method are its discriminator, one reward of type classifier; got "
                f"{rewards.names}. What labels its pairs is gold_reward",
                key="rewards",
            )
        if reward.offloaded:
            raise ConfigError(
                f"reward {reward.name!r}: a discriminator is trained, so it stays on the device: leave offload out",
                key="rewards",
            )
        if reward.placed:
            raise ConfigError(
                f"reward {reward.name!r}: a discriminator is trained by every process, which holds it whole: leave "
                "ranks out",
                key="rewards",
            )
        self.args, self.rewards, self.gold = args, rewards, gold
        self.accelerator, self.recorder, self.spent = accelerator, recorder, 0
        self.reward = reward
        reward.model = self._trained(reward.model)
        self.parameters = {name: p for name, p in reward.model.named_parameters() if p.requires_grad}
        groups = beside.groups(reward.model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=args.discriminator_learning_rate)

    def _trained(self, model: Any) -> Any:
        """The classifier as it is trained: in float32, since small updates of 16-bit weights are rounded away, and
        without dropout, so that it learns what it scores."""
        args = self.args
        model = model.float()
        if args.discriminator_lora_r is None:
            model.requires_grad_(True)
        else:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=args.discriminator_lora_r,
                lora_alpha=2 * args.discriminator_lora_r,
                target_modules="all-linear",
                task_type="SEQ_CLS",
                modules_to_save=[head_name(model).split(".")[0]],
            )
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                model = get_peft_model(model, lora)
        disable_dropout(model)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.eval()

    # ---- labels -----------------------------------------------------------------------------------------------------

    def label(self, pairs: list[Sample], indices: list[int], step: int, rollout: int) -> list[Sample]:
        """In a rollout that begins a cycle: gold labels for some of the pairs, from which the discriminator learns. The
        pairs as they are trained on: those with a gold label in its order, left out where it sees no difference, the
        others in the discriminator's, as it was when it scored them. All processes call it together.

        pairs: the chosen and the rejected one of each prompt side by side, of this process. indices: of the prompts in
        the rollout's global batch. step: of the optimiser. rollout: its number in the run, from 0.
        """
        left = None if self.args.gold_label_budget is None else self.args.gold_label_budget - self.spent
        if rollout % self.args.gold_label_every or left == 0:
            return pairs
        count = self.args.gold_labels if left is None else min(self.args.gold_labels, left)
        chosen = self._choose(pairs, indices, step, count)
        found = [sample for place in chosen for sample in pairs[2 * place : 2 * place + 2]]
        scores = self.gold.totals(found)  # with none too: a model on other ranks is asked by all
        sequences = self.reward.inputs(self.rewards.batch(found)) if found else []
        labelled, right, pairs = [], [], list(pairs)
        for number, place in enumerate(chosen):
            one, other = 2 * number, 2 * number + 1
            gap = _gap(found[one], scores[one], found[other], scores[other])
            if gap is None or gap == 0:
                pairs[2 * place : 2 * place + 2] = [replace(sample, left_out=True) for sample in found[one : other + 1]]
                continue
            if gap < 0:
                pairs[2 * place : 2 * place + 2] = found[other], found[one]
                one, other = other, one
            right.append(float(gap > 0))
            labelled.append(GoldPair(indices[place], sequences[one], sequences[other]))
        self.spent += sum(gather_object([len(chosen)]))
        of_all = sorted(gather_object(labelled), key=lambda pair: pair.index)
        self.recorder.record("discriminator/gold_labels", self.spent)
        for value in right:  # of pairs that it has not been trained on
            self.recorder.record("discriminator/accuracy", value)
        self.learn(of_all, step)
        return pairs

    def _choose(self, pairs: list[Sample], indices: list[int], step: int, count: int) -> list[int]:
        """Which of this process's pairs are labelled: the `count` first of all processes', in the order asked for."""
        random = self.args.gold_label_choice == "random"
        own = {
            (
                derive_seed(self.args.seed, "gold", step, index) if random else one.score - other.score,
                index,
            ): place
            for place, (one, other, index) in enumerate(zip(pairs[::2], pairs[1::2], indices, strict=True))
            if not one.left_out
        }
        first = sorted(gather_object(list(own)))[:count]
        return [own[key] for key in first if key in own]

    # ---- learning ---------------------------------------------------------------------------------------------------

    def learn(self, pairs: list[GoldPair], step: int) -> None:
        """Bradley-Terry on the new pairs, `discriminator_epochs` times; pairs: of all processes, in one order."""
        args, model = self.args, self.reward.model
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "discriminator", step))
        model.train()
        with self.recorder.phase("discriminator"):
            for _ in range(args.discriminator_epochs):
                order = torch.randperm(len(pairs), generator=generator).tolist()
                for start in range(0, len(order), args.discriminator_batch_size):
                    self._step([pairs[i] for i in order[start : start + args.discriminator_batch_size]])
            if self.accelerator.num_processes > 1:
                for parameter in self.parameters.values():
                    parameter.data.copy_(broadcast(parameter.data, from_process=0))
        model.eval()

    def _step(self, pairs: list[GoldPair]) -> None:
        sequences = [pair.better for pair in pairs] + [pair.worse for pair in pairs]
        ids, mask = right_pad(sequences, self.reward.tokenizer.pad_token_id)
        device = self.reward.device
        with self.accelerator.autocast():
            better, worse = sequence_scores(self.reward.model, ids.to(device), mask.to(device)).chunk(2)
        loss = bradley_terry_loss(better, worse).mean()
        if not torch.isfinite(loss):
            raise TrainingError(f"the discriminator's loss is {loss.item()}: lower discriminator_learning_rate")
        beside.backward(loss, self.accelerator)
        beside.step(self.parameters.values(), self.optimizer, self.accelerator, self.args.max_grad_norm)
        self.recorder.record("discriminator/loss", loss.detach())

    # ---- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Into a checkpoint, by the main process."""
        weights: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        torch.save({"weights": weights, "optimizer": self.optimizer.state_dict(), "spent": self.spent}, folder / FILE)

    def load(self, folder: Path) -> None:
        path = folder / FILE
        if not path.exists():
            raise TrainingError(f"{folder} has no {FILE}: it is not a checkpoint of a run with a discriminator")
        state = torch.load(path, weights_only=True, map_location="cpu")
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            raise TrainingError(
                f"{path} has the optimiser of an earlier version, in which biases and norms of the discriminator "
                "decayed: resume the run with that version, or start it again"
            )
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["weights"][name])
        with own_settings(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.spent = state["spent"]

    def save_model(self, folder: Path) -> None:
        """As a reward model that `{type: classifier, path: folder}` loads."""
        self.reward.model.save_pretrained(folder)
        open_to_others(folder)
        self.reward.tokenizer.save_pretrained(folder)
        if self.reward.normalizer is not None:
            self.reward.normalizer.save(folder)


def _gap(one: Sample, score: float | None, other: Sample, other_score: float | None) -> float | None:
    """By how much the first is better, with what both lose for their lengths; None where one has no gold score."""
    if score is None or other_score is None:
        return None
    return (score - one.penalty) - (other_score - other.penalty)
