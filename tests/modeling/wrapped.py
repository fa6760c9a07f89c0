"""Log-probs and scores through DDP and FSDP2 on two processes: the values and gradients of one."""

import torch

from align.modeling.logprobs import token_logps
from align.modeling.scores import sequence_scores
from tests.modeling import tiny


def wrap(model, kind):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def largest_difference(make, compute, kind, rank):
    """Of the values of this rank's rows, and of all gradients of their sum."""
    alone, model = make(), make()
    ids, mask = tiny.rows(lengths=(7, 3, 5, 6))
    mine = slice(2 * rank, 2 * rank + 2)
    wrapped = wrap(model, kind)
    expected, actual = compute(alone, ids, mask), compute(wrapped, ids[mine], mask[mine])
    (expected.sum() / 2).backward()  # the wrappers average over the two processes
    actual.sum().backward()
    differences = [(actual - expected[mine]).abs().max().item()]
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        gradient = a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad
        differences.append((gradient - b.grad).abs().max().item())
    return max(differences)


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
    return found
