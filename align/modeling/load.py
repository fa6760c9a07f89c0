"""Loading policies, tokenizers, sequence classifiers and references, adapters (PEFT) included."""

import copy
import logging
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from align.distributed.shards import gathered, is_zero3, zero3_twin
from align.errors import ConfigError
from align.modeling.logprobs import language_model, token_logps
from align.modeling.shared_prefix import compute_soft_caps

logger = logging.getLogger(__name__)


def load_tokenizer(model: str | Path | nn.Module, **kwargs):
    """The tokenizer of a folder, a hub name or a loaded model.

    Without a padding token it pads with the end token. An encoder's CLS and SEP serve as BOS and EOS where it has none.
    """
    from transformers import AutoTokenizer

    source = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
    if not source:
        raise ConfigError("the model was not loaded from anywhere: pass its tokenizer as processing_class")
    tokenizer = _from_pretrained(AutoTokenizer, source, "tokenizer", **kwargs)
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source} has no end-of-sequence token: completions could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    model: str | Path | nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    peft_config=None,
    sharded: bool = False,
    **kwargs,
) -> nn.Module:
    """A causal language model, ready to train.

    Args:
        model: a folder, a hub name or a loaded model (then the loading options must be left out). A folder that holds a
            LoRA adapter is loaded with its base and merged: the merged model is what training starts from, and so what
            the reference is.
        dtype: of the weights; None is float32, so that small updates are not rounded away (mixed precision is the
            trainer's `bf16`), except with `peft_config` on a GPU, where the frozen weights stay as they were saved.
        peft_config: a `peft.PeftConfig`; the model comes back wrapped, its adapter trainable.
        sharded: FSDP may send the weights from the main process, and no other one needs to read them.
        kwargs: passed to `from_pretrained` (revision, trust_remote_code, quantization_config, device_map ...).
    """
    from transformers import AutoModelForCausalLM

    if isinstance(model, nn.Module):
        _refuse_loading_options(dtype, attn_implementation, kwargs)
    else:
        options = _loading_options(dtype, attn_implementation, peft_config, kwargs) | {"sharded": sharded}
        model = _load(AutoModelForCausalLM, "AutoPeftModelForCausalLM", str(model), options)
    _keep_4_bit_layers_differentiable(model)
    compute_soft_caps(language_model(model))
    return _with_adapter(model, peft_config)


def load_backbone(source: str | Path, *, dtype: str | torch.dtype = "float32") -> nn.Module:
    """The transformer under the head of a causal model or a classifier, from a folder or hub name."""
    from transformers import AutoModel

    with _only_errors_from_transformers():  # the head that is left out is expected
        model = _from_pretrained(AutoModel, str(source), "model", dtype=dtype)
    compute_soft_caps(model)
    return model


def load_sequence_classifier(
    model: str | Path | nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    peft_config=None,
    pad_token_id: int | None = None,
    head_seed: int = 0,
    fresh_head: bool = True,
    sharded: bool = False,
    **kwargs,
) -> nn.Module:
    """A model with one scalar output (`AutoModelForSequenceClassification`, num_labels=1), causal or encoder.

    A head that the checkpoint does not hold is drawn from N(0, 1/(d+1)), d its input width (Stiennon et al. 2020), with
    `head_seed`: members of an ensemble differ in it. A head that the checkpoint holds is left alone; with
    `fresh_head=False` it must hold one. `pad_token_id` is set in the config where it has none. With `peft_config` the
    head is trained and saved in full beside the adapter. Raises `ConfigError` for a checkpoint with more than one
    label, or without a head where it must have one. The rest as in `load_policy`.
    """
    from transformers import AutoModelForSequenceClassification

    if isinstance(model, nn.Module):
        _refuse_loading_options(dtype, attn_implementation, kwargs)
    else:
        source, options = str(model), _loading_options(dtype, attn_implementation, peft_config, kwargs)
        _check_one_label(source, kwargs)
        model = _load(
            AutoModelForSequenceClassification,
            "AutoPeftModelForSequenceClassification",
            source,
            {**options, "num_labels": 1, "sharded": sharded},
            head_seed=head_seed if fresh_head else None,
        )
    _keep_4_bit_layers_differentiable(model)
    compute_soft_caps(language_model(model))
    head = head_name(model).split(".")[0]
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = pad_token_id
    if peft_config is not None:
        peft_config = copy.deepcopy(peft_config)
        peft_config.task_type = "SEQ_CLS"
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), head})
    return _with_adapter(model, peft_config)


def head_name(model: nn.Module) -> str:
    """Name of the linear layer that makes the one score."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layer with one output: it is no reward model")
    return names[-1]


def draw_head(head: nn.Linear, seed: int) -> None:
    """Weights from N(0, 1/(d+1)), d the input width (Stiennon et al. 2020), bias 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.out_features, head.in_features, generator=generator) / (head.in_features + 1) ** 0.5
    with gathered(head.parameters(), written=True), torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0. Dropout makes a policy differ from its rollouts and from its reference.

    Dropouts are modules, or numbers that a module passes on (`dropout` and `layerdrop` of OPT, `attention_dropout`).
    """
    adapters = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0 and "lora_dropout" in name:
                adapters.add(module.p)
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and "drop" in key:
                setattr(module, key, 0.0)
    if adapters:
        logger.warning(
            "lora_dropout %s is off: disable_dropout is true, and dropout in an adapter makes the policy differ from "
            "its reference and its rollouts; to train with it set disable_dropout: false",
            ", ".join(map(str, sorted(adapters))),
        )


class Reference:
    """The frozen policy that KL is measured to: a copy, a model given, or the policy with its adapter switched off."""

    def __init__(self, model: nn.Module, *, adapter_off: bool):
        self.model = model
        self.adapter_off = adapter_off

    def prepare(self, accelerator) -> None:
        """Place a model of its own like the policy (device, precision, shards). Nothing to do for an adapter."""
        from accelerate.utils import DistributedType

        if self.adapter_off:
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from trl.models import prepare_deepspeed

            self.model = prepare_deepspeed(self.model, accelerator)
        elif accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            # trl's prepare_fsdp shards what each process holds: zeros where only the main one has read the weights
            self.model = fsdp2_prepare_model(accelerator, self.model)
        elif accelerator.distributed_type == DistributedType.FSDP:
            from trl.models import prepare_fsdp

            self.model = prepare_fsdp(self.model, accelerator)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)

    def logps(self, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0, **options) -> Tensor:
        """As `token_logps`, under the reference: [B, T-1]."""
        with self.active() as model:
            return token_logps(model, input_ids, attention_mask, temperature=temperature, **options)

    @contextmanager
    def active(self):
        """The model that is the reference, for whatever runs inside: in eval mode, adapter off, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.model.disable_adapter() if self.adapter_off else nullcontext():
                yield self.model
        finally:
            self.model.train(training)


def reference_of(model: nn.Module, ref_model: str | Path | nn.Module | None = None) -> Reference:
    """The reference of a policy that has not been trained yet.

    `ref_model` if given; else for a PEFT model itself with the adapter off; else a frozen copy of it.
    """
    from peft import PeftModel

    if ref_model is None and isinstance(model, PeftModel):
        return Reference(model, adapter_off=True)
    return Reference(freeze_copy(model) if ref_model is None else _frozen(load_policy(ref_model)), adapter_off=False)


def freeze_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that no optimiser can change, in eval mode."""
    if is_zero3(model.parameters()):
        return _frozen(zero3_twin(language_model(model)))
    return _frozen(copy.deepcopy(model))


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


# ---- loading ---------------------------------------------------------------------------------------------------------


@contextmanager
def weights_on_every_process():
    """Under FSDP's cpu_ram_efficient_loading, transformers gives every process but the main one a model of zeros, of
    whatever kind it is. Only the model that FSDP then shards gets its weights from the main process."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _from_pretrained(auto_class, source: str, what: str, *, sharded: bool = False, **kwargs):
    try:
        with nullcontext() if sharded else weights_on_every_process():
            return auto_class.from_pretrained(source, **kwargs)
    except (OSError, ValueError, ImportError) as error:  # the last: bitsandbytes is missing
        raise ConfigError(f"cannot load the {what} {source!r}: {str(error).strip().splitlines()[0]}") from error


def _load(auto_class, peft_class: str, source: str, options: dict, **head) -> nn.Module:
    if (Path(source) / "adapter_config.json").exists():
        import peft

        model = _from_pretrained(getattr(peft, peft_class), source, "adapter", **options)
        logger.info("%s holds an adapter: it is merged into its base model", source)
        merged = model.merge_and_unload()
        for parameter in merged.parameters():  # PEFT froze them under the adapter
            parameter.requires_grad_(parameter.is_floating_point())
        return merged
    if not head:
        return _from_pretrained(auto_class, source, "model", **options)
    with _only_errors_from_transformers():  # a missing head is expected; what else is missing is said below
        model, report = _from_pretrained(auto_class, source, "model", output_loading_info=True, **options)
    name, missing = head_name(model), set(report["missing_keys"])
    if f"{name}.weight" in missing:
        if head["head_seed"] is None:
            raise ConfigError(f"{source} is no reward model: it holds no weights for its score ({name})")
        logger.info("%s has no score head: %s is drawn with seed %d", source, name, head["head_seed"])
        draw_head(model.get_submodule(name), head["head_seed"])
    others = sorted(key for key in missing if not key.startswith(f"{name}."))
    if others:
        logger.warning("%s holds no weights for %s: they are new, drawn at random", source, ", ".join(others))
    return model


@contextmanager
def _only_errors_from_transformers():
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _keep_4_bit_layers_differentiable(model: nn.Module) -> None:
    """On processors bitsandbytes repacks a 4-bit layer at its first pass without gradient (an evaluation, a reference),
    for good, into a form that has no backward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its Linear4bit
            module.support_avx512bf16_for_cpu = False


def _loading_options(dtype, attn_implementation: str | None, peft_config, kwargs: dict) -> dict:
    if dtype is None:
        dtype = "auto" if peft_config is not None and torch.cuda.is_available() else "float32"
    options = {"dtype": dtype, **kwargs}
    return options if attn_implementation is None else {**options, "attn_implementation": attn_implementation}


def _refuse_loading_options(dtype, attn_implementation: str | None, kwargs: dict) -> None:
    given = [
        k for k, v in {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}.items() if v is not None
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: these say how to load a model, and the model given is already loaded")


def _check_one_label(source: str, kwargs: dict) -> None:
    from transformers import AutoConfig

    if (Path(source) / "adapter_config.json").exists():
        return
    keys = ("revision", "trust_remote_code", "token", "cache_dir")
    config = _from_pretrained(AutoConfig, source, "model", **{k: kwargs[k] for k in keys if k in kwargs})
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise ConfigError(f"{source} classifies into {config.num_labels} labels; a reward model has one output")


def _with_adapter(model: nn.Module, peft_config) -> nn.Module:
    if peft_config is None:
        return model
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError("the model already has an adapter: leave peft_config out, or merge it first")
    return get_peft_model(model, peft_config)
