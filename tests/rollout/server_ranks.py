"""Run by `tests.trainers.two_processes.run_on_two`: both processes draw from the servers that the first one fills.

Arguments: the addresses; a folder for what is found.
"""

import copy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from align.data import toy
from align.errors import ConfigError, RolloutError
from align.rollout import SamplingParams, make_engine
from align.rollout.server import delivery
from align.rollout.server.group import Group
from tests.rollout.rollout_models import llama, never_ending, prompts
from tests.rollout.two_ranks import check, shard, with_adapter
from tests.trainers.tiny_runs import logged, on_policy, wanted_words
from tests.trainers.tiny_runs import prompts as toy_prompts


def check_failures_of_one_process(engine, rank: int, urls: list[str]) -> None:
    """What fails in one process is raised in both: the other would wait for it."""
    model = never_ending(llama(5))
    with patch.object(delivery, "save_file", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(RolloutError, match="weights cannot be written to .*No space left"):
            engine.push(model, 5)
    check(engine, model, model, 6)
    with pytest.raises(ConfigError, match="transfer_folder: /nowhere is not a folder"):
        make_engine(model, backend="server", urls=urls, max_model_len=256, transfer_folder="/nowhere")
    variable = {"api_key_env": "ALIGN_NO_KEY", "api_key_file": "/nowhere"} if rank else {}
    with pytest.raises(ConfigError, match="no key for the rollout server"):
        make_engine(model, backend="server", urls=urls, max_model_len=256, **variable)


def check_a_late_process(engine, rank: int) -> None:
    """A push waits for what the other process still draws, which the servers would give up."""
    if rank:
        engine.generate(prompts([4] * 8), SamplingParams(max_tokens=200, temperature=0))
    check(engine, never_ending(llama(4)), never_ending(llama(4)), 2)


def check_broadcasts(rollout: dict, rank: int) -> None:
    """Shards are gathered by both and sent by the first; where it fails, both hear of it."""
    engine = make_engine(never_ending(llama()), max_model_len=256, transfer="gloo", timeout=10, **rollout)
    check(engine, shard(never_ending(llama(1))), never_ending(llama(1)), 1)
    with patch.object(Group, "broadcast", side_effect=RolloutError("weights could not be broadcast: a cable")):
        with pytest.raises(RolloutError, match="a cable|could not be broadcast over gloo"):
            engine.push(never_ending(llama(4)), 2)
    engine.close()


def main(urls: list[str], folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rollout = {"backend": "server", "urls": urls}
    engine = make_engine(never_ending(llama()), max_model_len=256, seed=rank, **rollout)
    check(engine, never_ending(llama(4)), never_ending(llama(4)), 1)
    check_a_late_process(engine, rank)
    check(engine, shard(never_ending(llama(1))), never_ending(llama(1)), 3)
    check(engine, shard(with_adapter(never_ending(llama(2)))), with_adapter(never_ending(llama(2))), 4)
    check_failures_of_one_process(engine, rank, urls)
    engine.close()
    check_broadcasts(rollout, rank)
    trainer_class, args = on_policy(
        "rloo", folder / "run", max_steps=3, learning_rate=5e-3, per_device_train_batch_size=4, rollout=rollout
    )
    model = copy.deepcopy(never_ending(llama(3, vocab_size=96)))
    trainer = trainer_class(model, wanted_words, args, toy_prompts(64), processing_class=toy.tokenizer())
    trainer.train()
    trainer.close()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    gaps = logged(trainer, "rollout/mean_abs_logp_diff")
    torch.save({"weights": weights, "gaps": gaps, "loss": logged(trainer, "loss")}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    first, found, *others = sys.argv[1:]
    main([first, *others], Path(found))
