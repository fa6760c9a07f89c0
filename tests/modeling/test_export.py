"""`align export`: the folder of a run as one plain model, which transformers loads with the same log-probs."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from align.cli.main import main
from align.errors import ConfigError, TrainingError
from align.modeling import export
from align.modeling.adapters import finish_adapter
from align.modeling.export import export_model
from align.modeling.load import load_policy
from tests.modeling import tiny
from tests.reward_models import worlds

IDS = torch.tensor([[7, 8, 9, 20, 3, 30, 11, 1]])
ADAPTERS = {
    "all layers": {"target_modules": "all-linear"},
    "lm_head, whose weight the embeddings share": {"target_modules": ["lm_head"]},
    "embeddings, whose weight the head shares": {"target_modules": ["embed_tokens"]},
    "the head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def base(folder, dtype=torch.float32):
    tiny.causal(dtype=dtype, tie_word_embeddings=True).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


def adapter(start, folder, seed=0, **options):
    """An adapter of random weights on the model of `start`, saved as our trainers do."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(load_policy(start), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    finish_adapter(folder, model)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


def logps(model):
    with torch.no_grad():
        return model(IDS).logits.log_softmax(-1)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_becomes_a_plain_model(kind, tmp_path, capsys):
    source = adapter(base(tmp_path / "base"), tmp_path / "run", **ADAPTERS[kind])
    assert main(["export", source, "--to", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out'} in float32" in shown and "the adapter itself changes them by" in shown
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), source)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logps(ours), logps(theirs), atol=2e-5, rtol=1e-5)
    with theirs.disable_adapter():
        assert (logps(ours) - logps(theirs)).abs().mean() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == worlds.TEMPLATE
    weights, config = ((tmp_path / "out" / name).stat().st_mode for name in ("model.safetensors", "config.json"))
    assert weights == config  # others may read both or none
    assert not (tmp_path / "out" / "adapter_config.json").exists() and not (tmp_path / "out.partial").exists()


def test_an_adapter_on_an_adapter_in_the_dtype_of_their_base(tmp_path):
    first = adapter(base(tmp_path / "base", torch.bfloat16), tmp_path / "sft", target_modules=["q_proj", "up_proj"])
    second = adapter(first, tmp_path / "dpo", seed=1, target_modules=["v_proj", "up_proj"])
    found = export_model(second, tmp_path / "out")
    assert found.dtype == "bfloat16" and found.merge < 1e-5 and found.files == 0 < found.gap < found.bound
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = load_policy(second)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(written[name], value.to(torch.bfloat16)), name  # merged in float32, and rounded once


def test_answers_end_where_the_run_ended_them(tmp_path):
    """A base whose own end token is another than the chat template's."""
    source = adapter(base(tmp_path / "base"), tmp_path / "run", target_modules=["q_proj"])
    GenerationConfig(eos_token_id=5, temperature=0.6, do_sample=True).save_pretrained(source)
    export_model(source, tmp_path / "out")
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == [5, 1] and config.temperature == 0.6


@pytest.mark.parametrize("step", ["merge", "write"])
def test_what_computes_something_else_is_not_left_there(step, tmp_path, monkeypatch):
    source = adapter(base(tmp_path / "base"), tmp_path / "run", target_modules=["q_proj"])
    if step == "merge":
        monkeypatch.setattr(export, "merge", lambda model: model.unload())  # the base without the adapter
    else:
        right = export._write

        def wrong(model, *rest):
            right(load_policy(tmp_path / "base"), *rest)

        monkeypatch.setattr(export, "_write", wrong)
    part = {"merge": "merging the adapter changed", "write": "the files read back do not give"}[step]
    with pytest.raises(TrainingError, match=f"{part} the log-probs of the run"):
        export_model(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_mistakes(tmp_path, capsys):
    source = base(tmp_path / "runs" / "point_0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="full is there already: name a new folder"):
        export_model(source, tmp_path / "full")
    with pytest.raises(ConfigError, match="would be overwritten by its own export"):
        export_model(source, source)
    assert main(["export", str(tmp_path / "runs"), "--to", str(tmp_path / "out")]) == 2
    assert "holds no model (no config.json, no adapter_config.json); these folders in it do: point_0" in (
        capsys.readouterr().err
    )
