"""Log-probs of given tokens without the [B, T, V] logits.

The language-model head runs on the wanted tokens alone (`token_values`), inside the model's own forward pass, so that
DDP, FSDP2, autocast and adapters see an ordinary call.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from align.distributed.shards import is_zero3
from align.errors import TrainingError
from align.modeling.heads import Head, LogitTransform, TokenValues, head_of
from align.modeling.token_values import token_values
from align.modeling.types import Model

logger = logging.getLogger(__name__)

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Their names in configurations."""
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_separable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@overload
def token_logps(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def token_logps(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_logps(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(input_ids[:, t+1] | input_ids[:, :t+1]) at `temperature`, natural log: [B, T-1], float32 (or float64).

    Entries whose token or whose context is padding are 0, and so are those outside `mask`. Padding may be on either
    side: position ids are counted from the attention mask. Differentiable, unless called under `torch.no_grad()`.

    Args:
        model: a causal language model, bare or wrapped (PEFT, DDP, FSDP2).
        input_ids, attention_mask: [B, T].
        mask: [B, T], non-zero for the tokens whose log-probs are wanted (e.g. the completion); None: all. The head is
            computed for no other.
        chunk_size: the most tokens whose logits exist at once; None: as many as are fast.
        return_entropy: also return the entropy of each token's distribution in nats, [B, T-1], detached.
    """
    wanted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    if mask is not None:
        wanted = wanted & mask[:, 1:].bool()
    finish = partial(token_values, targets=input_ids[:, 1:][wanted], entropy=return_entropy, chunk_size=chunk_size)
    inputs = model_inputs(language_model(model), input_ids, attention_mask)
    positions = nn.functional.pad(wanted, (0, 1)).flatten().nonzero().squeeze(-1)
    values = values_at(model, inputs, positions, finish, temperature=temperature)
    logps = values.logps.new_zeros(wanted.shape).masked_scatter(wanted, values.logps)
    if values.entropy is None:
        return logps
    return logps, torch.zeros_like(logps).masked_scatter(wanted, values.entropy)


def values_at(
    model: Model,
    inputs: dict,
    positions: Tensor,
    finish: Callable[[Head, Tensor], TokenValues],
    *,
    temperature: float = 1.0,
) -> TokenValues:
    """finish(head, hidden [N, d]) within a forward pass of the model on `inputs`.

    hidden: what the head gets at `positions` [N], counted through the flattened [rows * T] positions of input_ids; in
    a model whose logits its head alone does not make (said once, by a warning), the logits themselves.
    """
    core = language_model(model)
    if _separable.get(core, True) and _head_can_run_alone(core):
        return _through_head(model, core, inputs, positions, finish, temperature)
    return _through_logits(model, inputs, positions, finish, temperature)


def head_inputs(model: Model, inputs: dict, positions: Tensor) -> tuple[Head, Tensor]:
    """What a frozen model's logits at `positions` come from: its head, and hidden states [N, d] without gradient.

    Unlike the head in `values_at`, this one can be used after the forward pass: sharded weights are gathered, and an
    adapter that is off now stays out of it.
    """
    kept: list[tuple[Head, Tensor]] = []

    def keep(head: Head, hidden: Tensor) -> TokenValues:
        kept.append((head, hidden.detach()))
        return TokenValues(hidden[:, 0])

    with torch.no_grad():
        values_at(model, inputs, positions, keep)
    (head, hidden), core = kept[-1], language_model(model)
    if head.forward is not _identity:
        head = head_of(_free_of_wrappers(core.get_output_embeddings()), head.vocabulary, head.transform)
    return head, hidden


def _free_of_wrappers(module: Any) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) and module.disable_adapters:
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    if not any(hasattr(p, "full_tensor") for p in module.parameters()):  # a DTensor, whose import is slow
        return module
    whole = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    whole.weight = nn.Parameter(module.weight.full_tensor(), requires_grad=False)
    if module.bias is not None:
        whole.bias = nn.Parameter(module.bias.full_tensor(), requires_grad=False)
    return whole


def language_model(model: Model) -> Model:
    """The transformers model inside wrappers (DDP, FSDP, torch.compile, PEFT)."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    if isinstance(model, nn.DataParallel):
        raise TrainingError(
            "several GPUs in one process (torch.nn.DataParallel) are not supported: start one process per GPU with "
            "`align launch`, or show one GPU with CUDA_VISIBLE_DEVICES"
        )
    if not isinstance(model, PeftModel):  # which is no wrapper, and has thousands of modules that would be looked at
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_inputs(core: Model, input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Keyword arguments of a forward pass: position ids follow the mask, where the model takes them."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(core).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def _head_can_run_alone(core: Model) -> bool:
    # ZeRO-3 frees a module's weights after its forward, so its head cannot be recomputed by itself in the backward pass
    head = core.get_output_embeddings()
    return head is not None and not is_zero3(head.parameters())


def _through_logits(model, inputs: dict, positions: Tensor, finish: Callable, temperature: float) -> TokenValues:
    logits = _of_tokens(model(**inputs).logits, inputs).index_select(0, positions)
    return finish(Head(_identity, logits.shape[-1], LogitTransform(temperature=temperature)), logits)


def _of_tokens(values: Tensor, inputs: dict) -> Tensor:
    """[rows, T, ...] -> [rows * T, ...], without what stands in front: the virtual tokens of prompt learning."""
    return values[:, -inputs["input_ids"].shape[1] :].flatten(0, 1)


def _through_head(
    model: Model, core: Model, inputs: dict, positions: Tensor, finish: Callable, temperature: float
) -> TokenValues:
    """One forward pass in which the head returns only the last position's logits and `finish` gets what it needs."""
    module, transform = core.get_output_embeddings(), logit_transform(core.config)
    head = head_of(module, vocabulary_of(core), transform._replace(temperature=temperature))
    kept, (rows, length) = {}, inputs["input_ids"].shape

    def forward(hidden: Tensor) -> Tensor:
        if hidden.dim() == 3 and len(hidden) == rows and hidden.shape[1] >= length:
            values = finish(head, _of_tokens(hidden, inputs).index_select(0, positions))
            kept["joint"] = values.logps
            names = ["logps"] if values.kl is None else ["logps", "kl"]
            if values.entropy is not None and values.entropy.requires_grad:
                names.append("entropy")
            if len(names) > 1:  # the gradient of each must come through the output
                kept["joint"] = torch.stack([getattr(values, name) for name in names])
                values = values._replace(**dict(zip(names, kept["joint"], strict=True)))
            kept["values"] = values
        last = head.forward(hidden[:, -1:])
        kept["products"] = last if core in _separable else torch.cat([last, _over_a_range(last)], dim=1)
        return kept["products"]

    def replace_output(module, args, output):
        if "values" in kept:
            kept["final"] = output.logits.detach()
            output.logits = kept["joint"]
        return output

    with _replaced_forward(module, forward):
        # prepended: the wrappers' own hooks must see the tensor through which the gradient comes back
        hook = core.register_forward_hook(replace_output, prepend=True)
        try:
            model(**inputs)
        finally:
            hook.remove()
    if core not in _separable:
        _separable[core] = "values" in kept and _same(transform, kept["products"].detach(), kept["final"])
        if not _separable[core]:
            logger.warning(
                "%s does something to its logits that its head alone does not: log-probs are computed from the full "
                "logits, which takes more memory",
                type(core).__name__,
            )
            return _through_logits(model, inputs, positions, finish, temperature)
    return kept["values"]  # not the output's: a wrapper may have cast that to bfloat16


def _identity(logits: Tensor) -> Tensor:
    return logits


def vocabulary_of(core: Model) -> int:
    return core.config.get_text_config().vocab_size


def logit_transform(config) -> LogitTransform:
    """What the architecture does between its head and its logits: the scale of Granite's, Cohere's and others, the soft
    cap of Gemma's, RecurrentGemma's and xLSTM's."""
    text = vars(config.get_text_config())  # only some architectures have these
    scale = next((text[name] for name in SCALES if text.get(name)), 1.0)
    if text.get("logits_scaling"):  # by which HyperCLOVA X alone multiplies
        scale = scale * text["logits_scaling"] ** (1 if config.get_text_config().model_type == "hyperclovax" else -1)
    return LogitTransform(scale, soft_cap_of(config))


def soft_cap_of(config) -> float | None:
    """Of the logits."""
    text = vars(config.get_text_config())
    return next((text[name] for name in SOFT_CAPS if text.get(name)), None)


@contextmanager
def soft_cap_by_its_usual_name(model: Any):
    """Inside, a model's configuration has it by the one name that TRL knows when it makes its head."""
    text, cap = model.config.get_text_config(), soft_cap_of(model.config)
    usual = SOFT_CAPS[0]
    given = cap is not None and not vars(text).get(usual)
    if given:
        setattr(text, usual, cap)
    try:
        yield
    finally:
        if given:
            delattr(text, usual)


def _over_a_range(products: Tensor) -> Tensor:
    """Numbers as large as any model's products: what is done to its logits, a soft cap above all, may not show in small
    ones."""
    numbers = torch.linspace(-60, 60, products.shape[-1], dtype=products.dtype, device=products.device)
    return numbers.expand_as(products)


def _same(transform: LogitTransform, products: Tensor, final: Tensor) -> bool:
    """Whether the logits `final` are the transform of what the head returned, [B, 2, vocabulary], up to the rounding of
    the dtype that they were computed in."""
    ours, rounding = transform(products).float(), max(1e-5, 2.5 * torch.finfo(products.dtype).eps)
    if ours.shape != final.shape:
        return False
    differences, sizes = (ours - final.float()).abs().amax((0, -1)), final.float().abs().amax((0, -1))
    return bool((differences <= rounding * sizes).all())


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable):
    had = vars(module).get("forward")  # accelerate and DeepSpeed set one on the instance
    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had
