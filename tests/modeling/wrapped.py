"""Log-probs and scores through DDP and FSDP2 on two processes: the values and gradients of one."""

import torch

from align.data import SharedPrefixCollator
from align.modeling.load import Reference, freeze_copy
from align.modeling.logprobs import token_logps
from align.modeling.pairs import pair_tokens_with_kl
from align.modeling.prefix_support import enable_shared_prefix
from align.modeling.scores import sequence_scores
from tests.modeling import tiny
from tests.modeling.pair_models import make, pairs


def wrap(model, kind):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def largest_difference(make, compute, kind, rank, inputs=None):
    """Of the values of this rank's rows, and of all gradients of their sum. inputs: of a slice of the rows."""
    alone, model = make(), make()
    ids, mask = tiny.rows(lengths=(7, 3, 5, 6))
    inputs = inputs or (lambda rows: (ids[rows], mask[rows]))
    mine = slice(2 * rank, 2 * rank + 2)
    wrapped = wrap(model, kind)
    expected, actual = compute(alone, *inputs(slice(0, 4))), compute(wrapped, *inputs(mine))
    (expected.sum() / 2).backward()  # the wrappers average over the two processes
    actual.sum().backward()
    differences = [(actual - expected[mine]).abs().max().item()]
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        gradient = a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad
        differences.append((gradient - b.grad).abs().max().item())
    return max(differences)


def pair_model():
    model = make("llama")
    assert enable_shared_prefix(model, None) is None
    return model


def pair_scores(model, rows):
    """Per pair, from log-probs and KL to a reference that is sharded like the policy."""
    reference = freeze_copy(make("llama"))
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    assert enable_shared_prefix(reference, None) is None
    if hasattr(next(model.parameters()), "full_tensor"):
        reference = wrap(reference, "fsdp2")
    tokens, ref = pair_tokens_with_kl(model, Reference(reference, adapter_off=False), SharedPrefixCollator()(rows))
    chosen, rejected = (tokens.logps - ref.logps + 0.5 * tokens.kl).sum(-1).chunk(2)
    return chosen - 2 * rejected


def differences(rank):
    """The largest difference of each case, in a process group of two."""
    found = {}
    for kind in ("ddp", "fsdp2"):
        for tied in (False, True):
            found[f"{kind} log-probs, head {'tied' if tied else 'free'}"] = largest_difference(
                lambda tied=tied: tiny.causal(tie_word_embeddings=tied),
                lambda *inputs: token_logps(*inputs, chunk_size=3),
                kind,
                rank,
            )
        found[f"{kind} scores"] = largest_difference(tiny.classifier, sequence_scores, kind, rank)
        found[f"{kind} pairs"] = largest_difference(
            pair_model, pair_scores, kind, rank, inputs=lambda rows: (pairs()[rows],)
        )
    return found
