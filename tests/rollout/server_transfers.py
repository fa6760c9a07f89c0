"""Weights that reach servers without files: collected by `test_server`, whose servers these tests share."""

import os
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.errors import RolloutError
from align.rollout import SamplingParams
from align.rollout.server.fitting import takes_adapter
from tests.rollout.rollout_models import llama, never_ending, own_logps, prompts
from tests.rollout.served import connected

SAMPLED = SamplingParams(12, n=2, temperature=0.7)


def assert_drawn_from(engine, model) -> None:
    for rollout in engine.generate(prompts([4, 30, 140, 60]), SAMPLED):
        for sample in rollout.completions:
            expected = own_logps(model, rollout.prompt_ids, sample.token_ids, SAMPLED.temperature)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=1e-4)


def test_weights_are_broadcast_to_all_workers(served):
    """In many blocks, smaller than some tensors; a second run forms its own group with the same servers."""
    for first in (1, 3):
        with connected(served, never_ending(llama(first)), transfer="gloo", timeout=30) as engine:
            engine._transfer.block.bytes, engine._transfer.block.size = None, 1 << 14
            for version, seed in enumerate([first + 1, first], start=1):
                model = never_ending(llama(seed))
                report = engine.push(model, version)
                assert report.proved_tensors == len(dict(model.named_parameters()))
                assert_drawn_from(engine, model)
            assert not list(engine._folder.glob("*.safetensors"))  # no file was written
            group = engine._transfer.group
            engine.push(model, 3)
            assert engine._transfer.group is group  # formed once


def test_an_adapter_goes_as_one_beside_a_broadcast(served, monkeypatch, caplog):
    torch.manual_seed(0)
    model = get_peft_model(never_ending(llama(2)), LoraConfig(r=8, target_modules="all-linear"))
    with connected(served, model, transfer="gloo", timeout=30) as engine:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        assert engine.push(model, 1).proved_tensors == 2 * 14 + 1
        assert_drawn_from(engine, model)
        known = engine.servers, engine._folder, engine.dtype
        assert takes_adapter(model, *known)
        monkeypatch.setattr(engine.servers[1], "url", "http://there:8000")
        assert not takes_adapter(model, *known)
        assert "adapters go through files, and http://there:8000 shares no transfer_folder" in caplog.text


def test_a_server_that_takes_no_part_is_named_in_time(served):
    model = never_ending(llama(0))
    with connected(served, model, transfer="gloo", timeout=6) as engine:
        engine._transfer.hint = "; a hint"
        members = served.members(1)
        for member in members:
            member.suspend()
        try:
            start = time.monotonic()
            with pytest.raises(RolloutError, match=f"{served.urls[1]} did not answer .* within 6 sec.*; a hint"):
                engine.push(model, 1)
            assert time.monotonic() - start < 15
        finally:
            for member in members:
                member.resume()
        for server in engine.servers:
            server.timeout = 30.0
        engine._transfer.seconds = 24.0
        engine.push(model, 2)  # over a new group: the old one is of no use
        assert_drawn_from(engine, model)


def test_what_cannot_be_here_is_refused(served):
    model = llama()
    for kind, message in (
        ("ipc", "ipc needs trainer and servers on one GPU; the trainer is on a CPU"),
        ("nccl", "nccl needs the trainer and every worker of the servers on a GPU of its own"),
    ):
        with pytest.raises(RolloutError, match=message), connected(served, model, transfer=kind):
            pass
    with connected(served, model) as engine:  # auto, on CPUs
        assert engine._transfer.name == "files" and os.path.isdir(engine._folder)
