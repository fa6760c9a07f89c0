"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family, from a table of losses.

What the losses are is in `align.objectives.preference` (the table) and docs/losses.md; this file connects them to the
loop.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.pairs import PairTokens, pair_tokens, pair_tokens_with_kl
from align.objectives.pair_logps import wpo_weights
from align.objectives.pair_losses import PairLosses
from align.objectives.preference_objective import PreferenceObjective
from align.trainers.core.trl_options import TrlDPOOptions
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.loss_options import PairLossOptions
from align.trainers.pairs.preference import PreferenceTrainer


@dataclass
class DPOConfig(TrlDPOOptions, PairLossOptions, PreferenceConfig):  # type: ignore[misc]  # beta: or None
    """Options of DPO and its variants, with TRL's names."""

    def __post_init__(self):
        super().__post_init__()
        objective = self.objective()
        self.check_together(objective)
        needs_reference = objective.needs_reference
        if self.sync_ref_model and (not needs_reference or self.precompute_ref_log_probs):
            raise ConfigError(
                "sync_ref_model: this run holds no reference that could move: leave it out, or "
                "precompute_ref_log_probs where that is set",
                key="sync_ref_model",
            )

    def check_evaluated_together(self, objective: PreferenceObjective) -> None:
        """As `check_together`, of evaluations, in which beta-DPO compares none."""
        for term in objective.terms:
            if term.loss.across_pairs and term.loss.state is None and self.eval_batch_size < 2:
                raise ConfigError(
                    f"loss_type: {term.name} compares the pairs of a batch, and per_device_eval_batch_size is 1: "
                    "set it to 2 or more",
                    key="per_device_eval_batch_size",
                )

    def check_together(self, objective: PreferenceObjective) -> None:
        """ConfigError for a loss that compares pairs, and has one at a time: it would be another loss, in silence."""
        if self.eval_strategy != "no" or self.eval_on_start:
            self.check_evaluated_together(objective)
        for term in objective.terms:
            processes = 1 if term.loss.state is None else self.world_size  # `PreferenceObjective.draw` gathers
            if term.loss.across_pairs and self.train_batch_size * processes < 2:
                raise ConfigError(
                    f"loss_type: {term.name} compares the pairs of a micro-batch, and per_device_train_batch_size is "
                    "1: set it to 2 or more, and gradient_accumulation_steps lower",
                    key="per_device_train_batch_size",
                )

    def holds_reference(self, adapter: bool) -> bool:
        return self.objective().needs_reference and super().holds_reference(adapter)


class DPOTrainer(PreferenceTrainer):
    """Train on preference pairs with the losses of `args.loss_type`.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: preference pairs in TRL's formats (docs/data.md), or the output of
            `tokenize_pairs`.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        peft_config: trains an adapter.
    """

    _tag_names = ["align", "trl", "dpo"]
    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    args: DPOConfig
    config_class = DPOConfig
    masks_turns = True

    @cached_property
    def objective(self) -> PreferenceObjective:
        return self.args.objective()

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    @property
    def needs_reference_model(self) -> bool:
        return self.objective.needs_kl

    @property
    def across_pairs(self) -> bool:
        return self.objective.across_pairs

    def evaluation_loop(self, *args, **kwargs):  # of `evaluate` and `predict`, whenever called
        self.args.check_evaluated_together(self.objective)
        return super().evaluation_loop(*args, **kwargs)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[PairTokens, PairTokens | None]:
        chunk_size, squares = self.args.chunk_size, self.objective.use_weighting
        if self.objective.needs_kl:
            return pair_tokens_with_kl(model, self.held_reference, batch, chunk_size=chunk_size, sum_squares=squares)
        policy = pair_tokens(model, batch, chunk_size=chunk_size, sum_squares=squares)
        return policy, self.reference_tokens(batch) if self.needs_reference else None

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        objective = self.objective
        ref_logps = None if reference is None else reference.logps
        pairs = objective.pairs(policy.logps, policy.mask, ref_logps, policy.kl, batch["mean_chosen_length"])
        draws = objective.draw(pairs, self._gather) if self.model.training else None
        weights = None
        if policy.log_sum_sq_probs is not None:  # with use_weighting
            weights = wpo_weights(policy.logps, policy.log_sum_sq_probs, policy.mask)
        found = objective(pairs, weights, draws)
        found.metrics |= {"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected}
        if pairs.chosen_kl is not None and pairs.rejected_kl is not None:
            found.metrics |= {"kl/chosen": pairs.chosen_kl, "kl/rejected": pairs.rejected_kl}
        return found

    def _gather(self, values: Tensor) -> tuple[list[Tensor], int]:
        return gather_object([values.cpu()]), self.args.process_index

    def own_parts(self) -> dict[str, Any]:
        return {**super().own_parts(), "loss_type": self.objective.functions}

    def extra_state(self) -> dict:
        states = {name: state.state_dict() for name, state in self.objective.states.items()}
        return {**super().extra_state(), "losses": states}

    def restore_state(self, state: dict) -> None:
        super().restore_state(state)
        for name, loss_state in self.objective.states.items():
            loss_state.load_state_dict(state["losses"][name])
