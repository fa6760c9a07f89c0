"""SparsePO (token weights learned with the policy) and MaPO (token weights from the reference's activations)."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from align.errors import ConfigError, TrainingError
from align.evaluation import masks
from align.evaluation.strict_json import write_json
from align.modeling.activation_masks import architecture, groups_of, watch_activations
from align.modeling.load import Reference
from align.modeling.logprobs import language_model
from align.modeling.pairs import Completions, PairTokens, completions, pair_tokens_with_kl
from align.modeling.token_masks import (
    MaskSettings,
    TokenMasks,
    describe_masks,
    read_masks,
    save_masks,
    watch_states,
)
from align.objectives.sparse_po import implicit_rewards, masked_sums, sparse_po_loss, sparsity
from align.trainers.pairs.loop import PreferenceTrainer
from align.trainers.pairs.mask_options import SparsePOConfig

PREFIX = "token_masks"


@dataclass
class MaskedTokens(PairTokens):
    """The policy's tokens with their weights m_u and m_d, [2B, L] each; None is weight 1."""

    m_u: Tensor | None = None
    m_d: Tensor | None = None


class Watched:
    """A reference that is looked into while it runs. `seen` is what `watch` yielded, `inside` whether it is running."""

    def __init__(self, reference: Reference, watch, autocast):
        self.reference = reference
        self.watch = watch
        self.autocast = autocast
        self.seen = None
        self.inside = False

    @contextmanager
    def active(self):
        with self.reference.active() as model, self.autocast(), self.watch(language_model(model)) as self.seen:
            self.inside = True
            try:
                yield model
            finally:
                self.inside = False


class SparsePOTrainer(PreferenceTrainer):
    """TDPO1 with a weight on every token, separately for reward and divergence.

    Learned masks are a submodule `token_masks` of the model, so that they are moved, wrapped and clipped with it. They
    are trained beside full weights and adapters alike, and written to a file of their own, token_masks.safetensors, in
    checkpoints and beside the trained model, whose own files do not hold them: a policy needs no mask to generate.
    """

    _tag_names = ["align", "sparsepo"]
    needs_reference_model = True

    def __init__(
        self,
        model: str | nn.Module,
        args: SparsePOConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        ref_model: str | nn.Module | None = None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        if optimizers[0] is not None and args.variant != "mapo":
            raise ConfigError("the masks are made with the trainer, so an optimizer made before cannot train them")
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            ref_model=ref_model,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        core = language_model(self.reference.model)
        self.masks: TokenMasks | None = None
        if args.variant == "mapo":
            architecture(core)
        else:
            # made after the reference, which is a copy of the model: it must not hold them
            self.masks = self._new_masks(core).to(args.device)
            self.model.add_module(PREFIX, self.masks)

    def _new_masks(self, reference: nn.Module) -> TokenMasks:
        args, config = self.args, reference.config.get_text_config()
        settings = MaskSettings(
            variant=args.variant,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            layers=args.mask_layers,
            mlp_size=args.mask_mlp_size,
            dropout=args.mask_dropout,
            on_reward=args.mask_on_reward,
            on_kl=args.mask_on_kl,
        )
        masks = TokenMasks(settings).initialise(args.mask_init, args.seed)
        return masks.double() if reference.dtype == torch.float64 else masks

    # ---- forward and loss -------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[MaskedTokens, PairTokens]:
        args, places = self.args, completions(batch)

        def watch(core):
            if self.masks is None:
                return watch_activations(core, places, groups_of(args.mask_activations))
            return watch_states(core, places, args.mask_layers)

        watched = Watched(self.reference, watch, self.accelerator.autocast)
        with nullcontext() if self.masks is None else self._masks_in(watched, places) as weights:
            policy, reference = pair_tokens_with_kl(model, watched, batch, chunk_size=args.chunk_size)
        if self.masks is None:
            mask = watched.seen.mask()
            m_u, m_d = (mask if on else None for on in (args.mask_on_reward, args.mask_on_kl))
        else:
            m_u, m_d = weights["masks"]
        return MaskedTokens(**vars(policy), m_u=m_u, m_d=m_d), reference

    @contextmanager
    def _masks_in(self, watched: Watched, places: Completions):
        """A dict that holds the masks once the policy has run. The networks run inside the policy's own forward pass
        and are part of its output: DDP takes parameters that it cannot reach from there for unused, and FSDP has their
        weights together only there."""
        kept = {}

        def run(module, args, output):
            if watched.inside:  # an adapter's reference is the same module
                return
            with self.accelerator.autocast():
                kept["masks"] = self.masks(watched.seen, places.mask)
            output.hidden_states = tuple(m for m in kept["masks"] if m is not None)

        # prepended: the wrappers' own hooks must see the output with the masks
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        hook = inner.register_forward_hook(run, prepend=True)
        try:
            yield kept
        finally:
            hook.remove()

    def losses(
        self, policy: MaskedTokens, reference: PairTokens, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta = self.args.beta
        sums = masked_sums(policy.logps - reference.logps, policy.kl, policy.mask, policy.m_u, policy.m_d)
        halves = zip(*(value.chunk(2) for value in vars(sums).values()), strict=True)
        chosen, rejected = (type(sums)(*values) for values in halves)
        rewards = implicit_rewards(chosen, beta), implicit_rewards(rejected, beta)
        return sparse_po_loss(chosen, rejected, beta=beta, **self.args.l1), {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": rewards[0] > rewards[1],
            **by_side("logps", policy.logps.sum(-1)),
            **by_side("kl", policy.kl.sum(-1)),
            **by_side("masked_kl", sums.d),
            **mask_metrics("mask_u", policy.m_u, policy.mask),
            **mask_metrics("mask_d", policy.m_d, policy.mask),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        norms = [value for name, value in logs.items() if name.startswith(("mask_u_l1/", "mask_d_l1/"))]
        if norms and not any(norms):
            raise TrainingError(
                f"every mask is 0 at every token of the last {self.args.logging_steps:g} steps, up to step "
                f"{self.state.global_step}: nothing is trained any more. Lower mask_learning_rate, mask_l1_reward or "
                "mask_l1_kl, and start from the last checkpoint before"
            )

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def picture(self) -> dict | None:
        """The masks of the first `num_logged_pairs` evaluation pairs (training pairs without any), for
        `align.evaluation.masks`. All processes take part."""
        pairs = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        rows = pairs.select(range(min(self.args.num_logged_pairs, len(pairs)))).to_list()
        if not rows:
            return None
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            tokens, _ = self.forward(self.model_wrapped, self._prepare_inputs(self.collate(rows)))
        self.model.train(training)
        return masks.picture(rows, self.processing_class, tokens.m_u, tokens.m_d)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if {"wandb", "tensorboard"} & set(self.args.report_to) and eval_dataset is None and (seen := self.picture()):
            self.log_table("masks", *masks.tracker_rows(seen, self.state.global_step))
            self.log_figure("eval/masks", masks.mask_figure(seen))
        return metrics

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ever; the masks of some pairs are then in masks.html and, for reports, masks.json."""
        output = super().train(resume_from_checkpoint, **kwargs)
        if (seen := self.picture()) and self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_json(folder / masks.FILE_NAME, seen)
            title = f"Token masks of {self.args.run_name or folder.name}"
            intro = f"{len(seen['pairs'])} pairs after step {self.state.global_step}; {self.args.variant} masks."
            masks.write_page(folder / "masks.html", seen, title=title, intro=intro)
        return output

    # ---- optimiser --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The masks are two groups of their own: weights, which decay by mask_weight_decay, and biases and norms."""
        optimizer = super().create_optimizer(model)
        if self.masks is None:
            return optimizer
        named = [(n, p) for n, p in (model or self.model).named_parameters() if f"{PREFIX}." in n]
        mine = {id(p) for _, p in named}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
        rate = self.args.mask_learning_rate
        shared = {} if rate is None else {"lr": rate}
        for decays, weight_decay in ((True, self.args.mask_weight_decay), (False, 0.0)):
            params = [p for n, p in named if (n.endswith(".weight") and ".norm." not in n) == decays]
            optimizer.add_param_group({"params": params, "weight_decay": weight_decay, **shared})
        return optimizer

    # ---- files ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        state = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        start = f"{PREFIX}."
        super()._save(str(folder), {name: value for name, value in state.items() if not name.startswith(start)})
        reference = language_model(self.reference.model).config._name_or_path
        if self.masks is None:
            description = {
                "variant": "mapo",
                "activations": self.args.mask_activations,
                "on_reward": self.args.mask_on_reward,
                "on_kl": self.args.mask_on_kl,
                "reference": reference,
            }
        else:
            description = describe_masks(self.masks.settings, reference)
        weights = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        save_masks(folder, description, weights)

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


def by_side(name: str, values: Tensor) -> dict[str, Tensor]:
    """Values [2B] as a metric of the chosen and one of the rejected, [B] each."""
    chosen, rejected = values.chunk(2)
    return {f"{name}/chosen": chosen, f"{name}/rejected": rejected}


def mask_metrics(name: str, weights: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
    """Mean weight, share of exact zeros and L1 norm (a sum over tokens) of every completion."""
    if weights is None:
        return {}
    norms = (weights.abs() * mask).sum(-1)
    return {
        **by_side(f"{name}_mean", norms / mask.sum(-1)),
        **by_side(f"{name}_sparsity", sparsity(weights, mask)),
        **by_side(f"{name}_l1", norms),
    }
