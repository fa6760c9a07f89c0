"""Processes that would each train a run of their own, and what splits a model in ways that are not done here, are
refused before a model is loaded."""

import json
from types import SimpleNamespace

import pytest
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

import align
from align.config.resolve import resolve
from align.data import toy
from align.distributed.fsdp2 import own_layers
from align.errors import ConfigError
from align.trainers.core import processes
from align.trainers.core.early import check_machine
from align.trainers.core.processes import check_alone, check_layers, check_sharding
from tests.modeling import tiny
from tests.trainers.tiny_runs import QUIET, tiny_model
from tests.warm import run_ranks

FOUND_BY = (
    "RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_CPU",
    *processes.COUNTS,
)


@pytest.fixture(autouse=True)
def started_alone(monkeypatch):
    for name in FOUND_BY:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0 .* RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: .* unset LOCAL"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}, "and MASTER_ADDR not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .* RANK, MASTER_ADDR not set: .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE is 2 .* would train by itself"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS is 8 .* unset SLURM_STEP_NUM_TASKS"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "OMPI_COMM_WORLD_SIZE is 2 .* MASTER_ADDR not set",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "OMPI_COMM_WORLD_SIZE is 2 .* train by itself"),
    ],
)
@pytest.mark.parametrize("config", [align.SFTConfig, align.DPOConfig, align.RLOOConfig])
def test_a_process_of_several_does_not_train_by_itself(config, variables, problem, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        config(str(tmp_path), **QUIET | {"use_cpu": False})  # with which accelerate would wait for the others


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "-1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # of a batch script, which starts none of its tasks by itself
        {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1"},
    ],
)
def test_a_process_that_is_alone_trains(variables, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert align.DPOConfig(str(tmp_path), **QUIET).world_size == 1


def test_tasks_of_slurm_whose_launcher_has_started_this_process(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    check_alone(16)
    monkeypatch.setenv("LOCAL_RANK", "0")  # one process per task, each a run
    check_alone(1)


@pytest.mark.parametrize("given", [["--num_processes", "2"], ["--num-processes=2"], ["--config_file", "FILE"]])
def test_accelerate_starts_one_process_on_processors(given, tmp_path, monkeypatch):
    """`accelerate launch --cpu --num_processes 2 script.py`: one, with the address of a run of several."""
    (tmp_path / "file.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    given = [str(tmp_path / "file.yaml") if word == "FILE" else word for word in given]
    words = ["/usr/bin/python", "/usr/bin/accelerate", "launch", "--cpu", *given, "script.py", "--learning_rate", "1"]
    monkeypatch.setattr(processes.psutil, "Process", lambda number: SimpleNamespace(cmdline=lambda: words))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_alone(1)  # no address: one was asked for
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="accelerate launch was asked for 2 processes, and has started one"):
        check_alone(1)
    words[3:] = ["--num_processes", "1", "script.py"]
    check_alone(1)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"fsdp_config": {"version": 2}}, "fsdp_config has no effect without fsdp: true"),
        ({"fsdp": True, "fsdp_config": {"reshrad_after_forward": False}}, "reshrad_after_forward has no effect"),
        ({"fsdp": True, "fsdp_config": {"fsdp_min_num_params": 1000}}, "fsdp_min_num_params has no effect"),
        ({"fsdp": True, "fsdp_config": {"ignored_modules": "lm_head"}}, "ignored_modules has no effect"),
        ({"fsdp": True, "fsdp_config": "nowhere.json"}, "fsdp_config: nowhere.json is no file of JSON"),
        ({"fsdp": True, "fsdp_config": __file__}, "fsdp_config: .* is no file of JSON"),
        ({"deepspeed": "nowhere.json"}, "deepspeed: nowhere.json is no file of JSON"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tp_size 2: there is no tensor parallelism here"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "cp_size 2: there is no context parallelism here"),
    ],
)
@pytest.mark.parametrize("config", [align.SFTConfig, align.RewardConfig, align.GRPOConfig])
def test_options_of_splitting(config, given, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        config(str(tmp_path), **QUIET | given)


@pytest.mark.parametrize("value", ["true", "false"])
def test_fsdp_of_a_file_is_a_truth_value(value, tmp_path):
    """transformers declares the option as text, so that a file's came as the word, and was unknown. A dry run and a
    server of a run's completions read the file in one process."""
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: m\ndataset_name: d\noutput_dir: o\nfsdp: {value}\n")
    run = resolve("dpo", str(tmp_path / "run.yaml"), ["--report_to", "none"])
    assert bool(run.training.fsdp) is (value == "true")
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--fsdp", value]
    assert bool(resolve("sft", None, words).training.fsdp) is (value == "true")


def test_one_process_trains_nothing_that_is_split(tmp_path):
    args = align.SFTConfig(str(tmp_path), **QUIET | {"fsdp": True})
    with pytest.raises(ConfigError, match="fsdp splits a model over processes, and this is one"):
        check_machine(args)


def test_deepspeed_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="deepspeed: the package is not installed"):
        processes.check_deepspeed(SimpleNamespace(deepspeed={"zero_optimization": {"stage": 2}}))


BY_LAUNCHER = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.mark.parametrize(
    ("variables", "own", "problem"),
    [
        ({"FSDP_VERSION": "1"}, {"version": 1}, "fsdp_version: 1"),
        (
            {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"},
            {"auto_wrap_policy": "SIZE_BASED_WRAP"},
            "SIZE_BASED_WRAP chooses lists of layers, which FSDP2 cannot split",
        ),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, None, "fsdp_ignored_modules: gradients"),
        (
            {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,MistralDecoderLayer"},
            {"transformer_layer_cls_to_wrap": ["MistralDecoderLayer"]},
            "no layer of the class MistralDecoderLayer; its layers are LlamaDecoderLayer",
        ),
    ],
)
def test_fsdp_as_accelerate_or_the_run_asks_for_it(variables, own, problem, monkeypatch):
    model = tiny_model(toy.tokenizer())

    def check(fsdp, config):
        args = SimpleNamespace(fsdp=fsdp, fsdp_config=config, world_size=2)
        check_sharding(args), check_layers(args, model)

    check(None, None)  # neither asks for it
    check(True, {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    if own is not None:
        with pytest.raises(ConfigError, match=problem):
            check(True, own)
    for name, value in BY_LAUNCHER.items():
        monkeypatch.setenv(name, value)
    check(None, None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        check(None, None)


@pytest.mark.parametrize("named", [None, ["LlamaDecoderLayer"]])
def test_each_model_is_split_by_its_own_layers(named):
    """A reference or critic of another architecture ended in accelerate's "Could not find the layer class"."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=named
    )
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    for model in (tiny_model(toy.tokenizer()), tiny.causal("gpt2"), tiny_model(toy.tokenizer())):
        with own_layers(accelerator, model):
            plugin.set_auto_wrap_policy(model)
            chosen = [m for m in model.modules() if fsdp2_prepare_auto_wrap_policy(plugin, model)(m)]
        assert chosen == list(getattr(model.base_model, "layers", None) or model.base_model.h)
        assert plugin.transformer_cls_names_to_wrap == named


@pytest.mark.parametrize(
    ("optim", "problem"),
    [
        ("adafactor", "optim: adafactor does not run under FSDP2: it adds shards to whole tensors"),
        ("adagrad", "optim: adagrad does not run under FSDP2: it makes its state before"),
        ("sgd", "optim: sgd without momentum has no state.*Write optim_args: momentum=0.9, fsdp_state_dict_type"),
    ],
)
def test_optimizers_under_fsdp2(optim, problem, tmp_path, monkeypatch):
    """The first two ended in errors of torch at the first step, the third in one when it was resumed."""
    given = QUIET | {"optim": optim, "save_strategy": "steps"}
    align.SFTConfig(str(tmp_path), **given)
    for name, value in BY_LAUNCHER.items():
        monkeypatch.setenv(name, value)
    for config in (align.SFTConfig, align.DPOConfig):
        with pytest.raises(ConfigError, match=problem):
            config(str(tmp_path), **given)
    align.SFTConfig(str(tmp_path), **given | {"optim": "rmsprop"})
    if optim == "sgd":
        align.SFTConfig(str(tmp_path), **given, optim_args="momentum=0.9")
        align.SFTConfig(str(tmp_path), **given | {"save_strategy": "no"})
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
        align.SFTConfig(str(tmp_path), **given)


@pytest.mark.parametrize("backend", ["no", "INDUCTOR"])
def test_the_compiler_of_accelerates_file(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    if backend == "no":
        align.DPOConfig(str(tmp_path), **QUIET)
        return
    with pytest.raises(ConfigError, match="dynamo_backend: INDUCTOR of accelerate's file compiles the model"):
        align.DPOConfig(str(tmp_path), **QUIET)


SCRIPT = """
import sys
import torch.distributed as dist
from align.trainers.core.options import BaseConfig

for fsdp, own in ((True, {"activation_checkpointing": True, "version": 2}), ("true", sys.argv[1])):
    args = BaseConfig(output_dir="run", report_to="none", fsdp=fsdp, fsdp_config=own)
    dist.barrier()  # the first holds the store that the second connects by
    print(args.gradient_checkpointing, args.fsdp_config["activation_checkpointing"])
"""


def test_recomputation_in_a_file_of_fsdp(tmp_path):
    """FSDP's own becomes the run's, of `fsdp_config` as a mapping and as a file, of which it did not."""
    (tmp_path / "fsdp.json").write_text(json.dumps({"activation_checkpointing": True}))
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = run_ranks(str(tmp_path / "script.py"), str(tmp_path / "fsdp.json"), logs=tmp_path / "logs")
    assert [text.count("True False\n") for text in printed] == [2, 2]


def test_reentrant_checkpoints_of_an_adapter(tmp_path):
    """DDP's search for unused parameters ended in "Expected to mark a variable ready only once": transformers leaves it
    out of full models alone."""
    given = QUIET | {"gradient_checkpointing": True}
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert align.DPOConfig(str(tmp_path), **given).ddp_find_unused_parameters is None
    assert align.DPOConfig(str(tmp_path), **given, **reentrant).ddp_find_unused_parameters is False
    assert align.SFTConfig(str(tmp_path), **given, **reentrant).ddp_find_unused_parameters is False
    own = align.DPOConfig(str(tmp_path), **given, **reentrant, ddp_find_unused_parameters=True)
    assert own.ddp_find_unused_parameters is True
