"""Soups add up what their members have learnt, exactly."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

from align.data import toy
from align.errors import ConfigError
from align.modeling.load import load_policy, load_tokenizer
from align.modeling.soups import make_soup
from tests.modeling.tiny import causal

WEIGHTS = (0.5, 0.3, -0.4)
LORA = (
    {"r": 4, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 16},
    {"r": 3, "lora_alpha": 2, "use_rslora": True},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, three adapters of different ranks and scales, and three whole models."""
    folder, tokenizer = tmp_path_factory.mktemp("soups"), toy.tokenizer()

    def model(seed):
        return causal(seed=seed, dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=2)

    model(0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for number, options in enumerate(LORA):
        lora = LoraConfig(target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False, **options)
        torch.manual_seed(number)
        adapted = get_peft_model(load_policy(folder / "base"), lora)
        for values in adapted.parameters():
            values.data *= 0.3 if values.requires_grad else 1  # deltas of about 1, whose rounding is below 1e-6
        adapted.save_pretrained(folder / f"adapter_{number}", save_embedding_layers=False)
        model(number).save_pretrained(folder / f"model_{number}")
        for kind in ("adapter", "model"):
            tokenizer.save_pretrained(folder / f"{kind}_{number}")
    return folder


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_policy(folder).state_dict()


def test_the_delta_of_an_adapter_soup_is_the_sum_of_the_deltas(world, tmp_path):
    folders = [world / f"adapter_{number}" for number in range(3)]
    base, members, soup = weights_of(world / "base"), map(weights_of, folders), make_soup(folders, WEIGHTS, tmp_path)
    deltas = [{name: state[name] - base[name] for name in base} for state in members]
    found = weights_of(soup)
    for name in base:
        expected = sum(w * delta[name] for w, delta in zip(WEIGHTS, deltas, strict=True))
        torch.testing.assert_close(found[name] - base[name], expected, rtol=0, atol=1e-6)
    assert max(delta.abs().max() for delta in deltas[0].values()) > 0.1


def test_as_peft_concatenates_and_not_as_it_averages(world, tmp_path):
    """Two adapters of one rank and scale: what PEFT calls `cat` is ours, its `linear` is something else."""
    folders = [world / "adapter_0", tmp_path / "other"]
    lora = LoraConfig(target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False, **LORA[0])
    torch.manual_seed(9)
    get_peft_model(load_policy(world / "base"), lora).save_pretrained(folders[1], save_embedding_layers=False)
    soup = weights_of(make_soup(folders, (0.7, 0.3), tmp_path / "soup"))
    found = {}
    for kind in ("cat", "linear"):
        model = PeftModel.from_pretrained(load_policy(world / "base"), str(folders[0]), "a")
        model.load_adapter(str(folders[1]), "b")
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "soup", combination_type=kind)
        model.set_adapter("soup")
        merged = model.merge_and_unload().state_dict()
        found[kind] = max((merged[name] - soup[name]).abs().max().item() for name in soup)
    assert found["cat"] < 1e-6 and found["linear"] > 0.1


def test_a_soup_of_whole_models_is_their_average(world, tmp_path):
    folders = [world / f"model_{number}" for number in range(3)]
    found = weights_of(make_soup(folders, (0.5, 0.3, 0.2), tmp_path))
    states = [weights_of(folder) for folder in folders]
    for name, values in found.items():
        expected = sum(w * state[name] for w, state in zip((0.5, 0.3, 0.2), states, strict=True))
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("members", "weights", "message"),
    [
        (["adapter_0", "model_0"], (0.5, 0.5), "not of both"),
        (["model_0", "model_1"], (0.5, 0.6), "sum to 1"),
        (["model_0", "model_1"], (math.nan, 1.0), "finite numbers, got .nan, 1.0."),
        (["model_0", "model_1"], ("0.5", 0.5), "finite numbers"),
        (["adapter_0"], (0.5, 0.5), "one weight per policy"),
        (["adapter_0", "dora"], (0.5, 0.5), "use_dora, which has no exact soup"),
        (["adapter_0", "fewer"], (0.5, 0.5), "different layers"),
        (["adapter_0", "foreign"], (0.5, 0.5), "of one base"),
    ],
)
def test_what_has_no_exact_soup(world, tmp_path, members, weights, message):
    base = load_policy(world / "base")
    if members[-1] in ("dora", "fewer", "foreign"):
        options = {"dora": {"use_dora": True}}.get(members[-1], {})
        if members[-1] == "foreign":
            base = load_policy(world / "model_1")
        modules = ["q_proj"] if members[-1] == "fewer" else ["q_proj", "down_proj"]
        get_peft_model(base, LoraConfig(r=4, target_modules=modules, **options)).save_pretrained(world / members[-1])
    with pytest.raises(ConfigError, match=message):
        make_soup([world / name for name in members], weights, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_change_their_base_are_refused(world, tmp_path, start):
    """PEFT takes the start's product out of the base again when the soup is loaded, at the soup's rank."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    adapted = get_peft_model(load_policy(world / "base"), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
        make_soup([tmp_path / "adapter"] * 2, [0.5, 0.5], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_soups_folder_stands_for_it_and_says_where_answers_end(kind, world, tmp_path):
    """A soup of models in a folder with an adapter was loaded as that adapter; one of adapters had no end tokens."""
    folders, other = [world / f"{kind}_{number}" for number in (0, 1)], {"adapter": "model", "model": "adapter"}[kind]
    for path in (world / f"{other}_2").iterdir():
        shutil.copy(path, tmp_path)
    found = weights_of(make_soup(folders, (0.5, 0.5), tmp_path))
    fresh = weights_of(make_soup(folders, (0.5, 0.5), tmp_path / "new"))
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)
    tokenizer = load_tokenizer(tmp_path)
    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    with pytest.raises(ConfigError, match="is the folder of one of the policies"):
        make_soup(folders, (0.5, 0.5), folders[1])
    if kind == "adapter":
        with pytest.raises(ConfigError, match="is the folder of the base model"):
            make_soup(folders, (0.5, 0.5), world / "base")


def test_a_soup_knows_the_base_of_its_adapters(world, tmp_path):
    """Whatever model lay under the base's path later was taken for it."""
    base = shutil.copytree(world / "base", tmp_path / "base")
    for number in (0, 1):
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(load_policy(base), lora).save_pretrained(tmp_path / str(number))
        shutil.copy(base / "tokenizer.json", tmp_path / str(number))
        shutil.copy(base / "tokenizer_config.json", tmp_path / str(number))
    soup = make_soup([tmp_path / "0", tmp_path / "1"], (0.5, 0.5), tmp_path / "soup")
    load_policy(soup)
    shutil.rmtree(base)
    shutil.copytree(world / "model_1", base)
    with pytest.raises(ConfigError, match="was trained on another model than"):
        load_policy(soup)
