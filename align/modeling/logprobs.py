"""Log-probs of given tokens without the [B, T, V] log-softmax.

The language-model head runs on chunks of the wanted tokens inside the model's own forward pass, so that DDP, FSDP2,
autocast and adapters see an ordinary call, and each chunk's logits are recomputed in the backward pass.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.errors import TrainingError

logger = logging.getLogger(__name__)

CHUNK_VALUES = 1 << 26  # logits per chunk when chunk_size is None: 256 MiB in float32
_chunkable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def token_logps(
    model: nn.Module,
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
        chunk_size: tokens per chunk of logits; None bounds a chunk by `CHUNK_VALUES` logits.
        return_entropy: also return the entropy of each token's distribution in nats, [B, T-1], detached.
    """
    wanted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    if mask is not None:
        wanted = wanted & mask[:, 1:].bool()
    targets = input_ids[:, 1:][wanted]
    core = language_model(model)
    finish = partial(
        _chunked, targets=targets, temperature=temperature, chunk_size=chunk_size, with_entropy=return_entropy
    )
    inputs = model_inputs(core, input_ids, attention_mask)
    if _chunkable.get(core, True) and _head_can_run_alone(core):
        values = _through_head(model, core, inputs, wanted, finish)
    else:
        logits = model(**inputs).logits[:, :-1][wanted]
        values = finish(_identity, logits)
    columns = [values.new_zeros(wanted.shape).masked_scatter(wanted, column) for column in values.unbind(-1)]
    return (columns[0], columns[1].detach()) if return_entropy else columns[0]


def language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers (DDP, FSDP, torch.compile, PEFT)."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    if isinstance(model, nn.DataParallel):
        raise TrainingError(
            "several GPUs in one process (torch.nn.DataParallel) are not supported: start one process per GPU with "
            "`align launch`, or show one GPU with CUDA_VISIBLE_DEVICES"
        )
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_inputs(core: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Keyword arguments of a forward pass: position ids follow the mask, where the model takes them."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(core).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def _head_can_run_alone(core: nn.Module) -> bool:
    # ZeRO-3 frees a module's weights after its forward, so its head cannot be recomputed by itself in the backward pass
    head = core.get_output_embeddings()
    return head is not None and not any(hasattr(p, "ds_id") for p in head.parameters())


def _chunked(
    head: Callable,
    hidden: Tensor,
    *,
    targets: Tensor,
    temperature: float,
    chunk_size: int | None,
    with_entropy: bool,
    vocabulary: int | None = None,
) -> Tensor:
    """Values [N, 1 or 2] (log-prob, entropy) of targets [N] under head(hidden), hidden [N, ...], chunk by chunk."""
    size = chunk_size or max(CHUNK_VALUES // (vocabulary or hidden.shape[-1]), 1)
    step = partial(_token_values, head, temperature, with_entropy)
    pairs = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(pairs) > 1 and torch.is_grad_enabled():
        step = partial(checkpoint, step, use_reentrant=False)
    return torch.cat([step(h, t) for h, t in pairs])


def _token_values(head: Callable, temperature: float, with_entropy: bool, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    if not with_entropy:
        return logps[:, None]
    with torch.no_grad():
        entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
    return torch.stack([logps, entropy], dim=-1)


def _through_head(model: nn.Module, core: nn.Module, inputs: dict, wanted: Tensor, finish: Callable) -> Tensor:
    """One forward pass in which the head returns only the last position's logits and `finish` gets all wanted ones."""
    head = core.get_output_embeddings()
    head_forward, scale_logits = head.forward, logit_transform(core.config)
    vocabulary = core.config.get_text_config().vocab_size
    kept = {}

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] == (wanted.shape[0], wanted.shape[1] + 1):
            alone = partial(_compose, scale_logits, head_forward)
            kept["values"] = finish(alone, hidden[:, :-1][wanted], vocabulary=vocabulary)
        kept["last"] = head_forward(hidden[:, -1:])
        return kept["last"]

    def replace_output(module, args, output):
        if "values" in kept:
            kept["final"] = output.logits.detach()
            output.logits = kept["values"]
        return output

    with _replaced_forward(head, forward):
        # prepended: the wrappers' own hooks must see the tensor through which the gradient comes back
        hook = core.register_forward_hook(replace_output, prepend=True)
        try:
            model(**inputs)
        finally:
            hook.remove()
    if core not in _chunkable:
        _chunkable[core] = "values" in kept and _same(scale_logits(kept["last"].detach()), kept["final"])
        if not _chunkable[core]:
            logger.warning(
                "%s does something to its logits that its head alone does not: log-probs are computed from the full "
                "logits, which takes more memory",
                type(core).__name__,
            )
            return finish(_identity, model(**inputs).logits[:, :-1][wanted])
    return kept["values"]  # not the output's: a wrapper may have cast that to bfloat16


def _identity(logits: Tensor) -> Tensor:
    return logits


def _compose(outer: Callable, inner: Callable, x: Tensor) -> Tensor:
    return outer(inner(x))


def logit_transform(config) -> Callable[[Tensor], Tensor]:
    """What the architecture does between its head and its logits: Granite's and Cohere's scale, Gemma's soft cap."""
    text = vars(config.get_text_config())  # only some architectures have these
    scale = text.get("logit_scale") or 1.0
    if text.get("logits_scaling"):
        scale = scale / text["logits_scaling"]
    cap = text.get("final_logit_softcapping")

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    return transform


def _same(ours: Tensor, final: Tensor) -> bool:
    # loose enough for a soft cap computed in bfloat16, tight enough to see any factor that matters
    return ours.shape == final.shape and bool(
        (ours.float() - final.float()).abs().max() <= 0.02 * final.float().abs().max()
    )


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
