"""Which models can take rows with shared prefixes."""

import inspect
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.data.collate import PairCollator
from align.data.shared_prefix import SharedPrefixCollator
from align.distributed.ranks import shared
from align.distributed.shards import is_zero3
from align.errors import TrainingError
from align.modeling import shared_prefix
from align.modeling.logprobs import language_model
from align.modeling.pairs import pair_tokens
from align.modeling.scores import pair_scores
from align.modeling.types import Model

logger = logging.getLogger(__name__)

LAYERS = {"full_attention", "sliding_attention", "attention", "dense", "sparse", "moe", "mlp"}
"""Kinds of layers, in configurations, in which only attention (with the mask that it is given) mixes positions."""
STATEFUL = re.compile(
    r"Mamba|SSM|RWKV|Rwkv|Recurrent|RGLRU|Rglru|LinearAttention|LightningAttention|DeltaNet|DeltaRule|DeltaAttention"
    r"|ShortConv|mLSTM|sLSTM|MLSTM|SLSTM|Retention|Hyena|Indexer"
)
"""Classes whose modules carry something from one position to the next, or choose keys by themselves."""


class _Probe(NamedTuple):
    """What is compared: its name, and the values of a batch of pairs, all chosen ones first."""

    what: str
    values: Callable[[Model, dict], Tensor]


LOGPS = _Probe("log-probs", lambda model, batch: pair_tokens(model, batch).logps)
SCORES = _Probe("scores", pair_scores)


def enable_shared_prefix(model: Model, max_length: int | None, autocast: torch.dtype | None = None) -> str | None:
    """Make a model take the batches of `SharedPrefixCollator`. Returns None, or why it cannot; then it is unchanged.

    Only its attention may mix positions: a layer with a state, a convolution over tokens or an attention of its own
    kind would carry the chosen answer into the rejected one. Its modules and configuration tell. Then made-up pairs are
    computed (`_difference`). The model must not be wrapped for several processes yet (once it is: `check_wrapped`);
    what the main process finds holds for all, as the others may not have the weights before FSDP sends them.

    Args:
        max_length: the longest sequence (prompt and completion) to come, which an attention window must cover; None:
            any.
        autocast: the dtype of the mixed precision that it is trained in; None: that of its weights.
    """
    return _enable(model, max_length, LOGPS, autocast)


def enable_shared_scores(model: Model, max_length: int | None, autocast: torch.dtype | None = None) -> str | None:
    """The same for a classifier, whose scores of the two pairs must be the same."""
    return _enable(model, max_length, SCORES, autocast)


def check_wrapped(model: Model, autocast: torch.dtype | None = None, probe: _Probe = LOGPS) -> None:
    """Raise TrainingError if the model leaks from chosen to rejected as it is now: wrapped, on its device and dtype.

    All processes must call it.
    """
    reason = _difference(model, probe, autocast)
    if reason is not None:
        raise TrainingError(
            f"shared prefixes do not work with this model as it is trained here: {reason}. Set batching: padded"
        )


def enable_trunk(trunk: Model, model: Model, max_length: int | None) -> str | None:
    """The same for a model without a head, such as a critic, of the kind that is in `model`, which takes such rows."""
    kind, known = type(trunk).__name__, type(language_model(model).base_model).__name__
    if kind != known:
        return f"the critic is a {kind}, and the policy a {known}"
    reason = _unsuitable(trunk, trunk, max_length)
    if reason is None:
        trunk.set_attn_implementation(shared_prefix.IMPLEMENTATION)
    return reason


def _enable(model: Model, max_length: int | None, probe: _Probe, autocast: torch.dtype | None) -> str | None:
    core = language_model(model)
    reason = _unsuitable(model, core, max_length)
    if reason is not None:
        return reason
    before = core.config._attn_implementation
    shared_prefix.register()
    core.set_attn_implementation(shared_prefix.IMPLEMENTATION)
    reason = shared(_difference(model, probe, autocast))
    if reason is not None:
        core.set_attn_implementation(before)
    return reason


def _unsuitable(model: Model, core: Model, max_length: int | None) -> str | None:
    from peft import PeftModel

    config = core.config.get_text_config()
    if any(isinstance(m, PeftModel) and m.active_peft_config.is_prompt_learning for m in model.modules()):
        return "its adapter puts virtual tokens before the prompt"
    if core.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if "position_ids" not in inspect.signature(type(core).forward).parameters:
        return f"{type(core).__name__} takes no position ids"
    if is_zero3(model.parameters()):
        return "DeepSpeed ZeRO-3 has taken its weights apart, so that they could not be tried"
    reason = _stateful(core)
    if reason is not None:
        return reason
    types = _kinds(config, "layer_types")
    others = (types | _kinds(config, "layers_block_type") | _kinds(config, "block_types")) - LAYERS
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    if core.config._attn_implementation not in ("sdpa", shared_prefix.IMPLEMENTATION):
        return f"its attention is {core.config._attn_implementation}, and only sdpa takes such rows"
    if not core._can_set_attn_implementation():
        return f"{type(core).__name__} does not use transformers' attention interface"
    window = vars(config).get("sliding_window")
    if window and (not types or "sliding_attention" in types) and (max_length is None or max_length > window):
        return f"its attention window of {window} tokens is shorter than max_length={max_length}"
    return None


def _kinds(config, name: str) -> set[str]:
    values = getattr(config, name, None)  # a property in some configurations
    return {str(value) for value in values or ()}


def _stateful(core: Model) -> str | None:
    """The first module of the decoder that mixes positions and is no attention."""
    for name, module in core.get_decoder().named_modules():
        kernel = max(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 1
        if kernel > 1:
            return f"{name} is a convolution over {kernel} tokens, which carries one answer into the next"
        if isinstance(module, nn.RNNBase) or STATEFUL.search(type(module).__name__.removesuffix("ForCausalLM")):
            return f"{name} ({type(module).__name__}) carries a state from one answer into the next"
    return None


@torch.no_grad()
def _difference(model: Model, probe: _Probe, autocast: torch.dtype | None) -> str | None:
    """Why a model cannot take shared rows, from what it computes for small pairs; None if it can."""
    weights = next(p for p in model.parameters() if p.is_floating_point())
    pairs = _pairs(language_model(model).config.get_text_config().vocab_size)
    collators: dict[str, Callable] = {"padded": PairCollator(pad_token_id=0), "shared": SharedPrefixCollator()}

    def values(rows: list[dict], layout: str = "shared") -> Tensor:
        batch = {k: v.to(weights.device) for k, v in collators[layout](rows).items()}
        with torch.autocast(weights.device.type, dtype=autocast, enabled=autocast is not None):
            return probe.values(model, batch)

    training = model.training
    model.eval()
    try:
        padded, shared, again = values(pairs, "padded"), values(pairs), values(pairs)
        other_chosen = [values([_other(row, "chosen_ids", shift) for row in pairs]) for shift in (7, 18)]
        other_prompt = values([_other(row, "prompt_ids", 7) for row in pairs])
    except Exception as error:  # whatever an architecture does with what it does not expect
        return f"it fails on them: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    finally:
        model.train(training)
    rounding = torch.finfo(autocast or weights.dtype).eps * padded.abs().max().item()
    if rounding == 0:
        return f"its {probe.what} are all 0, so that nothing can be compared"
    return (
        _without_table(language_model(model))
        or _leak(model, probe.what, rounding, shared, again, other_chosen)
        or _other_values(probe.what, rounding, padded, shared, other_prompt)
    )


def _leak(model: Model, what: str, rounding: float, shared, again, other_chosen: list[Tensor]) -> str | None:
    """Other chosen answers of the same lengths must not move the values of rejected ones, of any pair, at all.

    Not by rounding either, which a comparison with padded rows must allow for: in bfloat16 it would hide a leak. Two
    things may move them by rounding alone: kernels that differ from call to call, and experts, which compute together
    what tokens of all sequences chose them.
    """
    rejected = slice(len(shared) // 2, None)
    allowed = 4 * (shared - again).abs().max().item()
    if any("Experts" in type(module).__name__ or "moe" in type(module).__name__.lower() for module in model.modules()):
        allowed = max(allowed, 4 * rounding)
    moved = max((values - shared)[rejected].abs().max().item() for values in other_chosen)
    if moved > allowed:
        return f"its {what} of rejected answers move by {moved:.2g} with the chosen ones that stand before them"
    return None


def _other_values(what: str, rounding: float, padded: Tensor, shared: Tensor, other_prompt: Tensor) -> str | None:
    rejected, difference = slice(len(shared) // 2, None), (padded - shared).abs()
    if torch.equal(other_prompt[rejected], shared[rejected]):
        return f"its {what} of rejected answers do not depend on the prompt in such a row"
    if difference.max() > 16 * rounding or difference.mean() > 8 * rounding:
        return f"its {what} of a pair in such a row differ by {difference.max():.2g} from those of the pair alone"
    return None


def _without_table(core: Model) -> str | None:
    """Attention by another function than the one that reads the table would not be known to respect it."""
    count = sum(shared_prefix.took_a_table(module) for module in core.modules())
    layers = core.config.get_text_config().num_hidden_layers
    return f"only {count} of its {layers} layers have such attention" if count < layers else None


def _pairs(vocabulary: int) -> list[dict]:
    """Two pairs; the completions of the first begin with the same token alone, those of the second do not, also where
    `_other` has replaced the tokens of one: in another layout a value may round otherwise, as if something leaked."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"prompt_ids": (6, 3), "chosen_ids": (4, 5), "rejected_ids": (5, 2)}
    columns = {
        name: [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
        for name, lengths in shapes.items()
    }
    first, second = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    first["rejected_ids"][:2] = first["chosen_ids"][0], (first["chosen_ids"][1] + 1) % vocabulary
    second["rejected_ids"][0] = (second["chosen_ids"][0] + 1) % vocabulary
    return [{**row, "vocabulary": vocabulary} for row in (first, second)]


def _other(row: dict, name: str, shift: int) -> dict:
    """The pair with every token of a column replaced, but for what the completions begin with in common."""
    vocabulary, shared = row["vocabulary"], row["chosen_ids"][0] == row["rejected_ids"][0]
    kept = row[name][: int(shared and name == "chosen_ids")]
    return {**row, name: [*kept, *((token + shift) % vocabulary for token in row[name][len(kept) :])]}
