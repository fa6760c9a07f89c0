"""Run by `tests.warm.run_ranks` on two processes, which have one vLLM engine, or on four, which have two. Arguments: a
folder for what is found."""

import copy
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from align.data import toy
from align.errors import ConfigError, RolloutError
from align.reward_models.remote import RemoteReward
from align.rollout import SamplingParams, make_engine, vllm_watch
from align.rollout.vllm_requests import stepping
from tests.reward_models.test_remote import server
from tests.rollout.rollout_models import llama, never_ending, prompts
from tests.rollout.two_ranks import check, shard, with_adapter
from tests.trainers.on_policy.talks import length_of_answers, talking_run
from tests.trainers.tiny_runs import logged, on_policy, wanted_words
from tests.trainers.tiny_runs import prompts as toy_prompts

SHARED = {"backend": "vllm", "tensor_parallel": 2}
CUTS = {2: (0, 3, 4), 4: (0, 1, 1, 3, 4)}  # of `ASKED` between the processes; one of four asks nothing
ASKED = list(
    zip(
        prompts([4, 140, 30, 7]),
        [SamplingParams(12, n=3, temperature=0.7, seed=1), SamplingParams(9, temperature=0)]
        + [SamplingParams(20, n=2, seed=2), SamplingParams(5, seed=3)],
        strict=True,
    )
)


def drawn(engine, asked) -> list:
    told: dict = {}
    made = engine.generate([ids for ids, _ in asked], [params for _, params in asked], on_done=told.__setitem__)
    assert told == {index: rollout.completions for index, rollout in enumerate(made)}  # of this rank's requests alone
    return [[(c.token_ids, c.logprobs) for c in rollout.completions] for rollout in made]


@contextmanager
def served(function):
    """The same reward behind a server, which is asked about completions while others are drawn."""
    with server(lambda content: {"scores": function(content["completions"])}) as (url, _):
        yield RemoteReward(url, batch_size=2)


def trained(engine, folder: Path, processes: int, rollout: dict) -> dict:
    """Three steps on eight prompts each, and an evaluation of five, which the processes cannot share evenly."""
    options = {"per_device_train_batch_size": 8 // processes, "per_device_eval_batch_size": 1}
    options |= {"max_steps": 3, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 3}
    options |= {"partial_rollouts": 2, "rollout_correction": "token_truncate"}
    trainer_class, args = on_policy("remax", folder, seed=6, rollout=rollout, **options)
    data = toy_prompts(64), toy_prompts(5, seed=1)
    model = copy.deepcopy(llama(3, vocab_size=96))
    with served(wanted_words) as reward:
        trainer = trainer_class(model, reward, args, *data, processing_class=toy.tokenizer(), engine=engine)
        trainer.train()
    keys = ("reward", "remax/greedy_reward", "completions/mean_length", "eval_proxy", "rollout/share_1_rollouts_old")
    return {key: logged(trainer, key) for key in (*keys, "loss", "rollout/mean_abs_logp_diff")}


def odd(completions, **columns) -> list[float]:
    """Two samples of a prompt are often equal, and other prompts are drawn in their place."""
    return [float(len(text) % 2) for text in completions]


def refilled(engine, folder: Path, processes: int, rollout: dict) -> dict:
    """Groups without signal are replaced, more often on one process than on another."""
    options = {"per_device_train_batch_size": 8 // processes, "num_generations": 2, "dynamic_sampling_rounds": 3}
    trainer_class, args = on_policy("rloo", folder, seed=6, rollout=rollout, max_steps=3, learning_rate=5e-3, **options)
    with served(odd) as reward:
        trainer = trainer_class(
            llama(3, vocab_size=96), reward, args, toy_prompts(64), processing_class=toy.tokenizer(), engine=engine
        )
        trainer.train()
    keys = ("reward", "loss", "dynamic_sampling/rounds", "dynamic_sampling/without_signal", "dynamic_sampling/left")
    return {key: logged(trainer, key) for key in keys}


def talked(engine, folder: Path, processes: int, rollout: dict) -> list:
    """Conversations, which on one process take more turns than on another."""
    engine.eos_token_ids, kept = (2, *range(3, 96, 4)), engine.eos_token_ids
    with served(length_of_answers) as reward:
        options = {"rollout": rollout, "per_device_train_batch_size": 8 // processes}
        found = talking_run(folder, engine, reward=reward, **options)
    engine.eos_token_ids = kept
    return found


def check_what_one_process_does_wrong(engine, model, last: bool) -> None:
    """Is raised in all: the others would wait for it."""
    with pytest.raises(RolloutError, match="prompt 0 of this call is empty"):
        engine.generate([[]] if last else [[5]], SamplingParams(3))
    lost = []
    if last:  # of its slice of the embedding, which the other does not hold
        engine._llm.apply_model(lambda own: lost.append(own.model.embed_tokens.weight.data[0, 0].add_(1e-3)))
    with pytest.raises(RolloutError, match="1 differ .model.embed_tokens.weight"):
        engine.verify(model)
    engine.push(model, 7)


def check_that_who_does_not_come_is_named(engine, rank: int) -> None:
    """While it does something else for longer than the limit; not where it takes longer at what all are at."""
    watch, said = engine._sharing.watch, []
    kept = watch.seconds, watch.end
    watch.seconds, watch.end = 2.0, said.append
    vllm_engine = engine._llm.llm_engine
    step, pauses = vllm_engine.step, [3.0] * (rank % 2)
    with stepping(vllm_engine, lambda: (time.sleep(pauses.pop() if pauses else 0), step())[1]):
        engine.generate([[5]], SamplingParams(2))
    assert said == [] and not pauses
    if rank % 2:
        time.sleep(5)
    engine.generate([[5]], SamplingParams(1))
    watch.seconds, watch.end = kept
    assert len(said) == (rank + 1) % 2
    last = watch.here.count - 2
    for told in said:
        assert f"processes {rank}, {rank + 1} share a vLLM engine, and process {rank} waited for 2." in told
        assert (
            f"seconds (limit: 2, by ddp_timeout) in step {last + 1}, the check of requests: process {rank + 1} " in told
        )
        assert told.endswith(f"did not come, and is busy with something else (its last: step {last}, completions)")


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))  # what hangs says where
    vllm_watch.BEAT = 0.1
    rank, world, model = dist.get_rank(), dist.get_world_size(), never_ending(llama())
    with pytest.raises(ConfigError, match=f"shares an engine between 3 processes of the run, which has {world}"):
        make_engine(model, backend="vllm", max_model_len=256, tensor_parallel=3)
    engine = make_engine(model, toy.tokenizer(), max_model_len=256, seed=rank, **SHARED)
    start, end = CUTS[world][rank : rank + 2]
    found = {"drawn": drawn(engine, ASKED[start:end]), "none": drawn(engine, ASKED[: 2 * (rank % 2)])}
    found["proved"] = engine.push(model, 1).proved_tensors
    make_engine(model, max_model_len=64, **SHARED).close()  # a neighbour, which takes no process group along
    check_what_one_process_does_wrong(engine, model, rank == world - 1)
    check_that_who_does_not_come_is_named(engine, rank)
    check(engine, never_ending(llama(4)), never_ending(llama(4)), 8)
    check(engine, shard(never_ending(llama(1))), never_ending(llama(1)), 9)
    check(engine, shard(with_adapter(never_ending(llama(2)))), with_adapter(never_ending(llama(2))), 10)
    found["trained"] = trained(engine, folder / "run", world, SHARED)
    found["refilled"] = refilled(engine, folder / "refilled", world, SHARED)
    found["talked"] = talked(engine, folder / "talks", world, SHARED)
    engine.close()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
