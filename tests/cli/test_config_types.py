"""Values of a wrong type from Python: refused by the option's name before anything looks at them, or made what they
were meant as."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from align import DPOConfig, RewardConfig, RLOOConfig, SFTConfig
from align.config.arguments import hints, init_fields, instead_of
from align.config.nested import nested_options
from align.config.resolve import resolve
from align.config.types import check_types
from align.errors import ConfigError
from align.lazy import load
from align.methods import METHODS

OPEN = ("reward_clip_range",)  # a name of TRL's that any value is read of


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_no_option_takes_what_is_of_no_type(method):
    cls = load(method.config)
    numbers = 0
    for name, field in init_fields(cls).items():
        if instead_of(field) or name in OPEN:  # refused with what to do instead
            continue
        nonsense = [object(), {1: object()}]
        if set(get_args(hints(cls)[name]) or (hints(cls)[name],)) <= {int, float, bool, type(None)}:
            numbers += 1
            nonsense += ["abc", "false", "3", [], {}, (1, 2), np.array([1.0, 2.0])]
        for value in nonsense:
            with pytest.raises(ConfigError, match=f"^{name} must be ") as error:
                check_types(cls, {name: value})
            assert error.value.key == name
    assert numbers > 50


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            SFTConfig,
            {"gradient_checkpointing": "false"},
            "must be True, False or None, got 'false' .str.: write False, w",
        ),
        (SFTConfig, {"packing": "abc"}, "packing must be True or False, got 'abc' .str."),
        (SFTConfig, {"packing": 2}, "packing must be True or False, got 2 .int."),
        (SFTConfig, {"seed": True}, "seed must be a whole number, got True .bool."),
        (SFTConfig, {"max_steps": "10"}, "max_steps must be a whole number, got '10' .str.: write it without quotes"),
        (SFTConfig, {"packing": None}, "packing must be True or False, got None: leave it out for its default, False"),
        (SFTConfig, {"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs must be a mapping, text or None, got 3 .int."),
        (SFTConfig, {"lr_scheduler_kwargs": "abc"}, "lr_scheduler_kwargs: 'abc' is no mapping; write it as"),
        (SFTConfig, {"packing_strategy": "bfg"}, "packing_strategy cannot be 'bfg'; valid: bfd, bfd_split, wrapped"),
        (SFTConfig, {"optim": "adamw_torh"}, "optim cannot be 'adamw_torh'; nearest valid: adamw_torch"),
        (SFTConfig, {"include_num_input_tokens_seen": "al"}, "cannot be 'al'; valid: no, all, non_padding"),
        (SFTConfig, {"hub_token": 123}, r"hub_token must be text or None, got '\*+' .int."),
        (
            SFTConfig,
            {"gradient_checkpointing_kwargs": {"use_reentrnt": True}},
            "gradient_checkpointing_kwargs: unknown key use_reentrnt; valid: use_reentrant",
        ),
        (
            SFTConfig,
            {"gradient_checkpointing_kwargs": {"use_reentrant": "false"}},
            "gradient_checkpointing_kwargs: use_reentrant must be True or False, got 'false' .str.",
        ),
        (
            SFTConfig,
            {"dataloader_multiprocessing_context": "fork"},
            "dataloader_multiprocessing_context: there are no workers",
        ),
        (
            SFTConfig,
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-9},
            "lr_scheduler_kwargs: .* the schedule polynomial takes: lr_end .1e-07. must be smaller than initial lr",
        ),
        (DPOConfig, {"loss_options": 3}, "loss_options must be a mapping to numbers or None, got 3 .int."),
        (DPOConfig, {"loss_options": {"tau": "a"}}, "loss_options must be a mapping to numbers or None, got"),
        (DPOConfig, {"loss_weights": 3}, "loss_weights must be a list of numbers or None, got 3 .int."),
        (DPOConfig, {"loss_weights": ["1"]}, "loss_weights must be a list of numbers or None, got"),
        (DPOConfig, {"loss_type": 3}, "loss_type must be a list of texts, got 3 .int."),
        (DPOConfig, {"loss_type": ""}, "loss_type must be a list of texts, got '' .str."),
        (RewardConfig, {"accelerator_config": True}, "accelerator_config must be a mapping, text or None, got True"),
        (RewardConfig, {"metric_for_best_model": 3}, "metric_for_best_model must be text or None, got 3 .int."),
        (
            RewardConfig,
            {"eval_strategy": None},
            "eval_strategy must be text, got None: leave it out for its default, 'no'",
        ),
        (RewardConfig, {"parallelism_config": {}}, "parallelism_config must be a ParallelismConfig or None, got"),
        (RLOOConfig, {"reward_weights": 1.0}, "reward_weights must be a list of numbers or None, got 1.0 .float."),
        (RLOOConfig, {"constraints": {"reward": "a"}}, "constraints must be a list of mappings or None, got"),
        (RLOOConfig, {"generation_kwargs": 3}, "generation_kwargs must be a mapping, text or None, got 3 .int."),
    ],
)
def test_the_option_is_named_with_what_to_write(config, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        config(output_dir=str(tmp_path), use_cpu=True, **options)
    assert error.value.key in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "accelerator_config: {split_batches: 'false'}",
            "accelerator_config: split_batches must be True or False, got",
        ),
        (
            "accelerator_config: {even_batchs: true}",
            "accelerator_config: unknown key even_batchs; nearest valid: even_b",
        ),
        ("accelerator_config: no.json", "accelerator_config: no.json is no file of JSON that can be read: "),
        ("parallelism_config: {tp_sise: 2}", "parallelism_config: unknown key tp_sise; nearest valid: tp_size"),
        ("model_revision: null", "model_revision: input should be a valid string .a value of type str., not 'null'"),
        ("dataset_train_split:", "dataset_train_split: input should be a valid string .a value of type str., not ''"),
        ("loss_weights: [1.0e+40]", "loss_weights must be at least -1000000000000 and at most 1e.12, got 1e.40"),
        (
            "lora_r: 8",
            "lora_r is not read without use_peft: set use_peft: true to train an adapter, or use_peft: false",
        ),
        ("bnb_4bit_quant_type: fp4", "bnb_4bit_quant_type is not read without load_in_4bit: set load_in_4bit: true to"),
        ("report_to: [wandb, 3]", "report_to: input should be a valid string"),
    ],
)
def test_of_a_file(line, message, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: a/b\ndataset_name: a.jsonl\nuse_cpu: true\n{line}\n")
    with pytest.raises(ConfigError, match=f"run.yaml, line 4: {message}"):
        resolve("dpo", str(tmp_path / "run.yaml"), [])


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("rewards", [{"type": "classifier", "path": "a", "dtype": ["float32"]}], "rewards.0.dtype: input should be"),
        ("rewards", [{"type": "classifier", "path": "a", "dtype": "floot32"}], "rewards.0.dtype: input should be"),
        ("rewards", [{"type": "implicit", "path": "a", "device": 0.5}], "rewards.0.device: input should be"),
        ("rewards", [{"type": "length", "maximum": True}], "rewards.0.maximum: input should be a number, not True"),
        ("rollout", {"backend": {"vllm": 1}}, "rollout: backend must be one of auto, vllm, "),
    ],
)
def test_of_a_section(section, value, message):
    with pytest.raises(ConfigError, match=message):
        nested_options()[section].read(value, section)


def test_the_names_of_torchs_objects():
    spec = {"type": "classifier", "path": "a", "dtype": torch.bfloat16, "device": torch.device("cpu")}
    (read,) = nested_options()["rewards"].read([spec], "rewards")
    assert (read.dtype, read.device) == ("bfloat16", "cpu")


def test_what_was_meant_is_taken(tmp_path):
    args = SFTConfig(
        output_dir=tmp_path / "run",
        use_cpu=1,
        packing=np.bool_(True),
        packing_strategy="wrapped",
        weight_decay=torch.tensor(0.5),
        gradient_accumulation_steps=8 / 2,
        resume_changes="learning_rate",
        model_init_kwargs='{"revision": "main"}',
        report_to=None,
        optim=SFTConfig(str(tmp_path), use_cpu=True).optim,
        include_num_input_tokens_seen=True,
    )
    assert (args.output_dir, args.use_cpu, args.packing) == (str(tmp_path / "run"), True, True)
    assert (args.weight_decay, repr(args.gradient_accumulation_steps)) == (0.5, "4")
    assert (args.resume_changes, args.model_init_kwargs) == (["learning_rate"], {"revision": "main"})
    assert (args.report_to, args.include_num_input_tokens_seen) == ([], "all")
    on_policy = RLOOConfig(str(tmp_path), use_cpu=True, min_p=None, reward_weights=np.array([0.5, 0.5]))
    assert (on_policy.min_p, on_policy.reward_weights) == (0.0, [0.5, 0.5])


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_a_configuration_with_another_value(method, tmp_path):
    """`dataclasses.replace` gives all values again, as transformers has read them."""
    assert replace(load(method.config)(output_dir=str(tmp_path), use_cpu=True), seed=3).seed == 3


def test_a_configuration_of_a_function_with_types_of_its_own():
    class Own:
        pass

    @dataclass
    class Config(SFTConfig):
        own: "Own | None" = None
        packing: bool = False

    assert isinstance(Config("run", use_cpu=True, own=Own()).own, Own)
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        Config("run", use_cpu=True, seed="3")


def test_a_folder_may_be_a_path(tmp_path):
    assert DPOConfig(Path(tmp_path), use_cpu=True).output_dir == str(tmp_path)


def test_an_error_of_a_library_is_said_with_its_option():
    with pytest.raises(ConfigError, match="command line: pad_to_multiple_of: invalid literal for int.. with base 10"):
        resolve(
            "sft", None, ["--model_name_or_path=a/b", "--dataset_name=a.jsonl", "--use_cpu", "--pad_to_multiple_of=abc"]
        )
