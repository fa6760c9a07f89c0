"""Which models can take rows with shared prefixes."""

import inspect
import logging
from collections.abc import Callable

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from align.data.collate import PairCollator
from align.data.shared_prefix import SharedPrefixCollator
from align.modeling import shared_prefix
from align.modeling.logprobs import language_model
from align.modeling.pairs import pair_tokens
from align.modeling.scores import pair_scores
from align.modeling.types import Model

logger = logging.getLogger(__name__)


def enable_shared_prefix(model: Model, max_length: int | None) -> str | None:
    """Make a model take the batches of `SharedPrefixCollator`. Returns None, or why it cannot; then it is unchanged.

    Besides what its architecture and configuration tell, the log-probs of two made-up pairs are computed in both
    layouts and must be the same. The model must not be wrapped for several processes yet; what the main process finds
    holds for all, as the others may not have the weights before FSDP sends them.

    Args:
        max_length: the longest sequence (prompt and completion) to come, which an attention window must cover; None:
            any.
    """
    return _enable(model, max_length, "log-probs", lambda batch: pair_tokens(model, batch).logps)


def enable_shared_scores(model: Model, max_length: int | None) -> str | None:
    """The same for a classifier, whose scores of the two pairs must be the same."""
    return _enable(model, max_length, "scores", lambda batch: pair_scores(model, batch))


def enable_trunk(trunk: Model, model: Model, max_length: int | None) -> str | None:
    """The same for a model without a head, such as a critic, of the kind that is in `model`, which takes such rows."""
    kind, known = type(trunk).__name__, type(language_model(model).base_model).__name__
    if kind != known:
        return f"the critic is a {kind}, and the policy a {known}"
    reason = _unsuitable(trunk, trunk, max_length)
    if reason is None:
        trunk.set_attn_implementation(shared_prefix.IMPLEMENTATION)
    return reason


def _enable(model: Model, max_length: int | None, what: str, values: Callable[[dict], Tensor]) -> str | None:
    core = language_model(model)
    reason = _unsuitable(model, core, max_length)
    if reason is not None:
        return reason
    before = core.config._attn_implementation
    shared_prefix.register()
    core.set_attn_implementation(shared_prefix.IMPLEMENTATION)
    (reason,) = broadcast_object_list([_difference(model, what, values)])
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
    if core.config._attn_implementation not in ("sdpa", shared_prefix.IMPLEMENTATION):
        return f"its attention is {core.config._attn_implementation}, and only sdpa takes such rows"
    if not core._can_set_attn_implementation():
        return f"{type(core).__name__} does not use transformers' attention interface"
    kinds = set(vars(config).get("layer_types") or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        return f"it has layers of {', '.join(others)}"
    window = vars(config).get("sliding_window")
    if window and (not kinds or "sliding_attention" in kinds) and (max_length is None or max_length > window):
        return f"its attention window of {window} tokens is shorter than max_length={max_length}"
    return None


@torch.no_grad()
def _difference(model: Model, what: str, values: Callable[[dict], Tensor]) -> str | None:
    """Why the values of two small pairs differ between the layouts; None if they do not."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = language_model(model).config.get_text_config().vocab_size
    shapes = {"prompt_ids": (6, 3), "chosen_ids": (4, 5), "rejected_ids": (5, 2)}
    columns = {
        name: [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
        for name, lengths in shapes.items()
    }
    pairs = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    pairs[0]["rejected_ids"][0] = pairs[0]["chosen_ids"][0]
    weights = next(p for p in model.parameters() if p.is_floating_point())
    training = model.training
    model.eval()
    try:
        padded, shared = (
            values({k: v.to(weights.device) for k, v in collate(pairs).items()})
            for collate in (PairCollator(pad_token_id=0), SharedPrefixCollator())
        )
    except Exception as error:  # whatever an architecture does with what it does not expect
        return f"it fails on them: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    finally:
        model.train(training)
    difference, scale = (padded - shared).abs().max().item(), padded.abs().max().item()
    if scale == 0:
        return f"its {what} are all 0, so that nothing can be compared"
    if difference <= 16 * torch.finfo(weights.dtype).eps * scale:
        return None
    return f"its {what} of a pair in such a row differ by {difference:.2g} from those of the pair alone"
