"""TRL's own scripts with our classes in the place of TRL's, as someone runs them who has changed the imports."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import trl
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig, HfArgumentParser
from trl import LogCompletionsCallback, TrlParser

import align
from align.data import toy
from align.errors import ConfigError
from tests.trainers.core.test_eval_sets import rows_of
from tests.trainers.tiny_runs import QUIET, demonstrations, logged, prompts, tiny_model, wanted_words

CLASSES = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
OPTIONS = (
    "--max_steps 2 --learning_rate 1e-2 --use_cpu --report_to none --save_strategy no --logging_steps 1 "
    "--per_device_train_batch_size 2 --disable_tqdm True"
)
OF_METHOD = {"grpo": " --num_generations 2", "rloo": ""}
DRAWS = " --use_vllm False --max_completion_length 6 --reward_funcs tests.trainers.tiny_runs.wanted_words"
CONFIGS = sorted(name for name in align.__all__ if name.endswith("Config"))


def run_script(name: str, options: str, rows, policy: str, folder: Path, monkeypatch) -> Path:
    """`trl/scripts/NAME.py`, whose functions import from trl when they run; the folder of what it saved."""
    for part in ("Trainer", "Config"):
        monkeypatch.setattr(trl, CLASSES[name] + part, getattr(align, CLASSES[name] + part))
    script = importlib.import_module(f"trl.scripts.{name}")
    for split in ("train", "test"):
        rows.to_json(folder / "rows" / f"{split}.jsonl")
    files = f"--model_name_or_path {policy} --dataset_name {folder / 'rows'} --output_dir {folder / 'run'} "
    parsed = script.make_parser().parse_args_and_config((files + options).split(), fail_with_unknown_args=False)
    script.main(*parsed)
    return folder / "run"


@pytest.mark.parametrize("name", CLASSES)
def test_trls_scripts_run(name, policy, tmp_path, monkeypatch):
    rows = demonstrations(8) if name == "sft" else rows_of(name, 8) if name in ("dpo", "reward") else prompts(8)
    options = OPTIONS + (OF_METHOD[name] + DRAWS if name in OF_METHOD else "")
    options += " --eval_strategy steps --eval_steps 1 --gradient_checkpointing --use_peft --lora_target_modules q_proj"
    saved = run_script(name, options, rows, policy, tmp_path, monkeypatch)
    adapter = {key: value for key, value in load_file(saved / "adapter_model.safetensors").items() if "lora_B" in key}
    assert adapter and all("q_proj" in key and value.any() for key, value in adapter.items())


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_trls_scripts_load_in_4_bit(name, policy, tmp_path, monkeypatch):
    rows = demonstrations(8) if name == "sft" else rows_of(name, 8)
    options = OPTIONS + " --use_peft --load_in_4bit --lora_target_modules q_proj v_proj"
    saved = run_script(name, options, rows, policy, tmp_path, monkeypatch)
    assert (saved / "adapter_model.safetensors").exists()


def test_a_quantisation_is_for_a_model_that_is_named(policy, tokenizer, tmp_path):
    packed, lora = BitsAndBytesConfig(load_in_4bit=True), LoraConfig(target_modules="q_proj")
    args = align.SFTConfig(str(tmp_path), **QUIET)
    trainer = align.SFTTrainer(policy, args, rows_of("sft", 4), quantization_config=packed, peft_config=lora)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    with pytest.raises(ConfigError, match="quantization_config is for loading a model by its name"):
        align.DPOTrainer(
            tiny_model(tokenizer), None, rows_of("dpo", 4), processing_class=tokenizer, quantization_config=packed
        )
    args = align.RewardConfig(str(tmp_path), model_init_kwargs={"quantization_config": packed}, **QUIET)
    with pytest.raises(ConfigError, match="quantization_config is given twice"):
        align.RewardTrainer(policy, args, rows_of("reward", 4), quantization_config=packed)


@pytest.mark.parametrize("parser", [TrlParser, HfArgumentParser])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_read_by_trls_parser(parser, name, tmp_path):
    made = parser((getattr(align, name),))
    assert "--gradient_checkpointing" in made.format_help()
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--gradient_checkpointing", "--bf16"]
    (args,) = made.parse_args_into_dataclasses([*flags, "--model_init_kwargs", '{"attn_implementation": "eager"}'])
    assert args.gradient_checkpointing and args.bf16 and args.model_init_kwargs == {"attn_implementation": "eager"}


@pytest.mark.parametrize(("written", "read"), [("none", "none"), ("batch", "batch"), ("False", "none")])
def test_scale_rewards_by_trls_parser(written, read, tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_cpu", "--use_vllm", "False", "--scale_rewards", written]
    options += ["--chat_template_kwargs", '{"thoughts": false}', "--generation_kwargs", '{"top_k": 3}']
    (args,) = TrlParser((align.GRPOConfig,)).parse_args_into_dataclasses(options)
    assert (args.scale_rewards, args.top_k, args.chat_template_kwargs) == (read, 3, {"thoughts": False})


def test_text_that_is_no_mapping_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model_init_kwargs: 'eager' is no mapping"):
        align.DPOConfig(str(tmp_path), model_init_kwargs="eager", **QUIET)


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_eos_token(method, policy, tmp_path):
    cls, config = {"sft": (align.SFTTrainer, align.SFTConfig), "reward": (align.RewardTrainer, align.RewardConfig)}[
        method
    ]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    before, word = tokenizer.eos_token_id, "rose"
    trainer = cls(policy, config(str(tmp_path), eos_token=word, max_steps=1, **QUIET), rows_of(method, 4))
    new = tokenizer.convert_tokens_to_ids(word)
    ids = trainer.train_dataset[0]["input_ids" if method == "sft" else "chosen_ids"]
    assert ids[-1] == new != before
    assert trainer.model.config.eos_token_id == trainer.processing_class.eos_token_id == new
    trainer.train()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == word
    if method == "sft":
        written = json.loads((tmp_path / "generation_config.json").read_text())
        assert written["eos_token_id"] == [new, before]
    with pytest.raises(ConfigError, match="eos_token: '<none>' is not in the vocabulary"):
        cls(policy, config(str(tmp_path), eos_token="<none>", **QUIET), rows_of(method, 4))


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_an_optimiser_by_its_class(method, policy, tmp_path):
    cls, config = {"sft": (align.SFTTrainer, align.SFTConfig), "reward": (align.RewardTrainer, align.RewardConfig)}[
        method
    ]
    kind = torch.optim.SGD, {"lr": 0.125}
    args = config(str(tmp_path), max_steps=1, **QUIET)
    trainer = cls(policy, args, rows_of(method, 4), optimizer_cls_and_kwargs=kind)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD) and trainer.state.log_history[0][
        "learning_rate"
    ] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("trainer", "argument"),
    [
        ("SFTTrainer", "data_collator"),
        ("SFTTrainer", "compute_loss_func"),
        ("DPOTrainer", "data_collator"),
        ("RewardTrainer", "preprocess_logits_for_metrics"),
        ("GRPOTrainer", "rollout_func"),
    ],
)
def test_arguments_of_trls_that_do_not_exist_are_answered(trainer, argument):
    with pytest.raises(ConfigError, match=f"{trainer} takes no {argument}. Instead: "):
        getattr(align, trainer)("model", **{argument: print})


def test_trls_order_of_arguments_is_answered():
    with pytest.raises(ConfigError, match="DPOTrainer: argument 2 is args, which is given by its name too"):
        align.DPOTrainer("model", "reference", args=None, train_dataset=[])


def test_the_tokenizer_is_of_the_models_revision(tmp_path, monkeypatch):
    """Of `model_init_kwargs`, as TRL's scripts fill them."""
    tokenizer, seen = toy.tokenizer(), []
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *a, **options: seen.append(options.get("revision")) or load(*a)
    )
    args = align.DPOConfig(str(tmp_path / "run"), model_init_kwargs={"revision": "v2"}, **QUIET)
    align.DPOTrainer(str(tmp_path / "model"), args, rows_of("dpo", 4))
    assert seen == ["v2"]
    shutil.rmtree(tmp_path / "model")


def test_predict_takes_rows_as_evaluate_does(policy, tmp_path):
    args = align.SFTConfig(str(tmp_path), **QUIET)
    trainer = align.SFTTrainer(policy, args, demonstrations(4))
    rows = demonstrations(4, seed=1)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])
    args = align.RLOOConfig(str(tmp_path), rollout={"backend": "transformers"}, max_completion_length=4, **QUIET)
    drawn = align.RLOOTrainer(policy, wanted_words, args, prompts(8))
    with pytest.raises(ConfigError, match="predict: a policy has completions"):
        drawn.predict(prompts(4))


def test_trls_callback_for_completions(policy, tmp_path):
    """It asks a column of prompts, at every step."""
    some = GenerationConfig(max_new_tokens=2)
    args = align.SFTConfig(str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, **QUIET)
    trainer = align.SFTTrainer(policy, args, demonstrations(4), demonstrations(4, seed=1))
    shown = LogCompletionsCallback(trainer, some, num_prompts=2)
    trainer.add_callback(shown)
    trainer.train()
    assert [row[0] for row in shown.table] == ["1", "1"]
    pairs = align.DPOTrainer(policy, align.DPOConfig(str(tmp_path), **QUIET), rows_of("dpo", 4), rows_of("dpo", 4, 1))
    with pytest.raises(ConfigError, match="LogCompletionsCallback reads .* Instead: num_logged_completions"):
        pairs.add_callback(LogCompletionsCallback(pairs, some, num_prompts=2))


def test_the_best_policy_and_the_dtype_of_trls_examples(policy, tmp_path):
    args = align.RLOOConfig(
        str(tmp_path),
        rollout={"backend": "transformers"},
        max_completion_length=4,
        max_steps=1,
        metric_for_best_model="eval_reward",
        model_init_kwargs={"dtype": torch.bfloat16},  # which the file of evaluations has by its name
        load_best_model_at_end=True,
        **QUIET | {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1},
    )
    trainer = align.RLOOTrainer(policy, wanted_words, args, prompts(8), prompts(2, 1))
    trainer.train()
    assert trainer.state.best_metric == logged(trainer, "eval_proxy")[-1]
    header = json.loads((tmp_path / "overoptimization.jsonl").read_text().splitlines()[0])
    assert header["config"]["model_init_kwargs"] == {"dtype": "torch.bfloat16"}
