"""Architectures on two processes: FSDP2 sends buffers too, and DDP waits for no gradient that never comes."""

import pytest
import torch

from align.modeling.load import load_policy
from benchmarks.tiny.configs import tiny_config, tiny_model
from benchmarks.tiny.stages import alone, causal_class, tokenizer
from tests.trainers.core.families_ranks import KINDS, train
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Their buffers are not what a new model has."""
    folder = tmp_path_factory.mktemp("models")
    for kind in (kind for kinds in KINDS.values() for kind in kinds):
        config = tiny_config(kind)
        model = tiny_model(config, causal_class(config))
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer += torch.linspace(0, 0.3, buffer.numel()).view_as(buffer)
        model.save_pretrained(folder / kind)
        tokenizer().save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("setup", ["fsdp2", "ddp"])
def test_two_processes_train_as_one(setup, models, tmp_path):
    first, second = run_on_two("tests.trainers.core.families_ranks", tmp_path / "two", str(models), setup)
    assert first == second
    for kind in KINDS[setup]:
        one = train(str(models / kind), tmp_path / "one" / kind, 1)
        for name, values in one.items():
            assert first[kind][name] == pytest.approx(values, rel=1e-3), (kind, name)
        loaded = [load_policy(folder / kind) for folder in (tmp_path / "one", tmp_path / "two")]
        torch.testing.assert_close(alone(loaded[1]), alone(loaded[0]), atol=1e-3, rtol=1e-3)
        buffers = [dict(model.named_buffers()) for model in loaded]
        assert all(torch.equal(buffers[1][name], value) for name, value in buffers[0].items())
    if setup == "ddp":
        assert "compressor" in first["refused"] and "set ddp_find_unused_parameters: true" in first["refused"]
