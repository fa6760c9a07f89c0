"""Loading policies, tokenizers, sequence classifiers and references, adapters (PEFT) included."""

import copy
import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from align.distributed.shards import is_zero3, zero3_twin
from align.distributed.shells import copied, release
from align.errors import ConfigError
from align.modeling.adapters import (
    adapter_base,
    adding_lora,
    attached,
    by_names,
    check_stack,
    fit_base,
    is_adapter,
    split,
    task_of,
)
from align.modeling.dequantize import keep_ordinary
from align.modeling.logprobs import language_model, token_logps
from align.modeling.merged import load_merged
from align.modeling.mistral_tokenizer import as_transformers_own
from align.modeling.padding import fit_padding
from align.modeling.pretrained import (
    check_one_label,
    from_pretrained,
    keep_4_bit_layers_differentiable,
    load_whole,
    loading_options,
    only_errors_from_transformers,
    refuse_loading_options,
)
from align.modeling.rotary import share_factors
from align.modeling.score_head import head_name
from align.modeling.shared_prefix import compute_soft_caps
from align.modeling.text_part import adapter_of_text, freeze_unreached, never_trained
from align.modeling.types import Model
from align.modeling.weights_digest import weights_digest

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def load_tokenizer(model: str | Path | Model, **kwargs):
    """The tokenizer of a folder, a hub name or a loaded model.

    Without a padding token it pads with the end token. An encoder's CLS and SEP serve as BOS and EOS where it has none.
    """
    from transformers import AutoTokenizer

    source = str(model) if isinstance(model, (str, Path)) else model.config.name_or_path
    if not source:
        raise ConfigError("the model was not loaded from anywhere: pass its tokenizer as processing_class")
    tokenizer = from_pretrained(AutoTokenizer, source, "tokenizer", **kwargs)
    tokenizer = as_transformers_own(tokenizer, source, kwargs.get("revision"))
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source} has no end-of-sequence token: completions could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fit_padding(tokenizer, model, **kwargs)
    return tokenizer


def load_policy(
    model: str | Path | Model,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    peft_config=None,
    adapter_seed: int | None = None,
    sharded: bool = False,
    **kwargs,
) -> Model:
    """A causal language model, ready to train.

    Args:
        model: a folder, a hub name or a loaded model (then the loading options must be left out). A folder that holds a
            LoRA adapter is loaded with its base and merged: the merged model is what training starts from, and so what
            the reference is. A new adapter on it is saved together with the first one, as their sum
            (align.modeling.adapters).
        dtype: of the weights; None is float32, so that small updates are not rounded away (mixed precision is the
            trainer's `bf16`), except with `peft_config` on a GPU, where the frozen weights stay as they were saved.
        peft_config: a `peft.PeftConfig`; the model comes back wrapped, its adapter trainable.
        adapter_seed: with which that adapter is drawn, whatever loading has drawn before; None: as random numbers come.
        sharded: FSDP may send the weights from the main process, and no other one needs to read them.
        kwargs: passed to `from_pretrained` (revision, trust_remote_code, quantization_config, device_map ...).
    """
    from transformers import AutoModelForCausalLM

    if isinstance(model, nn.Module):
        refuse_loading_options(dtype, attn_implementation, kwargs)
        train_in_float32(model, adapter=peft_config is not None)
    else:
        options = loading_options(dtype, attn_implementation, peft_config, kwargs) | {"sharded": sharded}
        load = load_merged if is_adapter(model) else load_whole
        model = load(AutoModelForCausalLM, str(model), options)
    keep_4_bit_layers_differentiable(model)
    freeze_unreached(language_model(model))
    compute_soft_caps(language_model(model), attn_implementation)
    return _with_adapter(model, peft_config, adapter_seed)


def source_of(model: Model) -> str:
    """The folder or hub name that a transformers model was loaded from: that of the adapter which was merged into it,
    where one was, and not its base's."""
    start = vars(model).get("adapter_start")
    return model.config.name_or_path if start is None else start.folder


def load_adapted(folder: str | Path, *, dtype: str | torch.dtype | None = None) -> Model:
    """The policy of an adapter's folder with its adapter not merged, frozen. With the adapter off it is the policy that
    the training of the adapter started from."""
    from peft import PeftConfig, PeftModel

    base = load_policy(adapter_base(folder), dtype=dtype)
    fit_base(base, folder)
    start, trained = split(folder)
    if not start:
        return PeftModel.from_pretrained(base, str(folder))
    config = PeftConfig.from_pretrained(str(folder))
    core = attached(base, config, start).merge_and_unload()
    return attached(core, config, trained).requires_grad_(False)


def load_backbone(source: str | Path, *, dtype: str | torch.dtype = "float32", sharded: bool = False) -> Model:
    """The transformer under the head of a causal model or a classifier, from a folder (of an adapter too) or hub
    name. sharded: as in `load_policy`."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if is_adapter(source):
        if task_of(source) != "SEQ_CLS":
            whole = load_merged(AutoModelForCausalLM, str(source), {"dtype": dtype, "sharded": sharded})
        else:
            options = {"dtype": dtype, "num_labels": 1, "sharded": sharded}
            whole = load_merged(AutoModelForSequenceClassification, str(source), options, head_seed=0)
        model = whole.base_model
    else:
        with only_errors_from_transformers():  # the head that is left out is expected
            model = from_pretrained(AutoModel, str(source), "model", dtype=dtype, sharded=sharded)
    compute_soft_caps(model)
    return model


def load_sequence_classifier(
    model: str | Path | Model,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    peft_config=None,
    adapter_seed: int | None = None,
    pad_token_id: int | None = None,
    head_seed: int = 0,
    fresh_head: bool = True,
    sharded: bool = False,
    **kwargs,
) -> Model:
    """A model with one scalar output (`AutoModelForSequenceClassification`, num_labels=1), causal or encoder.

    A head that the checkpoint does not hold is drawn from N(0, 1/(d+1)), d its input width (Stiennon et al. 2020), with
    `head_seed`: members of an ensemble differ in it. A head that the checkpoint holds is left alone; with
    `fresh_head=False` it must hold one. `pad_token_id` is set in the config where it has none. With `peft_config` the
    head is trained and saved in full beside the adapter. Raises `ConfigError` for a checkpoint with more than one
    label, or without a head where it must have one. The rest as in `load_policy`.
    """
    from transformers import AutoModelForSequenceClassification

    if isinstance(model, nn.Module):
        refuse_loading_options(dtype, attn_implementation, kwargs)
        train_in_float32(model, adapter=peft_config is not None)
    else:
        source, options = str(model), loading_options(dtype, attn_implementation, peft_config, kwargs)
        check_one_label(source, kwargs)
        load = load_merged if is_adapter(source) else load_whole
        model = load(
            AutoModelForSequenceClassification,
            source,
            {**options, "num_labels": 1, "sharded": sharded},
            head_seed=head_seed if fresh_head else None,
        )
    keep_4_bit_layers_differentiable(model)
    freeze_unreached(language_model(model))
    compute_soft_caps(language_model(model), attn_implementation)
    head = head_name(model).split(".")[0]
    text_config = cast("Model", model).config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad_token_id
    if peft_config is not None:
        peft_config = copy.deepcopy(peft_config)
        if not hasattr(peft_config, "modules_to_save"):
            raise ConfigError(
                f"{type(peft_config).__name__} has no modules_to_save, so that the score head would not be saved with "
                "the adapter: use LoRA"
            )
        peft_config.task_type = "SEQ_CLS"
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), head})
    return _with_adapter(model, peft_config, adapter_seed)


def train_in_float32(model: Model, *, adapter: bool) -> None:
    """Hold the weights that will be trained in float32, in place: an update of a learning rate as 1e-6 is smaller than
    the gap between two bfloat16 numbers, and most weights would never move. Mixed precision (`bf16`) computes in
    bfloat16 nevertheless. adapter: one will be added, and the weights that are there stay frozen, as they are."""
    _check_doubles(model)
    keep_ordinary(language_model(model))
    if adapter or vars(model).get("is_quantized") or is_zero3(model.parameters()):  # DeepSpeed holds float32 copies
        return
    half = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALF}
    if half:
        ours = {id(p) for p in never_trained(language_model(model))}
        if any(not p.requires_grad and id(p) not in ours for p in model.parameters()):
            raise ConfigError(
                f"some weights are frozen and others are to be trained in {half.pop()}, where small updates are "
                "rounded away: load the model in float32"
            )
        logger.warning("the model was loaded in %s: its weights are trained, and so held, in float32", half.pop())
        model.float()


def _check_doubles(model: Model) -> None:
    """ConfigError for a model of which a part alone is in float64: torch has no product of two dtypes, and ends the
    first pass."""
    of_each: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            of_each.setdefault(parameter.dtype, name)
    if torch.float64 in of_each and len(of_each) > 1:
        found = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in of_each.items())
        raise ConfigError(f"the model has weights in {found}: make them one dtype first, with model.float()")


def hold_modules_in_float32(model: Model, *, autocast: bool) -> None:
    """The same for what is trained in full under an adapter on 16-bit weights (the head of a reward model,
    `modules_to_save`), which PEFT leaves in their dtype. autocast: whether the run computes in mixed precision; without
    it only a head of scores can be of another dtype than the layers before it, and ConfigError is raised for others."""
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype in HALF]
        if not own:
            continue
        head = isinstance(module, nn.Linear) and module.out_features == 1
        if not (autocast or head or "lora_" in name):
            raise ConfigError(
                f"{name} would be trained in {own[0].dtype}, where small updates are rounded away: load the model in "
                "float32, or set bf16: true, with which it is held in float32"
            )
        for parameter in own:
            parameter.data = parameter.data.float()
        if head and not autocast:
            module.register_forward_pre_hook(lambda module, args: tuple(x.to(module.weight.dtype) for x in args))


class Reference:
    """The frozen policy that KL is measured to: a copy, a model given, or the policy with its adapter switched off.

    digest: of the weights of a model of its own, from `prepare` on.
    """

    def __init__(self, model: Model, *, adapter_off: bool):
        self.model = model
        self.adapter_off = adapter_off
        self.digest: str | None = None

    def prepare(self, accelerator) -> None:
        """Place a model of its own like the policy (device, precision, shards). Nothing to do for an adapter."""
        from accelerate.utils import DistributedType

        if self.adapter_off:
            return
        self.digest = weights_digest(self.model, adapters=True)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from trl.models import prepare_deepspeed

            self.model = prepare_deepspeed(self.model, accelerator)
        elif accelerator.is_fsdp2:
            from align.distributed.fsdp2 import prepare_fsdp2

            # trl's prepare_fsdp shards what each process holds: zeros where only the main one has read the weights
            self.model = prepare_fsdp2(accelerator, self.model)
        elif accelerator.distributed_type == DistributedType.FSDP:
            from trl.models import prepare_fsdp

            self.model = prepare_fsdp(self.model, accelerator)
        else:
            release(self.model)
            held = len(accelerator._models)
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
            # transformers prepares a policy that is evaluated before it is trained only where nothing is held
            del accelerator._models[held:]

    def logps(
        self, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None
    ) -> Tensor:
        """As `token_logps`, under the reference: [B, T-1]."""
        with self.active() as model:
            return token_logps(model, input_ids, attention_mask, temperature=temperature, mask=mask)

    @contextmanager
    def active(self):
        """The model that is the reference, for whatever runs inside: in eval mode, adapter off, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), without_adapter(self.model) if self.adapter_off else nullcontext():
                yield self.model
        finally:
            self.model.train(training)


@contextmanager
def without_adapter(model: Model):
    """PEFT's `disable_adapter`, with the adapter's parameters left trainable.

    FSDP2 takes the dtype that it reduces a layer's gradients to from what is trainable at the first forward pass. Where
    that is the reference's, the float32 gradients of an adapter would come out of mixed precision in bfloat16, and be
    refused."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with model.disable_adapter():
        for p in trained:
            p.requires_grad_(True)
        yield


def reference_of(model: Model, ref_model: str | Path | Model | None = None) -> Reference:
    """The reference of a policy that has not been trained yet.

    `ref_model` if given; else for a PEFT model itself with the adapter off; else a frozen copy of it.
    """
    from peft import PeftModel

    if ref_model is model:
        raise ConfigError(
            "ref_model is the policy itself, and would be frozen with it: leave it out, and the policy as it is now is "
            "the reference",
            key="ref_model",
        )
    if ref_model is None and isinstance(model, PeftModel):
        return Reference(model, adapter_off=True)
    return Reference(freeze_copy(model) if ref_model is None else _frozen(load_policy(ref_model)), adapter_off=False)


def freeze_copy(model: Model, dtype: torch.dtype | None = None) -> Model:
    """A copy of the model that no optimiser can change, in eval mode; dtype: of its weights, None: as they are."""
    if is_zero3(model.parameters()):
        twin = zero3_twin(language_model(model))
        share_factors(twin, model)
        return _frozen(twin)
    twin = _frozen(copied(model, dtype))
    if dtype is not None:
        language_model(twin).config.dtype = dtype
    return twin


def _frozen(model: Model) -> Model:
    return model.eval().requires_grad_(False)


def _with_adapter(model: Model, peft_config, seed: int | None) -> nn.Module:
    if peft_config is None:
        return model
    from peft import PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import set_seed

    if isinstance(model, PeftModel):
        raise ConfigError("the model already has an adapter: leave peft_config out, or merge it first")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):  # PEFT would draw that one anew
        raise ConfigError(
            "layers of the model have an adapter already, of a trainer that was given the same object: load the model "
            "anew, or give the other trainer's model, merged (`trainer.model.merge_and_unload().requires_grad_(True)`)"
        )
    peft_config = by_names(peft_config)
    check_stack(model, peft_config)
    peft_config = adapter_of_text(model, peft_config)
    if seed is not None:  # under FSDP the main process alone draws a head that the checkpoint has not, while it loads
        set_seed(seed)
    with adding_lora(model):
        return get_peft_model(model, peft_config)
