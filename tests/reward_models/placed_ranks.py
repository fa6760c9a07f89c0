"""Rewards whose models are on some ranks alone, on two processes. Run as a script: a folder with reward models."""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from align.errors import AlignError, RewardError
from align.modeling.fingerprint import mark
from align.reward_models.base import RewardBatch, score_together
from align.reward_models.build import build_reward
from align.reward_models.by_model import ModelReward
from align.reward_models.early import EarlyRewards
from align.reward_models.rules import RuleReward
from tests.reward_models import worlds

WORDS = [" ".join(f"w{(i * j) % 30}" for j in range(1, 2 + i % 7)) for i in range(1, 25)]
SHARES = {"uneven": ([3, 14], [5]), "empty": ([], [7]), "all": ([9], [11])}  # lengths of what each rank scores


def batch_of(rank: int, share: str) -> RewardBatch:
    count = sum(SHARES[share][rank])
    own = WORDS[rank * 3 : rank * 3 + count] if count <= len(WORDS) - 3 else WORDS[:count]
    return RewardBatch(
        [f"w{rank} w2 "] * len(own), list(own), columns={"answer": own}, rows=[100 * rank + i for i in range(len(own))]
    )


def short(completions, **_):
    return [None if len(text) < 4 else -float(len(text)) for text in completions]


def refuses_on_rank_1(completions, **_):
    if PartialState().process_index == 1:
        raise ValueError("no")
    return [0.0] * len(completions)


def specs(folder: Path) -> dict:
    """By name, as they are without `ranks`, and where their models are put."""

    def one(name: str, **options) -> dict:
        return {"type": "classifier", "path": str(folder / name), "name": name, "batch_tokens": 40, **options}

    implicit = {"type": "implicit", "path": str(folder / "dpo"), "reference": str(folder / "sft"), "batch_tokens": 40}
    adapter = {"type": "implicit", "path": str(folder / "dpo_lora"), "batch_tokens": 40}
    rule = {"type": "rule", "function": f"{__file__}:short", "name": "short"}

    def members(*ranks: dict) -> dict:
        own = [one(name, **place) for name, place in zip(("a", "b"), ranks, strict=True)]
        return {"type": "ensemble", "aggregation": "uwo", "lambda": 0.5, "members": own, "name": "members"}

    saved = {"type": "ensemble", "aggregation": "quantile", "quantile": 0.25, "path": str(folder / "saved")}
    trunk = {"type": "ensemble", "aggregation": "wco", "path": str(folder / "trunk")}
    mixed = {"type": "composite", "name": "mixed", "weights": {"members": 0.5, "short": 1.0}}
    return {
        "on 1": (one("a"), one("a", ranks=[1])),
        "on both": (one("a"), one("a", ranks=[1, 0])),
        "offloaded": (one("a"), one("a", ranks=[0], offload=True)),
        "implicit": (implicit, {**implicit, "ranks": [1]}),
        "adapter": (adapter, {**adapter, "ranks": [1]}),
        "members": (members({}, {}), members({"ranks": [1]}, {"ranks": [0]})),
        "saved": (saved, {**saved, "ranks": [1]}),
        "trunk": (trunk, {**trunk, "ranks": [1]}),
        "composite": (
            {**mixed, "rewards": [members({}, {}), rule]},
            {**mixed, "rewards": [members({"ranks": [1]}, {}), rule]},
        ),
    }


def parameters() -> int:
    """Of all models in this process."""
    gc.collect()
    held = {id(p): p.numel() for thing in gc.get_objects() if isinstance(thing, nn.Module) for p in thing.parameters()}
    return sum(held.values())


def models_of(reward) -> list[ModelReward]:
    parts = [model for part in reward.parts() for model in models_of(part)]
    return [reward] if isinstance(reward, ModelReward) else parts


def compare(folder: Path, rank: int) -> dict:
    found: dict = {}
    for name, (everywhere, placed) in specs(folder).items():
        reward = build_reward(everywhere, tokenizer=worlds.tokenizer())
        first = mark(reward)
        outputs = {share: reward.score(batch_of(rank, share), partial=True) for share in SHARES if share != "empty"}
        if rank == 1:
            outputs["empty"] = reward.score(batch_of(rank, "empty"), partial=True)
        count, before = sum(p.numel() for m in models_of(reward) for own in m.models() for p in own.parameters()), 0
        del reward
        before = parameters()
        reward = build_reward(placed, tokenizer=worlds.tokenizer())
        held = parameters() - before
        checks = {"placed": reward.placed, "mark": mark(reward) == first}
        for share in SHARES:
            made = reward.score(batch_of(rank, share), partial=True)
            if share in outputs:
                checks[share] = same(made, outputs[share])
            else:
                checks[share] = made.scores.tolist() == []
        reward.check_room(2, 3, conversational=False)
        reward.offload()
        checks["again"] = same(reward.score(batch_of(rank, "all"), partial=True), outputs["all"])
        found[name] = {"whole": count, "held": held, **checks}
        del reward
    return found


def same(made, expected) -> bool:
    """To the bit: the model's batches are those of a model in every process."""
    names = made.extras.keys() == expected.extras.keys() and made.columns == expected.columns
    pairs = [(made.scores, expected.scores), *((made.extras[key], value) for key, value in expected.extras.items())]
    missing = [(a is None) == (b is None) for a, b in [(made.absent, expected.absent), (made.failed, expected.failed)]]
    return names and all(missing) and all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in pairs)


def errors(folder: Path, rank: int) -> dict:
    """What each rank is told."""
    one = {"type": "classifier", "path": str(folder / "a"), "name": "a", "ranks": [1]}
    batch = batch_of(rank, "all")
    found = {}

    def told(name, action):
        try:
            action()
            found[name] = None
        except (AlignError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    told("beyond", lambda: build_reward({**one, "ranks": [2]}))
    told("no model", lambda: build_reward({**one, "path": str(folder / "sft")}))
    reward = build_reward({**one, "max_length": 16}, tokenizer=worlds.tokenizer())
    long = RewardBatch(["w1 "] * 2, ["w2", "w3 " * 20], rows=[4, 5])
    told("too long on 0", lambda: reward.score(long if rank == 0 else batch_of(1, "all")))
    if rank == 1:
        with torch.no_grad():
            reward.model.model.embed_tokens.weight[6 + 29] = float("nan")
    numbers = RewardBatch(["w1 "] * 2, ["w2", "w29" if rank == 0 else "w3"], rows=[4, 5])
    told("nan of 0", lambda: reward.score(numbers))

    def no_memory(inputs):
        raise torch.OutOfMemoryError("no")

    reward.forward = no_memory
    told("broken owner", lambda: reward.score(numbers))
    reward = build_reward({"type": "composite", "rewards": [one, f"{__file__}:refuses_on_rank_1"]})
    told("rule beside it", lambda: reward.score(batch))
    told("begun beside it", lambda: begun(build_reward(one), batch, rank))
    told("after all", lambda: build_reward(one).score(batch))
    return found


async def refuses(completions, **_):
    raise RewardError("no")


def begun(reward, batch: RewardBatch, rank: int) -> None:
    """What rank 0 scores has begun before all of it was there; rank 1 has nothing to score."""
    rewards = [RuleReward(refuses), reward]
    if rank:
        score_together(rewards, RewardBatch([], []), partial=True)
        return
    early = EarlyRewards(rewards, batch, user_code=True, partial=True)
    early.take(batch, range(len(batch)))
    early.outputs(batch)


if __name__ == "__main__":
    state, folder = PartialState(cpu=True), Path(sys.argv[1])
    rank = state.process_index
    found = {"same": compare(folder, rank), "told": errors(folder, rank)}
    reward = build_reward({"type": "classifier", "path": str(folder / "a"), "name": "a", "ranks": [1]})
    if rank == 0:
        try:
            reward.score(batch_of(0, "all"))
        except RewardError as error:
            found["lost"] = f"{type(error).__name__}: {error}"
    (folder / f"found_{rank}.json").write_text(json.dumps(found))  # of rank 1, which ends
    torch.distributed.destroy_process_group()
