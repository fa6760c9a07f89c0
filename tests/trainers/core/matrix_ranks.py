"""Every method in every precision with every kind of adapter, as the command line makes it: one process, DDP and FSDP2.

A row of the table is a run of a few steps, or its refusal. Run as a script on two processes: policy, folder, setups.
These leave out what they share with one process: refusals, which come before anything is distributed; full training of
bfloat16 weights, which are held in float32; and float32, of which `test_fsdp2` and its like compare every number.
"""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.cli import build
from align.config.resolve import resolve
from align.errors import AlignError
from tests.trainers.accelerate_setups import under
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import demonstrations, prompts

METHODS = ("sft", "reward", "dpo", "kto", "sparsepo", "remax", "ppo")
PRECISIONS = {
    "float32": "--bf16 false --dtype float32",
    "bf16 autocast": "--bf16 true --dtype float32",
    "bf16 weights": "--bf16 true --dtype bfloat16",
}
LORA = "--use_peft --lora_r 4 --lora_dropout 0"  # dropout is drawn otherwise on two processes
ADAPTERS = {"full": "", "lora": LORA, "qlora": f"{LORA} --load_in_4bit"}
ON_TWO = {
    "ddp": (("bf16 autocast", "full"), ("bf16 weights", "qlora"), ("bf16 weights", "lora")),
    "fsdp2": (
        ("bf16 autocast", "full"),
        ("bf16 autocast", "lora"),
        ("bf16 weights", "lora"),
        ("bf16 weights", "qlora"),
    ),
}
# the epsilon keeps AdamW from making whole steps of rounding errors
COMMON = (
    "--max_steps 3 --logging_steps 1 --learning_rate 5e-3 --lr_scheduler_type constant --report_to none --use_cpu "
    "--save_strategy no --disable_tqdm true --adam_epsilon 0.01"
)
# the engine in float32: one token drawn otherwise by rounding would make other rewards
ON_POLICY = (
    "--learning_rate 5e-4 --rollout.backend transformers --rollout.dtype float32 --max_prompt_length 16 "
    "--max_completion_length 6 --beta 0.05"
)
OF_METHOD = {
    "sft": "--max_length 32",
    "reward": "--max_length 32",
    "dpo": "--max_length 32",
    "kto": "--max_length 32",  # of each pair both answers, labelled
    "sparsepo": "--max_length 32 --mask_dropout 0",
    "remax": ON_POLICY,
    "ppo": f"{ON_POLICY} --num_mini_batches 1 --num_iterations 1",
}


def write_data(folder: Path) -> dict[str, str]:
    """The rows of each method in files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"completions": demonstrations(24), "pairs": toy_pairs(24), "prompts": prompts(24)}
    for name, data in rows.items():
        data.to_json(folder / f"{name}.jsonl")
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def command(method: str, precision: str, adapter: str, policy: str, data: dict[str, str], world: int) -> list[str]:
    kind = {"sft": "completions", "remax": "prompts", "ppo": "prompts"}.get(method, "pairs")
    options = f"{COMMON} {OF_METHOD[method]} {PRECISIONS[precision]} {ADAPTERS[adapter]}"
    options += f" --per_device_train_batch_size {4 // world} --model_name_or_path {policy} --dataset_name {data[kind]}"
    if method == "ppo" and adapter != "full":
        options += f" --critic_model_name_or_path {policy}"
    if kind == "prompts":
        return [*options.split(), "--rewards", '{"type": "rule", "function": "align.data.toy:gold"}']
    return options.split()


def run(method: str, argv: list[str], folder: Path) -> dict:
    """{loss, grad_norm: by step} of a run whose model is saved in the folder and read back; or {refused: why}."""
    try:
        trainer = build.trainer(resolve(method, None, [*argv, "--output_dir", str(folder)]))
        trainer.train()
        trainer.save_model(str(folder))
        if hasattr(trainer, "close"):
            trainer.close()
    except AlignError as error:
        return {"refused": str(error)}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {key: [entry[key] for entry in logs] for key in ("loss", "grad_norm")}


def rows(setup: str) -> list[tuple[str, str, str]]:
    """(method, precision, adapter)"""
    if setup == "one":
        return list(itertools.product(METHODS, PRECISIONS, ADAPTERS))
    kinds = ON_TWO[setup]
    return [(m, *kind) for m in METHODS for kind in kinds if not (m in ("remax", "ppo") and "qlora" in kind)]


def table(policy: str, folder: Path, setup: str) -> dict[str, dict]:
    """The rows of a setup, by 'method, precision, adapter'."""
    world = 1 if setup == "one" else 2
    data = write_data(folder / f"data-{dist.get_rank() if world == 2 else 0}")
    found = {}
    with under(setup):
        for row in rows(setup):
            name = ", ".join(row)
            found[name] = run(row[0], command(*row, policy, data, world), folder / setup / name)
    return found


if __name__ == "__main__":
    policy, folder, setups = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    dist.init_process_group("gloo")
    found = {setup: table(policy, folder, setup) for setup in setups}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
