"""transformers' `from_pretrained` with one-line errors, on every process, and with a head drawn where none is saved."""

import logging
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from align.data.hub import not_found, offline_if_unreachable
from align.distributed.shells import ShellsForZeros, are_sent_weights, fill, shells_for_weights
from align.errors import ConfigError, one_line
from align.modeling.adapters import adapter_base, check_answers, fit_base, is_adapter
from align.modeling.dequantize import dequantizing, keep_ordinary, stored_form
from align.modeling.missing_weights import check_classifier, check_complete, what_else
from align.modeling.score_head import draw_head, head_name
from align.modeling.types import Model

logger = logging.getLogger(__name__)

OWN_CODE = (
    "it needs code of its own (auto_map in its config.json), which is not run unasked. Where you know that code, "
    "trust_remote_code: true trains it; what takes a name alone (export, generation, rewards) does not run it: load "
    "the model from Python, with trust_remote_code=True"
)


@contextmanager
def weights_on_every_process():
    """Under FSDP's cpu_ram_efficient_loading, transformers gives every process but the main one a model of zeros, and
    under ZeRO-3 every process a part of each tensor, of whatever kind the model is. Only a model that is then trained
    (or prepared as the reference is) gets its weights back."""
    from transformers.integrations import deepspeed

    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before, settings = os.environ.get(name), deepspeed._hf_deepspeed_config_weak_ref
    if before is not None:
        os.environ[name] = "false"
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        deepspeed._hf_deepspeed_config_weak_ref = settings


def from_pretrained(auto_class, source: str, what: str, *, sharded: bool = False, **kwargs):
    """`auto_class.from_pretrained`; ConfigError of one line where it fails, at once where the hub cannot be reached."""
    kwargs = {"trust_remote_code": False, **kwargs}  # left out, transformers asks at the terminal, in every process
    try:
        with (
            offline_if_unreachable(source) as problem,
            ShellsForZeros() if sharded else weights_on_every_process(),
        ):
            options = kwargs
            if hasattr(auto_class, "_model_mapping"):  # a model, and no config or tokenizer
                options = _in_ordinary_numbers(source, kwargs)
            loaded = _loaded(auto_class, source, options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        keep_ordinary(model)
        if options is not kwargs and kwargs.get("dtype") not in (None, "auto"):
            model.to(getattr(torch, str(kwargs["dtype"]).removeprefix("torch.")))  # MXFP4 is read as bfloat16
        if sharded and are_sent_weights() and getattr(model, "hf_quantizer", None) is None:
            shells_for_weights(model)
        return loaded
    except Exception as error:  # missing and damaged files make transformers, tokenizers and safetensors raise anything
        if problem and not Path(source).exists():
            raise ConfigError(f"cannot load the {what} {source!r}: {not_found(source, problem)}") from error
        reason = OWN_CODE if "contains custom code" in str(error) else _without_model(source) or one_line(error)
        raise ConfigError(f"cannot load the {what} {source!r}: {reason}") from error


def _without_model(source: str) -> str | None:
    """What to say of a folder in which a run has saved nothing but checkpoints, or nothing at all; None of others."""
    folder = Path(source)
    if not folder.is_dir() or any(any(folder.glob(name)) for name in ("*config.json", "tokenizer*", "*.model")):
        return None
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return f"the folder holds no model{'' if newest is None else f'; its newest checkpoint is {newest}'}"


def _in_ordinary_numbers(source: str, kwargs: dict) -> dict:
    """With the option that reads weights of few bits as ordinary numbers, where none says how to read them."""
    from transformers import AutoConfig

    if kwargs.get("quantization_config") is not None or "gguf_file" in kwargs:
        return kwargs
    places = ("revision", "trust_remote_code", "code_revision", "subfolder", "token", "cache_dir", "local_files_only")
    config = kwargs.get("config") or AutoConfig.from_pretrained(source, **{k: kwargs[k] for k in places if k in kwargs})
    found = dequantizing(config)
    if found is None:
        return kwargs
    logger.info(
        "the weights of %s are stored in %s: they are read, trained and saved as ordinary numbers",
        source,
        (stored_form(config) or {})["quant_method"],
    )
    return {**kwargs, "quantization_config": found}


def _loaded(auto_class, source: str, kwargs: dict):
    """A causal model may also be one of text and images, of which transformers has some under that class alone (Mistral
    3, Qwen-VL). Of some (Llama 3.2 Vision) it loads a text model that it would not load again once saved."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if auto_class is not AutoModelForCausalLM:
        return auto_class.from_pretrained(source, **kwargs)
    try:
        loaded = auto_class.from_pretrained(source, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if type(model.config) in auto_class._model_mapping or kwargs.get("trust_remote_code"):
            return loaded
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        try:
            return AutoModelForImageTextToText.from_pretrained(source, **kwargs)
        except ValueError:
            raise error from None
    del loaded, model
    return AutoModelForImageTextToText.from_pretrained(source, **kwargs)


def causal_class(config):
    """The auto class that makes a model of this config without weights, chosen as `from_pretrained` chooses it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind, causal = type(config), MODEL_FOR_CAUSAL_LM_MAPPING
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (kind not in causal or causal[kind].config_class not in causal):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_whole(auto_class, source: str, options: dict, **head) -> Model:
    if not head:
        model, report = from_pretrained(auto_class, source, "model", output_loading_info=True, **options)
        check_is_causal(model.config, source)
        if not are_sent_weights():
            check_complete(model, source, report)
        return model
    with only_errors_from_transformers():  # a missing head is expected; what else is missing is said below
        model, report = from_pretrained(auto_class, source, "model", output_loading_info=True, **options)
    name = head_name(model)
    drawn = f"{name}.weight" in report["missing_keys"]
    if drawn and head["head_seed"] is None:
        more = what_else(report, model, name)
        raise ConfigError(f"{source} is no reward model: it holds no weights for its score ({name}){more}")
    if not are_sent_weights():
        check_classifier(model, source, report, name, drawn=drawn)
    if drawn:
        if not head.get("of_adapter"):  # which brings a head of its own
            logger.info("%s has no score head: %s is drawn with seed %d", source, name, head["head_seed"])
        fill(model.get_submodule(name))
        draw_head(model.get_submodule(name), head["head_seed"])
    return model


def check_is_causal(config, source: str) -> None:
    """ConfigError for the config of a reward model, of which transformers makes a language model with an output layer
    that is drawn at random, or is the embeddings, and warns."""
    made = config.architectures or ()
    if made and all(name.endswith(("ForSequenceClassification", "ForTokenClassification")) for name in made):
        raise ConfigError(
            f"{source} holds a reward model or another classifier ({', '.join(made)}), and a language model is needed "
            "here: name the model that it was trained from, or another that answers"
        )


def pretrained_config(name: str, what: str, **options):
    """The transformers config of a folder or hub name; that of the base model for the folder of an adapter."""
    from transformers import AutoConfig

    if is_adapter(name):
        name, options = adapter_base(name), {}
    return from_pretrained(AutoConfig, name, f"config of the {what}", **options)


def empty_model(name: str, *, classifier: bool = False, **options) -> Model:
    """The model of a folder or hub name on the meta device, without its weights and without its adapter: what its
    config alone says of it. options: revision, trust_remote_code."""
    from transformers import AutoModelForSequenceClassification

    config = pretrained_config(name, "model", **options)
    made = causal_class(config)
    if classifier:
        check_has_classifier(config)
        made, config.num_labels = AutoModelForSequenceClassification, 1
    else:
        check_is_causal(config, name)
        if is_adapter(name):
            check_answers(name)
    with torch.device("meta"):
        model = made.from_config(config, trust_remote_code=options.get("trust_remote_code", False))
        if is_adapter(name):
            fit_base(model, name)
    return model


@contextmanager
def only_errors_from_transformers():
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def keep_4_bit_layers_differentiable(model: Model) -> None:
    """On processors bitsandbytes repacks a 4-bit layer at its first pass without gradient (an evaluation, a reference),
    for good, into a form that has no backward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its Linear4bit
            module.support_avx512bf16_for_cpu = False


def default_dtype(*, frozen: bool) -> str:
    """Of weights for which none is asked: float32, but frozen ones, under an adapter, as they were saved on a GPU."""
    return "auto" if frozen and torch.cuda.is_available() else "float32"


def loading_options(dtype, attn_implementation: str | None, peft_config, kwargs: dict) -> dict:
    if dtype is None:
        dtype = default_dtype(frozen=peft_config is not None)
    options = {"dtype": dtype, **kwargs}
    return options if attn_implementation is None else {**options, "attn_implementation": attn_implementation}


def refuse_loading_options(dtype, attn_implementation: str | None, kwargs: dict) -> None:
    given = [
        k for k, v in {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}.items() if v is not None
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: these say how to load a model, and the model given is already loaded")


def check_has_classifier(config) -> None:
    """ConfigError where neither transformers nor the model's own code has a class for a reward model of this config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    of_its_own = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in KNOWN and not of_its_own:
        raise ConfigError(
            f"transformers has no sequence-classification class for {config.model_type} models, which a reward model "
            "needs: start from one of another family (Llama, Qwen 2 and 3, Mistral, Gemma 2 and 3 have one; it need "
            "not be the policy's)"
        )


def check_one_label(source: str, kwargs: dict) -> None:
    keys = ("revision", "trust_remote_code", "token", "cache_dir")
    config = pretrained_config(source, "model", **{k: kwargs[k] for k in keys if k in kwargs})
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    if not is_classifier:  # one that vLLM serves may be of a class that transformers has not
        check_has_classifier(config)
    if is_adapter(source):
        return
    if is_classifier and config.num_labels != 1:
        raise ConfigError(f"{source} classifies into {config.num_labels} labels; a reward model has one output")
