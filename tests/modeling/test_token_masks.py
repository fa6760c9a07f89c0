"""Mask networks: which states they read, their equations, how they start, and their file."""

import pytest
import torch
import torch.nn.functional as F

from align.errors import ConfigError, DataError
from align.modeling.pairs import completions, pair_tokens
from align.modeling.token_masks import (
    FILE_NAME,
    MaskSettings,
    TokenMasks,
    decoder_layers,
    describe_masks,
    load_masks,
    save_masks,
    standardise,
    watch_states,
)
from tests.modeling.pair_batches import model, pairs


def settings(**options):
    return MaskSettings(**{"variant": "common", "hidden_size": 16, "num_layers": 4, **options})


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def states(count=4, seed=0):
    """Of the ten tokens in MASK, after `count` layers."""
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(10, 16, generator=generator, dtype=torch.float64) + 1 for _ in range(count)]


def read(states):
    return [standardise(h) for h in states]


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2", "gemma2"])
def test_states_are_those_before_each_completion_token(kind, chunk_size):
    core, batch = model(kind), pairs()
    places = completions(batch)
    with torch.no_grad():
        with watch_states(core, places) as seen, watch_states(core, places, "last") as last:
            for _ in range(2):  # the last of several passes counts
                pair_tokens(core, batch, chunk_size=chunk_size)
        whole = core(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    expected = whole.hidden_states[1:]
    assert len(seen) == len(expected) == 2 and len(last) == 1
    done = 0
    for row in range(6):
        start, count = int(batch["completion_mask"][row].argmax()), int(batch["completion_mask"][row].sum())
        tokens = slice(done, done := done + count)
        for ours, theirs in zip([*seen, *last], [*map(standardise, expected), expected[-1]], strict=True):
            torch.testing.assert_close(ours[tokens], theirs[row, start - 1 : start - 1 + count])


def test_hooks_are_gone_afterwards():
    core = model()
    with watch_states(core, completions(pairs())):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in core.modules())


def test_a_model_without_a_list_of_layers_is_refused():
    core = model()
    core.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="no single list of 7 layers. mask_layers: last"):
        decoder_layers(core)


# ---- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp_size", [None, 6])
def test_all_layers_are_the_plain_composition_of_modules(mlp_size):
    """Values and gradients, with LayerNorm's gain and shift not at their start."""
    masks = TokenMasks(settings(mlp_size=mlp_size)).double().initialise("unit", seed=1)
    network = masks.networks["common"]
    with torch.no_grad():
        network.norm.weight.mul_(1.3).add_(0.2)
        network.norm.bias.add_(0.1)
        network.mixer.weight[0, 0] = -0.5
    inputs = states()
    values = []
    for layer, h in enumerate(inputs):
        value = network.first[layer](network.norm(h))
        values.append(F.relu(network.second[layer](value) if mlp_size else value))
    plain = F.relu(network.mixer(torch.cat(values, dim=-1))).squeeze(-1)
    m_u, m_d = masks(read(inputs), MASK)
    assert m_u is m_d and (plain > 0).any() and not m_u[~MASK].any()
    m_u = m_u[MASK]
    torch.testing.assert_close(m_u, plain)
    weights = torch.rand(plain.shape, dtype=torch.float64)
    parameters = list(network.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((m_u * weights).sum(), parameters),
        torch.autograd.grad((plain * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mlp_size", [None, 6])
def test_last_layer_reads_the_last_state_as_it_is(mlp_size):
    masks = TokenMasks(settings(layers="last", mlp_size=mlp_size)).double().initialise("unit", seed=1)
    network = masks.networks["common"]
    (h,) = states(1)
    value = network.first[0](h)
    plain = F.relu(network.second[0](value) if mlp_size else value).squeeze(-1)
    torch.testing.assert_close(masks([h], MASK)[0][MASK], plain)


def test_variants():
    common = TokenMasks(settings()).initialise("unit", 0)
    inputs = [h.float() for h in read(states())], MASK
    m_u, m_d = common(*inputs)
    assert m_u is m_d
    only_kl = TokenMasks(settings(on_reward=False)).initialise("unit", 0)(*inputs)
    assert only_kl[0] is None and torch.equal(only_kl[1], m_u)
    m_u, m_d = TokenMasks(settings(variant="independent")).initialise("unit", 0)(*inputs)
    assert not torch.allclose(m_u, m_d)


@pytest.mark.parametrize("options", [{}, {"layers": "last"}, {"mlp_size": 20}, {"variant": "independent"}])
def test_unit_starts_near_one_and_released_near_zero(options):
    """h = 2048 and L = 24, where the notes on the released code simulated means of 0.005 to 0.035."""
    wide = settings(hidden_size=2048, num_layers=24, **options)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(400, 2048, generator=generator) for _ in range(24 if wide.layers == "all" else 1)]
    inputs = inputs, torch.ones(4, 100).bool()
    masks = TokenMasks(wide)
    unit = [m for m in masks.initialise("unit", 3)(*inputs)]
    assert all(0.85 < m.mean() < 1.15 and m.std() > 0.1 for m in unit)
    assert all((m > 0).float().mean() > (0.99 if wide.layers == "all" else 0.8) for m in unit)
    if wide.layers == "all":
        released = masks.initialise("released", 3)(*inputs)
        assert all(0 <= m.mean() < 0.1 for m in released)


def test_initialisation_depends_on_the_seed_only():
    torch.manual_seed(5)
    first = TokenMasks(settings()).initialise("unit", 7).state_dict()
    torch.manual_seed(6)
    again, other = (TokenMasks(settings()).initialise("unit", seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_dropout_is_on_in_training_only():
    masks = TokenMasks(settings(dropout=0.5)).initialise("unit", 0)
    inputs = [h.float() for h in states()], MASK
    assert not torch.equal(masks.train()(*inputs)[0], masks(*inputs)[0])
    assert torch.equal(masks.eval()(*inputs)[0], masks(*inputs)[0])


def test_half_precision_states():
    """A bfloat16 reference, with autocast and without: float32 masks close to the exact ones, gradients in float32."""
    masks = TokenMasks(settings(variant="independent")).initialise("unit", 0)
    exact = masks(read(h.float() for h in states()), MASK)
    half = masks(read(h.bfloat16() for h in states()), MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = masks(read(h.float() for h in states()), MASK)
    for m, close in zip(exact * 2, (*half, *mixed), strict=True):
        assert close.dtype == torch.float32
        torch.testing.assert_close(close, m, atol=0.03, rtol=0)
    mixed[0].sum().backward()
    assert masks.networks["reward"].first[0].weight.grad.dtype == torch.float32


def test_the_backward_pass_keeps_one_state_per_layer():
    """The standardised one, for two networks."""
    masks = TokenMasks(settings(variant="independent")).double().initialise("unit", 0)
    inputs, kept = read(states()), set()

    def keep(tensor):
        if tensor.numel() == inputs[0].numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masks(inputs, MASK)
    assert kept == {h.data_ptr() for h in inputs}


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "independent", "layers": "last", "mlp_size": 5, "on_kl": True}])
def test_saved_masks_are_the_same_when_they_are_loaded(options, tmp_path):
    masks = TokenMasks(settings(dropout=0.2, **options)).double().initialise("unit", 4).eval()
    inputs = states(4 if masks.settings.layers == "all" else 1)
    save_masks(tmp_path, describe_masks(masks.settings, "some/reference"), masks.state_dict())
    loaded, reference = load_masks(tmp_path)
    assert reference == "some/reference" and loaded.settings == masks.settings and not loaded.training
    for ours, theirs in zip(masks(inputs, MASK), loaded(inputs, MASK), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_without_masks_and_a_damaged_file(tmp_path):
    with pytest.raises(DataError, match="holds no token masks"):
        load_masks(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="is damaged or was not written by align"):
        load_masks(tmp_path)
