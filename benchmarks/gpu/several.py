"""Stage `several` of gpu/check.py, for a machine with several GPUs: `align launch` as a user starts it.

Each part is a run of two steps of RLOO on a random model: trainer and server on GPUs of their own, with the weights
over NCCL, in full and with an adapter; a server whose model is split over two GPUs; two processes that share an engine;
FSDP2 beside two servers. Every push is proved, so a run that ends well had the right weights on all GPUs.
On a CPU the first part alone, over gloo.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from align.rollout.make import choose_backend
from benchmarks.gpu.common import Part, Setting, seconds_left

STEPS = 2
TO_REPORT = 10  # seconds before the stage's limit at which a run is given up: the part then says so
LORA = ["--use_peft", "true", "--lora_r", "16", "--lora_target_modules", "all-linear"]
NCCL = ["--rollout.transfer", "nccl"]
SHARED = ["--rollout.backend", "vllm", "--rollout.tensor_parallel", "2"]
RUNS = {
    "nccl": (2, "--num-processes 1 --rollout-gpus 1", NCCL),
    "shared_engine": (2, "--num-processes 2 --setup fsdp2", SHARED),
    "adapter": (2, "--num-processes 1 --rollout-gpus 1", LORA),
    "split_server": (3, "--num-processes 1 --rollout-gpus 2 --rollout-tensor-parallel 2", [*LORA, *NCCL]),
    "two_servers": (4, "--num-processes 2 --setup fsdp2 --rollout-gpus 2", NCCL),
}
"""Of each part: the GPUs that it needs, the words of `align launch`, and further options of the run."""


def parts(setting: Setting) -> Iterator[Part]:
    if choose_backend("auto") != "vllm":
        yield "nccl", lambda: "skipped: needs vLLM"
        return
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(setting, Path(folder))
        if setting.device == "cpu":
            words = "--cpu --num-processes 1 --rollout-gpus 1"
            yield "gloo", partial(launched, config, words, ["--rollout.transfer", "gloo"])
            return
        for name, (gpus, words, options) in RUNS.items():
            if torch.cuda.device_count() < gpus:
                yield name, lambda gpus=gpus: f"skipped: needs {gpus} GPUs"
            else:
                yield name, partial(launched, config, words, options)


def write_run(setting: Setting, folder: Path) -> Path:
    """The file of a run, with its model and prompts beside it."""
    from worlds.on_policy import make_model, make_prompts, make_tokenizer

    shape = {**setting.first_shape, "tie_word_embeddings": False}
    tokenizer = make_tokenizer(shape.pop("vocab_size"))
    make_model(tokenizer, **shape).to(setting.dtype).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    length = 8 if setting.small else 64
    make_prompts(64, length, len(tokenizer)).to_json(folder / "prompts.jsonl")
    engine = {"kv_cache_gib": 0.1 if setting.small else 4, "max_num_seqs": 16}
    if setting.device == "cuda":
        engine["engine_options"] = {"enforce_eager": True}
    config = {
        "method": "rloo", "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "prompts.jsonl"),
        "rewards": [{"type": "length", "maximum": length // 2}], "max_prompt_length": length,
        "max_completion_length": length, "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": STEPS,
        "save_steps": STEPS, "learning_rate": 1e-4, "beta": 0.0, "eval_strategy": "no", "report_to": "none",
        "logging_steps": 1, "bf16": setting.device == "cuda", "rollout": {"backend": "vllm", **engine},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(config))
    return folder / "run.yaml"


def launched(config: Path, words: str, options: list[str]) -> dict:
    """What the last step of a run says of itself."""
    output = Path(tempfile.mkdtemp(dir=config.parent))
    command = [sys.executable, "-m", "align", "launch", str(config), *words.split(), *options]
    limit = max(1.0, seconds_left() - TO_REPORT)
    try:
        ended = subprocess.run(
            [*command, "--output_dir", str(output)], capture_output=True, text=True,
            timeout=None if limit == float("inf") else limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")[-1000:]
        return {"failed": f"not done after {limit:.0f} seconds: {said}"}
    if ended.returncode:
        return {"failed": f"status {ended.returncode}: {ended.stderr[-1500:]}"}
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    last = [entry for entry in state["log_history"] if "loss" in entry][-1]
    found = {name: value for name, value in last.items() if name.startswith(("time/", "rollout/")) or name == "step"}
    return found if last["step"] == STEPS else {**found, "failed": f"ended at step {last['step']}"}
