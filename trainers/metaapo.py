"""MetaAPO: DPO on offline pairs and on pairs of the policy's own, mixed by a learned weight (Yang et al. 2025, arXiv
2509.23371).

The rows are pairs. A small network h says of each, from how the policy ranks it already, what it counts: w = h(...). A
prompt is answered anew with probability 1 - w, the best and the worst answer become its online pair, and the loss is
w L_off + (1 - w) L_on. Every few steps h learns to give weight to the pair with the smaller loss.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from align.distributed.checkpoints import flush_files
from align.errors import ConfigError
from align.modeling.completions import completion_logps
from align.modeling.load import load_policy
from align.objectives.meta_apo import meta_mixture
from align.rollout.seeds import derive_seed
from align.trainers.core.experts import with_router_loss
from align.trainers.core.loading import loading_options
from align.trainers.on_policy.buffer import RolloutBuffer
from align.trainers.on_policy.meta_learner import MetaLearner, MetaStep
from align.trainers.on_policy.mixed_pairs import MixedPlanner, mixed_groups, offline_pairs, online_rows, with_fillers
from align.trainers.on_policy.pair_batches import PairPlanner
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample, completion_masks, completion_matrix, tokenized_pairs
from align.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer, of_loop, pairs_kept


@dataclass
class MetaAPOConfig(OnlineDPOConfig):
    """Options of online DPO, and of h. Defaults as in the released code, where it has other ones."""

    trained_together: ClassVar[int] = MixedPlanner.together

    num_generations: int = field(
        default=8, metadata={"help": "Answers to a prompt that is answered anew; the best and the worst are its pair."}
    )
    adaptive_sampling: bool = field(
        default=True,
        metadata={"help": "Answer a prompt anew with probability 1 - w, and train on these alone. false: all prompts."},
    )
    meta_learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of h (AdamW)."})
    meta_every: int = field(default=8, metadata={"help": "Optimiser steps of the policy per step of h."})
    meta_learner: str | None = field(
        default=None, metadata={"help": "output_dir of an earlier run, whose h this one begins with."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference: a folder or hub name. Default: the policy as it starts."}
    )
    old_policy_share: float = of_loop(0.0, "online_dpo: h looks at log-ratios to the one reference")
    dynamic_sampling_rounds: int = of_loop(0, "adaptive_sampling, which chooses the prompts")
    chat_template_kwargs: dict[str, Any] | str | None = of_loop(None, "a column chat_template_kwargs of the rows")


class MetaAPOTrainer(OnlineDPOTrainer):
    """Arguments as those of `OnlineDPOTrainer`. `train_dataset` has pairs (prompt, chosen, rejected); `eval_dataset`
    prompts."""

    _tag_names = ["align", "metaapo"]
    paper = "Yang et al. 2025, arXiv 2509.23371"
    config_class = MetaAPOConfig
    planner_class: ClassVar[type[PairPlanner]] = MixedPlanner
    tokenized_rows = staticmethod(tokenized_pairs)
    args: MetaAPOConfig
    planner: MixedPlanner

    def __init__(self, model, reward=None, args=None, *further, ref_model=None, **options):
        path = None if args is None else args.ref_model_name_or_path
        if path is not None and ref_model is not None:
            raise ConfigError("the reference is given twice, as ref_model and as ref_model_name_or_path: leave one out")
        if path is not None:
            ref_model = load_policy(path, sharded=True, **loading_options(args, path))
        if ref_model is not None:
            options["ref_model"] = ref_model
        super().__init__(model, reward, args, *further, **options)
        if self.episodes is not None:
            raise ConfigError(
                "MetaAPO's prompts have offline answers of one turn: it takes no tools and no environment"
            )
        self.meta = MetaLearner(learning_rate=self.args.meta_learning_rate, every=self.args.meta_every)
        if self.args.meta_learner is not None:
            self.meta.load(self.args.meta_learner)
        self.add_callback(MetaStep(self.meta, self.recorder))

    # ---- from rows to pairs ------------------------------------------------------------------------------------------

    def make_rollout(self, prompts: list[dict], indices: list[int]) -> RolloutBuffer:
        """From rows to offline and online pairs that know their log-probs under the reference."""
        args, step = self.args, self.state.global_step
        offline = offline_pairs(prompts, step)
        size = MixedPlanner.together * args.train_batch_size
        parts = self.planner.plan_forward(offline, size)
        self.fill_logps(parts)
        drawn = [True] * len(prompts)
        if args.adaptive_sampling:
            drawn = self.choose(offline, parts, indices)
        for one in drawn:
            self.record("meta/drawn", one)
        rollout = self.sample_some(prompts, indices, drawn)
        found = self.rank(rollout)
        if "pairs/without_signal" in found:
            found["pairs/without_signal"] = of_drawn(found["pairs/without_signal"], drawn)
        self.metrics.all(found)
        self.shown.keep(of_drawn(rollout.samples, drawn))
        online = self.pairs_of(rollout, indices)
        self.record_lengths(online)
        samples = mixed_groups(offline, online)
        self.fill_logps(self.planner.plan_forward(self.planner.new_pairs(samples), size))
        return RolloutBuffer.of(samples, args.num_mini_batches, args.seed, step)

    def choose(self, offline: list[Sample], parts: list[list[Sample]], indices: list[int]) -> list[bool]:
        """Which prompts are answered anew: U(0, 1) > w, by the policy and h as they are. offline: two samples of each
        prompt, with their log-probs under the reference. parts: the same in micro-batches."""
        with self.phase("old_logps"):
            self.forward.fill(parts, "old_logps", self.forward.policy_logps(self.model))
        halves = offline[::2] + offline[1::2]
        logps, reference = completion_matrix(halves, "old_logps"), completion_matrix(halves, "ref_logps")
        for sample in offline:
            sample.old_logps = None
        weights = self.meta.weights(self.objective.pairs(logps, completion_masks(halves), reference).delta)
        seeds = (derive_seed(self.args.seed, "drawn", self.state.global_step, index) for index in indices)
        return [np.random.default_rng(seed).random() > w for seed, w in zip(seeds, weights.tolist(), strict=True)]

    def sample_some(self, prompts: list[dict], indices: list[int], drawn: list[bool]) -> ScoredRollout:
        """The scored samples of the drawn prompts; of the others as many that are left out, so that all processes have
        the same number."""
        places = [i for i, one in enumerate(drawn) if one]
        asked = places or [0]  # engines whose processes draw together want a prompt of each
        rollout = self.sample_rollout([prompts[i] for i in asked], [indices[i] for i in asked])
        return with_fillers(rollout, prompts, places, self.state.global_step)

    # ---- the loss ----------------------------------------------------------------------------------------------------

    @with_router_loss(lambda batch, args: int(pairs_kept(batch["completion_mask"]).sum()) // 2)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logps, entropy = completion_logps(model, inputs, temperature=self.args.temperature, return_entropy=True)
        own = online_rows(len(logps)).to(logps.device)  # offline answers are not the policy's: no check, no metrics
        written = {**inputs, **{name: inputs[name][own] for name in ("completion_mask", "engine_logps", "ref_logps")}}
        if self.state.global_step % self.args.steps_per_rollout == 0:
            self.check_logps(logps[own].detach(), written)
        self.metrics.update(logps[own].detach(), entropy[own], written)
        pairs = self.kept_pairs(logps, inputs)
        found = self.objective(pairs)
        (offline, online), deltas = halves(found.losses), halves(pairs.delta)
        weights = self.meta.weights(deltas[0])
        self.meta.keep(deltas[0], offline, online)
        losses = meta_mixture(offline, online, weights)
        if len(losses):
            found.metrics |= {"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected}
            self.record_pairs(found.values(), weights)
        # the count is of all ranks, and DDP averages over them
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def record_pairs(self, values: dict[str, Tensor], weights: Tensor) -> None:
        """What the log has of online DPO, of the online pairs, and of the offline ones beside them."""
        count = len(weights)
        self.record("meta/weight", weights.mean(), count)
        for name, column in values.items():
            offline, online = (half.float().mean() for half in halves(column))
            self.record("online/loss" if name == "loss" else name, online, count)
            if name in ("loss", "rewards/margins", "rewards/accuracies"):
                self.record(f"offline/{name.removeprefix('rewards/')}", offline, count)

    # ---- files -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict:
        return {**super().extra_state(), "meta": self.meta.state_dict()}

    def load_state(self, state: dict, folder: Path) -> None:
        super().load_state(state, folder)
        self.meta.load_state_dict(state["meta"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            self.meta.save(folder)
            flush_files(folder)


def of_drawn(values: list, drawn: list[bool]) -> list:
    """Those of the prompts that were answered anew. values: as many of each prompt, side by side."""
    each = len(values) // len(drawn)
    return [value for i, value in enumerate(values) if drawn[i // each]]


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of the offline and of the online pairs, [2B] -> [B] each."""
    middle = len(values) // 2
    return values[:middle], values[middle:]
