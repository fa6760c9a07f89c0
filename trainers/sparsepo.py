"""SparsePO (token weights learned with the policy) and MaPO (token weights from the reference's activations)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from align.data.endless import EndlessRows
from align.errors import ConfigError, TrainingError
from align.evaluation import masks as mask_reports
from align.evaluation.strict_json import write_json
from align.modeling.activation_masks import architecture, groups_of
from align.modeling.adapters import named_base
from align.modeling.load import source_of
from align.modeling.logprobs import language_model
from align.modeling.pairs import PairTokens
from align.modeling.token_masks import TokenMasks, read_masks
from align.objectives.pair_losses import PairLosses
from align.objectives.sparse_po import implicit_rewards, masked_sums, sparse_po_loss
from align.trainers.masks.forward import MaskedForward, MaskedTokens, masks_of_pairs, own_weights
from align.trainers.masks.metrics import by_side, mask_metrics
from align.trainers.masks.networks import PREFIX, new_masks, policy_weights, separate_groups, write_masks
from align.trainers.masks.options import MaskOptions
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.preference import PreferenceTrainer


@dataclass
class SparsePOConfig(MaskOptions, PreferenceConfig):
    """Options of SparsePO and MaPO."""


class SparsePOTrainer(PreferenceTrainer):
    """TDPO1 with a weight on every token, separately for reward and divergence.

    Learned masks are a submodule `token_masks` of the model, so that they are moved, wrapped and clipped with it. They
    are trained beside full weights and adapters alike, and written to a file of their own, token_masks.safetensors, in
    checkpoints and beside the trained model, whose own files do not hold them: a policy needs no mask to generate.
    """

    _tag_names = ["align", "sparsepo"]
    paper = "Christopoulou et al. 2024, arXiv 2410.05102"
    args: SparsePOConfig
    config_class = SparsePOConfig
    needs_reference_model = True

    def __init__(
        self,
        model: str | nn.Module,
        args: SparsePOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        optimizers=(None, None),
        **kwargs,
    ):
        args = self.options(args, model, train_dataset)
        if optimizers[0] is not None and args.variant != "mapo":
            raise ConfigError("the masks are made with the trainer, so an optimizer made before cannot train them")
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, optimizers=optimizers, **kwargs)
        core = language_model(self.held_reference.model)
        self.masks: TokenMasks | None = None
        if args.variant == "mapo":
            architecture(core)
        else:
            # made after the reference, which is a copy of the model: it must not hold them
            self.masks = new_masks(args, core, args.seed).to(args.device)
            self.model.add_module(PREFIX, self.masks)
        self.masked = MaskedForward(
            self.held_reference,
            self.masks,
            self.accelerator.autocast,
            layers=args.mask_layers or "all",
            groups=() if args.mask_activations is None else groups_of(args.mask_activations),
            on_reward=args.mask_on_reward,
            on_kl=args.mask_on_kl,
        )

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[MaskedTokens, PairTokens]:
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return self.masked(model, inner, batch, chunk_size=self.args.chunk_size)

    def _checked(self, tokens: MaskedTokens) -> MaskedTokens:
        return tokens if type(self).forward is SparsePOTrainer.forward else own_weights(tokens, self)

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        assert isinstance(policy, MaskedTokens) and reference is not None  # of `forward`
        policy = self._checked(policy)
        assert policy.kl is not None
        beta = self.args.beta
        sums = masked_sums(policy.logps - reference.logps, policy.kl, policy.mask, policy.m_u, policy.m_d)
        halves = zip(*(value.chunk(2) for value in vars(sums).values()), strict=True)
        chosen, rejected = (type(sums)(*values) for values in halves)
        metrics = {
            **by_side("logps", policy.logps.sum(-1)),
            **by_side("kl", policy.kl.sum(-1)),
            **by_side("masked_kl", sums.d),
            **mask_metrics("mask_u", policy.m_u, policy.mask),
            **mask_metrics("mask_d", policy.m_d, policy.mask),
        }
        return PairLosses(
            sparse_po_loss(chosen, rejected, beta=beta, **self.args.l1),
            implicit_rewards(chosen, beta),
            implicit_rewards(rejected, beta),
            metrics,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        norms = [value for name, value in logs.items() if name.startswith(("mask_u_l1/", "mask_d_l1/"))]
        if norms and not any(norms) and self.args.mask_on_reward:  # else the log-ratios have weight 1
            raise TrainingError(
                f"every mask is 0 at every token of the last {self.args.logging_steps:g} steps, up to step "
                f"{self.state.global_step}: nothing is trained any more. Lower mask_learning_rate, mask_l1_reward or "
                "mask_l1_kl, and start from the last checkpoint before"
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.masks is not None:
            separate_groups(
                optimizer,
                model or self.model,
                weight_decay=self.args.mask_weight_decay or 0.0,
                learning_rate=self.args.mask_learning_rate,
            )
        return optimizer

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def picture(self) -> dict | None:
        """The masks of the first `num_logged_pairs` evaluation pairs (training pairs without any), for
        `align.evaluation.masks`. All processes take part."""
        pairs = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(pairs, dict):  # the first of several sets
            pairs = next(iter(pairs.values()))
        count = self.args.num_logged_pairs
        streamed = isinstance(pairs, EndlessRows)
        rows = (pairs.first(count) if streamed else pairs.select(range(min(count, len(pairs))))).to_list()
        if not rows:
            return None
        batch = self._prepare_inputs(self.planner.collate(rows))
        tokens = self._checked(masks_of_pairs(self.forward, self.model_wrapped, batch))
        return mask_reports.picture(rows, self.processing_class, tokens.m_u, tokens.m_d)

    def log_pairs(self, name: str | None) -> None:
        super().log_pairs(name)
        if seen := self.picture():
            self.log_table("masks", *mask_reports.tracker_rows(seen, self.state.global_step))
            self.log_figure("eval/masks", mask_reports.mask_figure(seen))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ever; the masks of some pairs are then in masks.html and, for reports, masks.json."""
        output = super().train(resume_from_checkpoint, **kwargs)
        if (seen := self.picture()) and self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_json(folder / mask_reports.FILE_NAME, seen)
            title = f"Token masks of {self.args.run_name or folder.name}"
            intro = f"{len(seen['pairs'])} pairs after step {self.state.global_step}; {self.args.variant} masks."
            mask_reports.write_page(folder / mask_reports.PAGE, seen, title=title, intro=intro)
        return output

    # ---- files ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        state = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        super()._save(str(folder), policy_weights(state))
        if self.args.should_save:
            reference = named_base(source_of(language_model(self.held_reference.model)))
            write_masks(folder, self.args, self.masks, state, reference)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_masks(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if not key.startswith(f"{PREFIX}.")]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_masks(self.state.best_model_checkpoint)

    def _load_masks(self, checkpoint: str) -> None:
        # sharded weights were saved, and are loaded, with the masks among them
        if self.masks is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.masks.load_state_dict(read_masks(checkpoint)[1])
