"""What is saved is what was trained: every trainer's folder, loaded by transformers, PEFT and us, gives the log-probs
or scores of the trained model, for full and LoRA runs and for LoRA on LoRA."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from align.data import toy
from align.errors import ConfigError, TrainingError
from align.modeling.export import export_model
from align.modeling.load import load_adapted, load_policy, load_sequence_classifier
from align.reward_models.build import build_reward
from align.trainers.core.saving import finish_folder
from align.trainers.dpo import DPOTrainer
from align.trainers.kto import KTOConfig, KTOTrainer
from align.trainers.modpo import MODPOConfig, MODPOTrainer
from align.trainers.reward import RewardTrainer
from align.trainers.sft import SFTTrainer
from align.trainers.sweeps.ensemble import train_reward_ensemble
from tests.trainers import reward_runs, sparse_runs
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import demonstrations, on_policy, prompts, sft_config, tiny_model, wanted_words

IDS = torch.tensor([[5, 9, 14, 7, 3, 11, 20, 2]])


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options})


def make(method: str, model, folder, peft=None, **options):
    options = {"max_steps": 2, "learning_rate": 3e-3, **options}
    if method == "sft":
        return SFTTrainer(model, sft_config(folder, **options), demonstrations(16), peft_config=peft)
    if method == "dpo":
        return DPOTrainer(model, dpo_config(folder, **options), toy_pairs(16), peft_config=peft)
    if method == "kto":
        return KTOTrainer(model, KTOConfig(**vars_of(dpo_config(folder, **options))), toy_pairs(8), peft_config=peft)
    if method == "sparsepo":
        return sparse_runs.trainer(model, folder, lora=peft, **options)
    if method == "modpo":
        weights = {"better": 0.5, "wanted_words": 0.5}
        args = MODPOConfig(**{**vars_of(dpo_config(folder, **options)), "objective": "better", "weights": weights})
        return MODPOTrainer(model, wanted_words, args, toy_pairs(16), peft_config=peft)
    if method == "reward":
        args = reward_runs.config(folder, **options)
        return RewardTrainer(model, args, toy_pairs(16), toy_pairs(8, seed=1), peft_config=peft)
    trainer, args = on_policy(method, folder, **options)
    if method == "ppo" and peft is not None:
        args.critic_model_name_or_path = str(model)
    return trainer(model, wanted_words, args, prompts(16), peft_config=peft)


def vars_of(args) -> dict:
    names = "output_dir per_device_train_batch_size max_length max_steps learning_rate report_to save_strategy use_cpu"
    return {name: getattr(args, name) for name in names.split()}


def trained(method: str, model, folder, peft=None, **options):
    trainer = make(method, model, folder, peft, **options)
    trainer.train()
    trainer.save_model()
    if hasattr(trainer, "close"):
        trainer.close()
    return trainer


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def readable(folder: Path) -> int:
    """The mode of a file that is written there in the usual way."""
    (folder / "usual").touch()
    return (folder / "usual").stat().st_mode & 0o777


def assert_saved(method: str, trainer, folder) -> None:
    """The folder under every loader against the live model."""
    live, folder = logits(trainer.model), str(folder)
    adapter = (Path(folder) / "adapter_config.json").exists()
    if method == "reward":
        loaded = [load_sequence_classifier(folder, fresh_head=False)]
        if adapter:
            loaded.append(AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1))
    else:
        loaded = [load_policy(folder)]
        if adapter:
            loaded.append(AutoPeftModelForCausalLM.from_pretrained(folder))
        config = loaded[-1].peft_config["default"] if adapter else None
        # transformers leaves out modules trained in full, and of tied embeddings the head's rows
        if config is None or not (config.modules_to_save or config.trainable_token_indices):
            loaded.append(AutoModelForCausalLM.from_pretrained(folder))
    for model in loaded:
        torch.testing.assert_close(logits(model), live, atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def start(policy, tmp_path_factory) -> str:
    """An SFT adapter that has moved the policy far."""
    folder = tmp_path_factory.mktemp("start") / "sft"
    trained("sft", policy, folder, lora(lora_alpha=64), learning_rate=1e-2, max_steps=4)
    assert (logits(load_policy(folder)) - logits(load_policy(policy))).abs().max() > 1
    return str(folder)


METHODS = ["sft", "dpo", "kto", "modpo", "sparsepo", "reward", "remax", "ppo", "online_dpo"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["full", "lora", "lora on lora"])
def test_the_folder_is_the_trained_model(method, form, policy, start, tmp_path):
    model = start if form == "lora on lora" else policy
    peft = None if form == "full" else lora(r=2, lora_alpha=6, use_rslora=method == "dpo")
    trainer = trained(method, model, tmp_path, peft)
    assert_saved(method, trainer, tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.safetensors")} == {readable(tmp_path)}
    card = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in card and Path(model).name in card


@pytest.mark.parametrize(
    "first, second",
    [
        ({}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["v_proj"]}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True}, {"r": 3}),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {"alpha_pattern": {"q_proj": 5}}),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens", "v_proj"]}),
    ],
    ids=["head trained second", "head trained first", "patterns", "embeddings", "embeddings twice"],
)
def test_unlike_adapters_are_added(first, second, policy, tmp_path):
    trained("sft", policy, tmp_path / "one", lora(**first), learning_rate=1e-2)
    trainer = trained("dpo", str(tmp_path / "one"), tmp_path / "two", lora(**second))
    assert_saved("dpo", trainer, tmp_path / "two")


def test_rows_of_the_embeddings_are_trained(policy, tmp_path):
    """With `trainable_token_indices`, as for tokens that were added."""
    rows = lora(target_modules=["q_proj"], trainable_token_indices=[5, 9])
    trainer = trained("dpo", policy, tmp_path, rows)
    assert_saved("dpo", trainer, tmp_path)
    moved = trainer.model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert not torch.equal(moved, load_policy(policy).get_input_embeddings().weight[[5, 9]])


@pytest.mark.parametrize("adapter", [{"target_modules": ["q_proj"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_tokens_that_were_added_are_saved_with_the_adapter(adapter, policy, tmp_path):
    """PEFT saves the embeddings where there are more than the base's; a second adapter lies on them too."""
    model = load_policy(policy)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 2)
    args = dpo_config(tmp_path / "one", max_steps=2, learning_rate=3e-3)
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<answer>", "</answer>"])
    one = DPOTrainer(model, args, toy_pairs(16), processing_class=tokenizer, peft_config=lora(**adapter))
    one.train()
    one.save_model()
    two = trained("dpo", str(tmp_path / "one"), tmp_path / "two", lora(r=2, target_modules=["v_proj"]))
    for trainer in (one, two):
        folder = trainer.args.output_dir
        loaded = load_policy(folder)
        assert loaded.get_input_embeddings().weight.shape[0] == rows + 2
        for model in (loaded, load_adapted(folder), AutoPeftModelForCausalLM.from_pretrained(folder)):
            torch.testing.assert_close(logits(model), logits(trainer.model), atol=2e-5, rtol=2e-5)


def test_three_stages_and_the_implicit_reward_of_the_last(policy, start, tmp_path):
    trained("sft", start, tmp_path / "two", lora(r=2), learning_rate=1e-2)
    before = load_policy(tmp_path / "two")
    trainer = trained("dpo", str(tmp_path / "two"), tmp_path / "three", lora(r=3), max_steps=4)
    assert_saved("dpo", trainer, tmp_path / "three")
    reward = build_reward({"type": "implicit", "path": str(tmp_path / "three"), "beta": 0.5})
    assert reward.model_folders[1] == str(tmp_path / "two")
    tokens = IDS[0].tolist()
    score = reward.score_ids([(tokens[:3], tokens[3:])])
    new, old = (
        m.log_softmax(-1)[0, 2:-1].gather(-1, IDS[0, 3:, None]).sum() for m in map(logits, (trainer.model, before))
    )
    torch.testing.assert_close(score[0], 0.5 * (new - old), atol=1e-4, rtol=1e-3)
    assert abs(score[0]) > 1e-3


def test_resuming_a_stacked_run_is_exact(start, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trained("dpo", start, tmp_path / "straight", lora(r=3, lora_alpha=5), **options)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    resumed = make("dpo", start, tmp_path / "run", lora(r=3, lora_alpha=5), **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    best = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "straight" / "checkpoint-4")  # a folder as any other
    torch.testing.assert_close(logits(best), logits(straight.model), atol=2e-5, rtol=2e-5)


def test_the_last_save_is_on_the_disk(policy, tmp_path, monkeypatch):
    """A power loss minutes after the end could leave empty files."""
    flushed, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda opened: (fsync(opened), flushed.add(os.fstat(opened).st_ino)))
    trainer = make("sft", policy, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    written = [tmp_path / "saved", *(tmp_path / "saved").iterdir()]
    assert len(written) > 5 and {path.stat().st_ino for path in written} <= flushed


def test_a_folder_is_what_was_written_last(policy, tmp_path):
    trained("sft", policy, tmp_path, lora(), learning_rate=1e-2)
    assert_saved("sft", trained("sft", policy, tmp_path, learning_rate=1e-2), tmp_path)
    assert_saved("sft", trained("sft", policy, tmp_path, lora(), learning_rate=1e-2), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_files_beside_an_earlier_model_go_with_it(start, tmp_path):
    """An ensemble of reward models, then one, then a policy in one folder; masks of SparsePO and the h of MetaAPO, then
    DPO; a policy's generation config, then a reward model."""
    rewards = tmp_path / "rewards"
    args = reward_runs.config(rewards, max_steps=1)
    train_reward_ensemble(start, args, toy_pairs(16), members=2)
    assert (rewards / "ensemble.json").exists()
    assert_saved("reward", trained("reward", start, rewards), rewards)
    assert (rewards / "reward_normalizer.json").exists() and not (rewards / "ensemble.json").exists()
    assert_saved("dpo", trained("dpo", start, rewards), rewards)
    assert not (rewards / "reward_normalizer.json").exists()
    assert (rewards / "generation_config.json").exists()
    trained("reward", start, rewards)
    assert not (rewards / "generation_config.json").exists()
    masks = tmp_path / "sparse" / "token_masks.safetensors"
    trained("sparsepo", start, masks.parent)
    assert masks.exists()
    learner = masks.with_name("meta_learner.safetensors")
    learner.write_bytes(b"")
    trained("dpo", start, masks.parent)
    assert not masks.exists() and not learner.exists()


def test_no_weights_and_no_template_of_an_earlier_save_are_left(policy, tmp_path):
    """Loaders do not agree on whether they read whole weights or those in parts."""
    model, whole, index = load_policy(policy), tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert index.exists()
    trainer = trained("sft", policy, tmp_path)
    assert_saved("sft", trainer, tmp_path)
    weights = {path.name for kind in ("*.safetensors", "*.bin", "*.index.json") for path in tmp_path.glob(kind)}
    assert weights == {"model.safetensors", "training_args.bin"}
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    trainer.model.save_pretrained(tmp_path, max_shard_size="20KB")
    whole.write_bytes(b"old")
    os.utime(whole, (1, 1))
    finish_folder(tmp_path, trainer.model)
    assert index.exists() and not whole.exists()
    assert_saved("sft", trainer, tmp_path)


def test_every_model_argument_takes_an_adapter(policy, start, tmp_path):
    """A reward model on a policy's adapter; it, all linear layers adapted, as PPO's critic and proxy."""
    trainer = trained("reward", start, tmp_path / "rm", lora())
    assert_saved("reward", trainer, tmp_path / "rm")
    full = trained("reward", start, tmp_path / "full")
    assert_saved("reward", full, tmp_path / "full")
    kind, args = on_policy("ppo", tmp_path / "ppo", critic_model_name_or_path=str(tmp_path / "rm"), max_steps=1)
    reward = {"type": "classifier", "path": str(tmp_path / "rm")}
    ppo = kind(start, reward, args, prompts(16), peft_config=lora())
    merged = load_sequence_classifier(tmp_path / "rm", fresh_head=False)
    live = dict(ppo.critic.model.backbone.named_parameters())
    for name, value in merged.base_model.named_parameters():
        torch.testing.assert_close(live[name].detach(), value.detach(), msg=name)
    ppo.train()
    ppo.close()


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_what_loads_the_folder_stops_where_an_answer_ends(peft, tmp_path):
    """A base model whose generation config ends at EOS alone, and a chat template that ends a turn with a token of its
    own. Beside an adapter transformers reads the base's generation config, unless it is given the adapter's."""
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} <turn> {% endfor %}"
    base, folder = tmp_path / "base", tmp_path / "run"
    tiny_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trained("dpo", base, folder, peft)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn>")]
    saved = GenerationConfig.from_pretrained(folder)
    assert saved.eos_token_id == ends
    given = AutoModelForCausalLM.from_pretrained(folder, generation_config=saved if peft else None)
    assert given.generation_config.eos_token_id == ends


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_base_under_a_relative_path(policy, tmp_path, monkeypatch):
    shutil.copytree(policy, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    trained("sft", "base", "run", lora())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tiny_model(toy.tokenizer(), seed=9).save_pretrained("base")
    assert torch.equal(logits(load_policy("../run")), logits(load_policy(tmp_path / "run")))
    shutil.rmtree(tmp_path / "base")
    os.rename("base", tmp_path / "base")  # another model under the name
    with pytest.raises(ConfigError, match="was trained on another model than .*base holds now"):
        load_policy(tmp_path / "run")


def test_what_is_no_sum_is_refused_and_saved_merged(policy, tmp_path):
    trainer = trained("sft", policy, tmp_path / "dora", lora(use_dora=True), learning_rate=1e-2)
    with pytest.raises(ConfigError, match="cannot be trained on with a second one: it uses use_dora"):
        make("dpo", str(tmp_path / "dora"), tmp_path / "dpo", lora())
    export_model(tmp_path / "dora", tmp_path / "merged")
    torch.testing.assert_close(logits(load_policy(tmp_path / "merged")), logits(trainer.model), atol=2e-5, rtol=2e-5)
    assert_saved("dpo", trained("dpo", str(tmp_path / "merged"), tmp_path / "dpo", lora()), tmp_path / "dpo")


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_a_save_that_went_wrong_is_seen(peft, policy, tmp_path):
    """The file is changed between the writing and the reading back; then a config that scales the update otherwise."""
    trainer = make("sft", policy, tmp_path, peft)
    trainer.train()
    wrong = trainer.model.save_pretrained
    file = tmp_path / ("model.safetensors" if peft is None else "adapter_model.safetensors")

    def save_other_weights(folder, **options):
        wrong(folder, **options)
        tensors = load_file(file)
        name = sorted(name for name in tensors if "up_proj" in name)[-1]
        tensors[name] = tensors[name] + 0.1
        save_file(tensors, file, metadata={"format": "pt"})

    trainer.model.save_pretrained = save_other_weights
    with pytest.raises(TrainingError, match="is not what was trained: .*up_proj"):
        trainer.save_model()
    trainer.args.verify_saved = False
    trainer.save_model()
    if peft is None:
        return

    def save_other_scale(folder, **options):
        wrong(folder, **options)
        path = Path(folder) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 17}))

    trainer.model.save_pretrained, trainer.args.verify_saved = save_other_scale, True
    with pytest.raises(TrainingError, match="is not what was trained: the update of"):
        trainer.save_model()


def test_bf16_says_what_of_an_adapter_is_rounded_away(policy, tmp_path, caplog):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora(init_lora_weights=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1e-5)
    model.save_pretrained(tmp_path)
    load_policy(tmp_path, dtype="bfloat16")
    assert "% of the adapter" in caplog.text and "is rounded away" in caplog.text
    caplog.clear()
    load_policy(tmp_path)
    assert "rounded away" not in caplog.text


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_the_same_command_twice(method, policy, tmp_path):
    """Whatever the process has drawn before, the adapter (and head) start as the seed says."""
    folders = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        folders.append(trained(method, policy, tmp_path / str(seed), lora(), seed=1, data_seed=1, max_steps=1).args)
    first, second = (load_file(Path(args.output_dir) / "adapter_model.safetensors") for args in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
