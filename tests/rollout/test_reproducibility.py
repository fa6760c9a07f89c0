"""The same draws again: whatever else is in the call, in a resumed run, and without touching anybody else's draws."""

import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from align.errors import RolloutError
from align.rollout import SamplingParams, make_engine
from align.rollout.seeds import derive_seed
from tests.rollout.rollout_models import VLLM_INSTALLED, is_greedy, llama, needs_vllm, never_ending, prompts
from tests.warm import run_ranks

SAMPLED = SamplingParams(max_tokens=12)


def tokens(rollouts) -> list[list[list[int]]]:
    return [[c.token_ids for c in r.completions] for r in rollouts]


def test_draws_do_not_depend_on_what_else_is_in_the_call(holding):
    model, ids = never_ending(llama()), prompts([4, 50, 7, 20])
    alone = holding(model, seed=5).generate(ids[:1], SAMPLED)
    together = holding(model, seed=5).generate(ids, [SAMPLED, SamplingParams(20, n=3), SAMPLED, SAMPLED])
    assert tokens(together)[:1] == tokens(alone)


def test_draws_do_not_depend_on_who_shares_the_prompt(holding):
    """The engine computes a prompt once for all that have it."""
    model, ids = never_ending(llama()), prompts([100])
    seeded, other = SamplingParams(12, seed=3), SamplingParams(12, n=2, seed=4)
    alone = holding(model, seed=5).generate(ids, seeded)
    together = holding(model, seed=5).generate(ids * 3, [SamplingParams(12, temperature=0), other, seeded])
    assert tokens(together)[2:] == tokens(alone)


@needs_vllm
def test_draws_do_not_depend_on_the_room_in_the_cache():
    """With room for two and a half sequences, vLLM interrupts sequences and takes them up again."""
    model, ids = never_ending(llama()), prompts([120] * 8)
    params = SamplingParams(30, n=2)  # each sequence grows from four blocks of 32 tokens into five
    drawn = []
    for kv_cache_gib in (None, 12 * 32 / 2**20):  # 1 KiB per token
        engine = make_engine(model, backend="vllm", max_model_len=256, kv_cache_gib=kv_cache_gib)
        drawn.append(tokens(engine.generate(ids, params)))
        engine.close()
    assert drawn[0] == drawn[1]


def test_a_seeded_request_is_drawn_the_same_everywhere(engine):
    ids = prompts([4, 50, 7])
    seeded = SamplingParams(max_tokens=12, n=2, seed=11)
    calls = engine.calls
    alone = tokens(engine.generate(ids[2:], seeded))
    among = tokens(engine.generate(ids, [seeded, SamplingParams(3, temperature=0), seeded]))
    assert among[2:] == alone
    assert engine.calls == calls  # such calls do not move the engine's own draws


def test_two_calls_and_two_seeds_draw_differently(holding):
    model, ids = never_ending(llama()), prompts([4])
    engine = holding(model, seed=1)
    first, second = tokens(engine.generate(ids, SAMPLED)), tokens(engine.generate(ids, SAMPLED))
    other = tokens(holding(model, seed=2).generate(ids, SAMPLED))
    assert first != second and other not in (first, second)


def test_a_resumed_engine_goes_on_with_the_same_draws(holding):
    first, second, ids = never_ending(llama(0)), never_ending(llama(1)), prompts([4, 150])
    engine = holding(first, seed=9)
    engine.generate(ids, SAMPLED)
    state = engine.state_dict()
    engine.push(second, 1)
    expected = [engine.generate(ids, SAMPLED), engine.generate(ids, SAMPLED)]
    resumed = holding(second, seed=12345)
    resumed.load_state_dict(state)
    resumed.push(second, 1)
    assert [resumed.generate(ids, SAMPLED), resumed.generate(ids, SAMPLED)] == expected


def test_seeds_are_spread_and_stable():
    assert derive_seed("engine", 0, 0, 0) == 4283829292330496264
    seeds = {derive_seed("engine", 0, call, index) for call in range(40) for index in range(25)}
    assert len(seeds) == 1000 and all(0 <= seed < 1 << 62 for seed in seeds)


def random_states():
    numpy_state = [np.asarray(x).tolist() for x in np.random.get_state()[1:]]
    return random.getstate(), torch.get_rng_state().tolist(), numpy_state


def test_the_process_is_left_as_it_was(make):
    """Two engines one after another: random states, threads, environment, torch's functions, process group."""
    before = (
        random_states(),
        dict(os.environ),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.accelerator.synchronize,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        dist.is_initialized(),
    )
    model = never_ending(llama())
    for version in range(2):
        engine = make(model)
        engine.generate(prompts([3, 5]), SAMPLED)
        engine.push(llama(1), version)
        engine.generate(prompts([3, 5]), SAMPLED)
        engine.close()
        engine.close()
        with pytest.raises(RolloutError, match="closed"):
            engine.generate(prompts([3]), SAMPLED)
        with pytest.raises(RolloutError, match="closed"):
            engine.push(model, 1)
    after = (
        random_states(),
        dict(os.environ),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.accelerator.synchronize,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        dist.is_initialized(),
    )
    assert after == before


def test_the_trainer_can_make_its_process_group_beside_the_engine(make, tmp_path):
    engine = make(never_ending(llama()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        engine.generate(prompts([3]), SAMPLED)
        engine.push(llama(1), 1)
        engine.close()
        ones = torch.ones(2)
        dist.all_reduce(ones)
        assert dist.is_initialized() and ones.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()


def test_closing_one_of_two_engines_leaves_the_other_working(make):
    models, ids = [never_ending(llama(seed)) for seed in (0, 1)], prompts([3, 40])
    first, second = make(models[0]), make(models[1])
    first.close()
    for rollout in second.generate(ids, SamplingParams(8, temperature=0)):
        assert is_greedy(models[1], rollout.prompt_ids, rollout.completions[0].token_ids)
    second.push(models[0], 1)
    third = make(models[1])
    second.close()
    third.verify(models[1])
    third.push(models[0], 1)


@needs_vllm
def test_training_goes_on_after_an_engine_was_made(holding):
    model = llama()
    holding(model)
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")  # the trainer's own compilation still works
    assert compiled(torch.ones(2)).tolist() == [3, 3]
    ids = torch.tensor(prompts([12]))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_two_ranks_each_have_their_engines(tmp_path):
    """Their gloo group survives the engines; each rank's engine holds its rank's model, or the gathered shards."""
    backends = ["transformers", "vllm"] if VLLM_INSTALLED else ["transformers"]
    for printed in run_ranks("tests.rollout.two_ranks", *backends, logs=tmp_path):
        for backend in backends:
            assert printed.count(f"{backend} done") == 1
