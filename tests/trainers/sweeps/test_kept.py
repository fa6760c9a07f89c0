"""What is finished is kept by a sweep or an ensemble that goes on only if it is what this one would train."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig

from align.errors import ConfigError, TrainingError
from align.trainers.sweeps.ensemble import train_reward_ensemble
from align.trainers.sweeps.kept import finished, start_identity
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.trainers.reward_runs import config, pairs

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
OTHER = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
AGAIN = "delete it, or use another output_dir, to train it again"


def base(folder, width=0.1):
    tiny.causal(dtype=torch.float32, initializer_range=width, hidden_size=32).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["separate", "lora"])
def test_a_finished_ensemble_of_other_settings_is_not_kept(kind, tmp_path):
    """Of other options, rows, adapters, or weights under the same name."""
    model = base(tmp_path / "base")

    def train(rows=8, lora=LORA, of_eval=1, **options):
        args = config(tmp_path / "rm", max_steps=1, **options)
        sets = pairs(rows), pairs(4, seed=of_eval)
        train_reward_ensemble(model, args, *sets, members=1, kind=kind, peft_config=lora, resume=True)

    train()
    weights = tmp_path / "rm" / "member_0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    train(logging_steps=7)
    changes = {
        "learning_rate .* before and 0.5 now": {"learning_rate": 0.5},
        r"\(data .* before": {"rows": 9},
        r"\(eval_data .* before": {"of_eval": 2},
        "lora.lora_alpha 8 before and 3 now": {"lora": OTHER},
    }
    for message, change in changes.items():
        with pytest.raises(ConfigError, match=f"{message}.*{AGAIN}"):
            train(**change)
    base(model, width=0.3)
    with pytest.raises(ConfigError, match=rf"\(weights .* before and .* now\): {AGAIN}"):
        train()
    assert weights.stat().st_mtime_ns == before
    (tmp_path / "rm" / ("member_0" if kind == "separate" else "") / "trained.json").unlink()  # of an older version
    with pytest.raises(ConfigError, match="has no trained.json to say with which settings: delete it"):
        train()


def test_one_pass_resumes_with_the_same_adapters_alone(tmp_path):
    """Their scaling is in no weight: a checkpoint went on with another one in silence."""
    model, args = base(tmp_path / "base"), config(tmp_path / "rm", max_steps=1, save_strategy="steps", save_steps=1)
    sets = {"members": 2, "kind": "lora", "resume": True}
    train_reward_ensemble(model, args, pairs(8), **sets, peft_config=LORA)
    (tmp_path / "rm" / "ensemble.json").unlink()
    with pytest.raises(TrainingError, match="ensemble.lora.lora_alpha: 8 before, 3 now"):
        train_reward_ensemble(model, args, pairs(8), **sets, peft_config=OTHER)


def test_what_a_sweep_starts_from_is_known_by_its_weights(tmp_path):
    model = base(tmp_path / "base")
    record = tmp_path / "point.json"
    record.write_text(json.dumps({"settings": start_identity(str(model))}))
    assert finished(record, start_identity(str(model)))
    shutil.copytree(base(tmp_path / "again", width=0.3), model, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=rf"was trained with other settings \(weights '.*' before and '.*{AGAIN}"):
        finished(record, start_identity(str(model)))
    record.write_text(json.dumps({"settings": {"model": str(model)}}))  # of an older version
    with pytest.raises(ConfigError, match=rf"\(weights not recorded before and '.*{AGAIN}"):
        finished(record, start_identity(str(model)))
    assert start_identity("hub/name") == {"model": "hub/name", "weights": None}
