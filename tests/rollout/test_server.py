"""Real vLLM servers, started by `align serve`: what comes out of them, what goes in, and what they survive."""

import copy
import os
import re
import shlex
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import requests
import torch
import yaml
from peft import LoraConfig, get_peft_model

from align.cli.main import build_parser
from align.config.resolve import resolve
from align.data import toy
from align.errors import ConfigError, RolloutError
from align.rollout import SamplingParams, make_engine, rollout_options
from align.rollout.engine import end_tokens
from align.rollout.seeds import derive_seed
from align.rollout.server import delivery
from align.rollout.server.client import Server
from tests.rollout import (
    server_limits,
    server_restarts,
    server_transfers,
    test_generation,
    test_push,
    test_reproducibility,
)
from tests.rollout.rollout_models import is_greedy, llama, needs_vllm, never_ending, own_logps, prompts
from tests.rollout.served import KEY, Served, connected
from tests.trainers.on_policy.talks import babbling_tokenizer, talking_run
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, wanted_words
from tests.trainers.tiny_runs import prompts as toy_prompts
from tests.trainers.two_processes import run_on_two

pytestmark = [needs_vllm, pytest.mark.vllm]
SAMPLED = SamplingParams(12, n=3, temperature=0.7)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    servers = Served(tmp_path_factory.mktemp("served"), 2)
    for number in range(2):
        servers.start(number)
    for number in range(2):
        servers.ready(number)
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def both(served):
    with connected(served, never_ending(llama()), timeout=30) as engine:
        yield engine


@pytest.fixture
def holding(both):
    """holding(model, seed=0, dtype=None), as that of every engine."""

    def give(model, seed: int = 0, dtype=None):
        both.push(model, 0)
        both.load_state_dict({"seed": seed, "calls": 0})
        both.eos_token_ids = end_tokens(model, None)
        return both

    return give


@pytest.fixture
def engine(holding):
    return holding(never_ending(llama()), seed=7)


@pytest.fixture(scope="module")
def model():
    return never_ending(llama())


# The contract of every engine.
test_order = test_generation.test_sampled_and_greedy_requests_share_a_call_and_keep_their_order
test_told = test_generation.test_what_is_done_is_told_once_and_whole
test_logprobs = test_generation.test_logprobs_are_the_models_at_the_sampling_temperature
test_truncated = test_generation.test_truncated_logprobs_are_renormalised_over_what_can_be_drawn
test_penalty = test_generation.test_a_repetition_penalty_is_that_of_transformers
test_many_prompt_tokens = test_generation.test_a_call_with_more_prompt_tokens_than_one_scheduling_step_takes
test_samples_differ = test_generation.test_samples_of_one_prompt_differ
test_distribution = test_generation.test_draws_follow_the_distribution
test_end_token = test_generation.test_the_end_token_ends_and_is_part_of_the_completion
test_bad_prompts = test_generation.test_prompts_that_cannot_be_completed_are_named
test_full_sequence = test_generation.test_a_sequence_may_fill_the_engine_to_the_last_token
test_what_else_is_in_the_call = test_reproducibility.test_draws_do_not_depend_on_what_else_is_in_the_call
test_resumed = test_reproducibility.test_a_resumed_engine_goes_on_with_the_same_draws
# What they are kept from, and what is waited for.
test_more_prompts = server_limits.test_more_prompts_than_files_may_be_open
test_too_long = server_limits.test_completions_that_take_too_long_are_counted
test_in_common = server_limits.test_what_servers_must_have_in_common
test_proof = server_limits.test_the_proof_is_made_as_the_servers_make_theirs
test_lost_in_the_proof = server_limits.test_a_server_that_is_lost_during_the_proof_is_waited_for
test_lost_at_the_start = server_limits.test_a_server_that_is_lost_while_a_run_connects_is_waited_for
test_started_anew = server_limits.test_a_server_that_was_started_anew_is_known_by_its_empty_label
test_not_there_yet = server_limits.test_a_server_that_is_not_there_yet_is_waited_for_but_not_for_ever
# Servers that were started anew, or frozen for a while.
test_comes_back = server_restarts.test_a_server_that_comes_back_gets_the_weights_again
test_broken_off = server_restarts.test_completions_that_a_server_breaks_off_are_of_a_lost_server
test_adapter_after_a_restart = server_restarts.test_an_adapter_goes_to_no_server_without_what_it_lies_on
test_push_after_a_restart = server_restarts.test_a_server_that_was_started_anew_before_a_push_is_learned_anew
# Weights without files.
test_broadcast = server_transfers.test_weights_are_broadcast_to_all_workers
test_broadcast_with_adapter = server_transfers.test_an_adapter_goes_as_one_beside_a_broadcast
test_broadcast_to_a_frozen_server = server_transfers.test_a_server_that_takes_no_part_is_named_in_time
test_transfers_that_cannot_be = server_transfers.test_what_cannot_be_here_is_refused
test_part_of_a_push = test_push.test_a_push_that_arrives_in_part_is_found


def drawn(engine, ids, params=SAMPLED):
    return [[(c.token_ids, c.logprobs) for c in r.completions] for r in engine.generate(ids, params)]


def test_both_servers_have_every_push_and_take_part(both, monkeypatch):
    asked = []
    call = Server.call

    async def counted(self, http, method, path, *rest, **named):
        asked.append((self.url, path))
        return await call(self, http, method, path, *rest, **named)

    monkeypatch.setattr(Server, "call", counted)
    ids = prompts([4, 30, 140, 60])
    for version, seed in enumerate([1, 0, 1], start=1):
        model = never_ending(llama(seed))
        assert both.push(model, version).proved_tensors == len(dict(model.named_parameters()))
        for rollout in both.generate(ids, SAMPLED):
            assert rollout.weight_version == version
            for sample in rollout.completions:
                expected = own_logps(model, rollout.prompt_ids, sample.token_ids, SAMPLED.temperature)
                torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=1e-4)
    for url in both.servers:
        assert asked.count((url.url, "/inference/v1/generate")) >= 3


def test_a_request_is_told_when_all_that_it_was_cut_into_is_answered(engine, monkeypatch):
    told, ids = [], prompts([5, 9])
    whole = drawn(engine, ids, SamplingParams(6, n=7, seed=1))
    for server in engine.servers:
        monkeypatch.setattr(server, "max_num_seqs", 3)
    found = engine.generate(ids, SamplingParams(6, n=7, seed=1), on_done=lambda *of: told.append(of))
    assert sorted(told, key=lambda of: of[0]) == [(index, rollout.completions) for index, rollout in enumerate(found)]
    assert [[c.token_ids for c in rollout.completions] for rollout in found] == [
        [ids for ids, _ in own] for own in whole
    ]


def test_draws_are_those_of_vllm_in_this_process(holding):
    """Also where a request has more samples than a server takes at a time."""
    model, ids = never_ending(llama()), prompts([5, 90])
    params = [SamplingParams(4, n=300, seed=3), SamplingParams(20, n=2)]
    inside = make_engine(model, backend="vllm", max_model_len=256, seed=4)
    expected = drawn(inside, ids, params)
    inside.close()
    assert drawn(holding(model, seed=4), ids, params) == expected
    assert len(expected[0]) == 300 and derive_seed("request", 3)


def test_without_the_key_nothing_answers(served, both, monkeypatch):
    for path in ("/health", "/update_weights", "/collective_rpc", "/v1/models", "/inference/v1/generate"):
        assert requests.post(served.urls[0] + path, json={}, timeout=10).status_code == 401
    monkeypatch.setattr(both.servers[1], "key", "another")
    with pytest.raises(RolloutError, match=f"{served.urls[1]} does not take the key"):
        both.generate(prompts([4, 5]), SAMPLED)
    assert "another" not in repr(both.servers[1])


def test_an_interrupted_push_is_not_drawn_from_and_the_next_one_is_whole(both, monkeypatch):
    first, second, ids = never_ending(llama(0)), never_ending(llama(1)), prompts([4, 140])
    both.push(first, 1)
    chunks = delivery.chunks

    def half(weights, folder):
        yield next(chunks(weights, folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(delivery, "CHUNK", 1 << 16)
    monkeypatch.setattr(delivery, "chunks", half)
    with pytest.raises(KeyboardInterrupt):
        both.push(second, 2)
    monkeypatch.setattr(delivery, "chunks", chunks)
    with pytest.raises(RolloutError, match="127.0.0.1:.* a push did not reach it whole"):
        both.generate(ids, SAMPLED)
    both.push(second, 2)
    for rollout in both.generate(ids, SamplingParams(8, temperature=0)):
        assert is_greedy(second, rollout.prompt_ids, rollout.completions[0].token_ids)


def test_an_adapter_goes_as_an_adapter(served, monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(never_ending(llama(2)), LoraConfig(r=8, target_modules="all-linear"))
    ids = prompts([5, 140])
    with connected(served, model) as engine:
        written = []
        monkeypatch.setattr(delivery, "written", lambda *rest: written.append(rest))
        for version in (1, 2):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
            report = engine.push(model, version)
            assert report.arrived_share == pytest.approx(1) and report.proved_tensors == 2 * 14 + 1
            for rollout in engine.generate(ids, SAMPLED):
                for sample in rollout.completions:
                    expected = own_logps(model, rollout.prompt_ids, sample.token_ids, SAMPLED.temperature)
                    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=1e-4)
        assert not written  # the weights under it do not move
        with torch.no_grad():
            model.base_model.model.model.layers[1].mlp.up_proj.lora_A.default.weight[0, 0] *= 1 + 1e-6
        with pytest.raises(
            RolloutError, match=f"{served.urls[0]}.*1 differ .*up_proj.lora_A|{served.urls[1]}.*1 differ"
        ):
            engine.verify(model)


def test_a_run_draws_and_learns_what_it_does_with_vllm_in_its_process(served, tmp_path):
    model, logs = never_ending(llama(3, vocab_size=96)), []
    for engine in ("vllm", "server"):
        text = toy.tokenizer()
        servers = connected(served, model, tokenizer=text, seed=6) if engine == "server" else nullcontext()
        with servers as given:
            options = {"max_steps": 3, "learning_rate": 5e-3, "seed": 6, "rollout": "vllm"}
            trainer_class, args = on_policy("rloo", tmp_path, **options)
            trainer = trainer_class(
                copy.deepcopy(model),
                wanted_words,
                args,
                toy_prompts(64),
                processing_class=text,
                engine=given,
            )
            trainer.train()
            trainer.close()
            logs.append([logged(trainer, key) for key in ("reward", "loss", "kl", "rollout/mean_abs_logp_diff")])
    assert len(logs[0][0]) == 3 and logs[0] == logs[1]


def test_conversations_are_those_of_vllm_in_this_process(served, tmp_path):
    """An environment and a tool, several turns in flight: the log-probs of every turn are the trainer's on the whole
    conversation, the run is the same wherever vLLM is, and nothing of it is left under way."""
    model = llama(3, vocab_size=96)
    model.generation_config.eos_token_id = list(range(3, 96, 4))  # as in `talking_run`
    logs = [talking_run(tmp_path, rollout="vllm")]
    with connected(served, model, tokenizer=babbling_tokenizer(), seed=6) as given:
        logs.append(talking_run(tmp_path, given, rollout="vllm"))
    turns, calls, finished, *_, gaps = logs[0]
    assert min(turns) > 2 and min(calls) > 0.3 and max(finished) > 0 and max(gaps) < 1e-5
    assert logs[0] == logs[1]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_draws_ahead_and_goes_on_exactly(served, tmp_path, monkeypatch, parts):
    """The servers draw while the policy trains, from the weights of the rollout before; what they drew is resumed, and
    so are completions that they have drawn a part of."""
    monkeypatch.setenv("ALIGN_ROLLOUT_KEY", KEY)
    model, runs = never_ending(llama(3, vocab_size=96)), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        options = {"rollouts_ahead": 1, "rollout_correction": "token_truncate", "max_steps": 4, "learning_rate": 5e-3}
        options |= {"partial_rollouts": parts, "rollout": {"backend": "server", "urls": served.urls}}
        trainer_class, args = on_policy("rloo", tmp_path, save_strategy="steps", save_steps=2, **options)
        trainer = trainer_class(
            copy.deepcopy(model), wanted_words, args, toy_prompts(64), processing_class=toy.tokenizer()
        )
        under_way, update = [], trainer.compute_loss

        def compute_loss(*rest, trainer=trainer, under_way=under_way, update=update, **named):
            under_way.append(trainer.ahead._answer is not None)
            return update(*rest, **named)

        trainer.compute_loss = compute_loss
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        assert under_way == [True, True, True, False][-2 if resume else 0 :]
        older = 0.5 * (parts > 1)  # the first half of nearly every completion is of one rollout before that
        assert logged(trainer, "rollout/staleness") == pytest.approx([0, 1, 1 + older, 1 + older], abs=0.05)
        runs.append((logged(trainer, "reward"), logged(trainer, "loss"), parameters(trainer.model)))
    assert runs[0][:2] == runs[1][:2]
    assert_same(runs[0][2], runs[1][2])


def test_two_processes_share_the_servers(served, tmp_path, monkeypatch):
    """Copies, shards and sharded adapters arrive from two processes, and a run on two of them trains one policy."""
    monkeypatch.setenv("ALIGN_ROLLOUT_KEY", KEY)
    first, second = run_on_two("tests.rollout.server_ranks", tmp_path / "two", *served.urls)
    assert torch.equal(first["weights"], second["weights"]) and first["loss"] == second["loss"]
    assert len(first["gaps"]) == 3 and max(first["gaps"]) < 1e-5


def test_a_run_that_takes_the_servers_is_named_by_the_one_that_had_them(served, both):
    both.push(llama(0), 1)
    with connected(served, llama(1)):
        with pytest.raises(RolloutError, match=f"{served.urls[0]} has the weights of another run|{served.urls[1]} has"):
            both.generate(prompts([4, 5]), SAMPLED)
    both.push(llama(0), 2)
    both.generate(prompts([4, 5]), SAMPLED)


@pytest.mark.parametrize("part", ["all of it", "its engine"])
def test_a_frozen_server_is_named_within_the_deadline(served, both, monkeypatch, part):
    both.push(never_ending(llama(0)), 1)
    members = served.members(1)
    frozen = members if part == "all of it" else [m for m in members if "EngineCore" in " ".join(m.cmdline())]
    assert frozen
    monkeypatch.setattr(both.servers[1], "timeout", 2.0)
    for member in frozen:
        member.suspend()
    try:
        start = time.monotonic()
        with pytest.raises(RolloutError, match=f"{served.urls[1]} did not answer .* within"):
            both.generate(prompts([4, 5]), SAMPLED)
        assert time.monotonic() - start < 4
        with pytest.raises(RolloutError, match=f"{served.urls[1]} did not answer .* within"):
            both.push(llama(1), 2)
    finally:
        for member in frozen:
            member.resume()
    monkeypatch.undo()
    both.push(llama(0), 3)


def test_the_page_shows_what_works(monkeypatch):
    """The fixture runs its command; here with its own options, and the section of its config."""
    page = (Path(__file__).parents[2] / "docs/rollouts.md").read_text().partition("## vLLM servers")[2]
    (command,) = re.findall(r"^align serve .*$", page, flags=re.M)
    monkeypatch.chdir(Path(__file__).parents[2])
    args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
    run = resolve("rloo", args.config, extra)
    assert args.port == 8000 and run.model.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct"
    section = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", page, flags=re.M | re.S)[0])
    options = rollout_options(section["rollout"])
    assert len(options.urls) == 2 and options.on_engine_failure == "wait" and options.transfer_folder == "/dev/shm"


def test_a_home_without_hard_links_gets_a_key_too(tmp_path, monkeypatch):
    from align.config.server_key import own_key, read_key

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.delenv("ALIGN_ROLLOUT_KEY", raising=False)
    monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "key"
    key = own_key("ALIGN_ROLLOUT_KEY", str(file))
    assert own_key("ALIGN_ROLLOUT_KEY", str(file)) == key == read_key("NONE", str(file))
    assert file.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [file]


def test_keys_are_made_once_and_kept_from_others(tmp_path, monkeypatch):
    from align.config.server_key import own_key, read_key

    monkeypatch.delenv("ALIGN_ROLLOUT_KEY", raising=False)
    file = tmp_path / "new" / "key"
    with pytest.raises(ConfigError, match="ALIGN_ROLLOUT_KEY.*does not exist"):
        read_key("ALIGN_ROLLOUT_KEY", str(file))
    key = own_key("ALIGN_ROLLOUT_KEY", str(file))
    assert len(key) >= 40 and own_key("ALIGN_ROLLOUT_KEY", str(file)) == key == read_key("NONE", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key("ALIGN_ROLLOUT_KEY", str(file))


def test_a_server_that_dies_stops_the_run(served):
    with connected(served, llama(0), timeout=10) as engine:
        for member in served.members(1):
            os.kill(member.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RolloutError, match=f"{served.urls[1]} cannot be reached"):
            engine.generate(prompts([4, 30]), SAMPLED)
        with pytest.raises(RolloutError, match=f"{served.urls[1]} cannot be reached"):
            engine.push(llama(1), 1)
        assert time.monotonic() - start < 10


test_ends = server_limits.test_a_server_whose_engine_hangs_ends_with_all_it_has_started  # the last that it does
test_ends_by_force = server_limits.test_a_server_that_does_not_end_is_killed
