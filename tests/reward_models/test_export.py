"""What we save, read by transformers, PEFT and TRL: the same scores."""

import errno
import os
import shutil

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.cli.main import main
from align.errors import ConfigError, TrainingError
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from align.reward_models.export import export_reward_model
from align.reward_models.normalizer import Normalizer
from align.trainers.reward import RewardTrainer
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.trainers.test_reward import config, pairs

PROMPTS = ["w1 w2 ", "w3 ", "w1 w4 w5 w6 ", "w9 "]
COMPLETIONS = ["w7", "w8 w9 w10 w11 w12 w13", "w2", "w20 w21"]
KINDS = ["llama", "gpt2", "bert", "llama LoRA", "bert LoRA", "llama that pads with its end token"]


def trained(folder, kind):
    """A reward model trained for a moment from a model without a head."""
    encoder, lm = "bert" in kind, folder / "lm"
    if encoder:
        tiny.classifier("bert", dtype=torch.float32, initializer_range=0.1).bert.save_pretrained(lm)
    else:
        tiny.causal(kind.split()[0], dtype=torch.float32).save_pretrained(lm)
    tokenizer = worlds.tokenizer(encoder=encoder)
    if "end token" in kind:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(lm)
    targets = ["query", "value"] if encoder else ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, target_modules=targets) if "LoRA" in kind else None
    args = config(folder / "rm", num_train_epochs=1)
    trainer = RewardTrainer(str(lm), args, pairs(32), pairs(10, seed=1), peft_config=lora)
    trainer.train()
    trainer.save_model()
    return str(folder / "rm")


def of_kinds(wanted):
    """Run a test with the models of some kinds."""
    return pytest.mark.parametrize("saved", [kind for kind in KINDS if wanted(kind)], indirect=True)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    source = trained(folder, request.param)
    if "LoRA" not in request.param:
        return source, source, request.param
    return source, str(export_reward_model(source, folder / "whole")), request.param


@of_kinds(lambda kind: kind == "llama")
def test_an_export_without_its_normaliser_is_none(saved, tmp_path, monkeypatch, capsys):
    """The folder would be loaded, with other scores."""

    def full(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Normalizer, "save", full)
    with pytest.raises(TrainingError, match="whole cannot be written: No space left .* mended, export again"):
        export_reward_model(saved[0], tmp_path / "whole")
    assert main(["export", saved[0], "--to", str(tmp_path / "whole")]) != 0
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


@of_kinds(lambda kind: "llama" in kind)
def test_transformers_scores_alike_with_left_padding(saved):
    """Not so GPT-2, whose positions do not follow the mask in transformers, nor BERT, read at its first token."""
    check_transformers(saved, "left")


def test_transformers_scores_alike(saved):
    check_transformers(saved, "right")


def check_transformers(saved, side):
    source, whole, kind = saved
    ours = ClassifierReward(source, normalize=False, device="cpu").score(RewardBatch(PROMPTS, COMPLETIONS)).scores
    assert ours.std() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(whole, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(whole).eval()
    assert model.config.num_labels == 1 and tokenizer.pad_token_id == model.config.pad_token_id
    end = "" if "bert" in kind else tokenizer.eos_token  # an encoder's tokenizer writes [CLS] and [SEP] itself
    texts = [f"{prompt}{completion} {end}" for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


@of_kinds(lambda kind: "LoRA" in kind)
def test_peft_loads_an_adapter(saved):
    source = saved[0]
    reward = ClassifierReward(source, normalize=False, device="cpu")
    sequence = reward.inputs(RewardBatch(PROMPTS, COMPLETIONS))[1]
    model = AutoPeftModelForSequenceClassification.from_pretrained(source, num_labels=1).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([sequence])).logits[:, 0]
    torch.testing.assert_close(theirs, reward.score_ids([sequence]), rtol=0, atol=2e-5)


def test_an_export_keeps_the_normaliser(saved, tmp_path):
    source, whole, kind = saved
    if "LoRA" not in kind:
        whole = str(export_reward_model(source, tmp_path))
    assert Normalizer.load(whole) == Normalizer.load(source) is not None
    batch = RewardBatch(PROMPTS, COMPLETIONS)
    ours, again = (ClassifierReward(folder, device="cpu").score(batch).scores for folder in (source, whole))
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="would be overwritten by its own export"):
        export_reward_model(source, source)


@of_kinds(lambda kind: kind == "llama LoRA")
def test_large_scores_are_rounded_more(saved, tmp_path):
    large = shutil.copytree(saved[0], tmp_path / "large")
    weights = load_file(large / "adapter_model.safetensors")
    (head,) = (name for name in weights if name.endswith("score.weight"))
    save_file({**weights, head: weights[head] * 2000}, large / "adapter_model.safetensors", {"format": "pt"})
    whole = export_reward_model(large, tmp_path / "whole")
    batch = RewardBatch(PROMPTS, COMPLETIONS)
    ours, again = (ClassifierReward(str(f), normalize=False, device="cpu").score(batch).scores for f in (large, whole))
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-4 * ours.abs().mean().item())


@pytest.mark.parametrize("lora", [False, True])
def test_without_any_padding_token_nothing_is_read_wrong(tmp_path, lora):
    """GPT-2's tokenizer has one special token. transformers then scores single sequences, and refuses batches."""
    tiny.causal("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "lm")
    worlds.tokenizer(pad=None).save_pretrained(tmp_path / "lm")
    adapter = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True) if lora else None
    args = config(tmp_path / "rm", max_steps=1)
    trainer = RewardTrainer(str(tmp_path / "lm"), args, pairs(32), peft_config=adapter)
    trainer.train()
    trainer.save_model()
    reward = ClassifierReward(str(tmp_path / "rm"), normalize=False, device="cpu")
    sequences = reward.inputs(RewardBatch(PROMPTS, COMPLETIONS))
    whole = export_reward_model(tmp_path / "rm", tmp_path / "whole")
    models = [AutoModelForSequenceClassification.from_pretrained(whole)]
    if lora:
        alone = {"num_labels": 1, "pad_token_id": None}
        models.append(AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "rm"), **alone))
    else:
        models.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm"))
    for model in models:
        with torch.no_grad():
            theirs = torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits[:, 0] for ids in sequences])
        torch.testing.assert_close(theirs, reward.score_ids(sequences), rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="no padding token"):
            model(input_ids=torch.tensor([sequences[0][:2]] * 2))


# ---- TRL


@of_kinds(lambda kind: "bert" not in kind)  # TRL ends texts with EOS, which encoders do not have
def test_trl_evaluates_alike(saved, tmp_path):
    """TRL's RewardTrainer, which tokenises, pads and reads the scores itself."""
    import trl

    source, whole, _ = saved
    data = pairs(12, seed=3)
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = trl.RewardConfig(str(tmp_path), per_device_eval_batch_size=12, disable_tqdm=True, **options)
    spaced = data.map(
        lambda row: {key: f"{row[key]} " for key in ("chosen", "rejected")}
    )  # its EOS is a word of its own
    metrics = trl.RewardTrainer(whole, args=args, train_dataset=spaced, eval_dataset=spaced).evaluate()
    reward = ClassifierReward(source, normalize=False, device="cpu")
    chosen, rejected = (
        reward.score(RewardBatch(data["prompt"][:], data[name][:])).scores for name in ("chosen", "rejected")
    )
    scores = torch.cat([chosen, rejected])
    for name, value in {
        "loss": -torch.nn.functional.logsigmoid(chosen - rejected).mean(),
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
    }.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), abs=2e-5), name


@of_kinds(lambda kind: "bert" not in kind)
def test_trl_trains_on_the_same_scores(saved, tmp_path):
    """TRL's GRPOTrainer, given the folder as its reward: conversations through the saved chat template."""
    import trl

    source, whole, _ = saved
    policy = tmp_path / "policy"
    tiny.causal(dtype=torch.float32).save_pretrained(policy)
    worlds.tokenizer().save_pretrained(policy)
    prompts = [[{"role": "user", "content": prompt.strip()}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = trl.GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=2, disable_tqdm=True, **options)
    trainer = trl.GRPOTrainer(
        str(policy), reward_funcs=whole, args=args, train_dataset=Dataset.from_list([{"prompt": p} for p in prompts])
    )
    theirs = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, [[0]] * 4)[:, 0]
    ours = ClassifierReward(source, normalize=False, device="cpu").score(RewardBatch(prompts, completions)).scores
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
