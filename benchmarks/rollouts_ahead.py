"""Time of an RLOO step with `rollouts_ahead: 1` against 0, where drawing and training take about equally long.

    python benchmarks/rollouts_ahead.py [--rounds 6] [--steps 6] [--prompts 16] [--tokens 96] [--output FILE]

One vLLM server on one processor core, started by `align serve`, and the trainer on another, each with one thread. A
round is a run of `--steps` optimiser steps with 0 and one with 1, in turns; a measurement is the mean time by the clock
of a run's steps after the first one (whose completions nobody could draw ahead), and a result the ratio of the two of a
round. All else is the same: prompts, draws' lengths, `rollout_correction: token_truncate`, no reference (`beta: 0`).
`generate` and `train` are the parts of a step with 0 and say how equally long they are: with parts g and t, and o for
what waits for both (the push with its proof, scores), no schedule gets below (max(g, t) + o) / (g + t + o): `least`.
`undisturbed` is the ratio of the fastest fifth of steps of each side, for machines that do other work too.
`server` and `trainer` are seconds of processor time per step, which other work on the machine stretches less than the
clock's, `server_waited` and `trainer_waited` those in which each was ready and other work had its core.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "rollouts_ahead.json"
KEY = "benchmark"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CONFIG = """
method: rloo
model_name_or_path: {folder}
dataset_name: {folder}/prompts.jsonl
rewards: [{{type: rule, function: "builtins:len"}}]
max_prompt_length: 32
max_completion_length: {tokens}
rollout: {{backend: server, urls: ["{url}"], kv_cache_gib: 1}}
"""


def write_world(folder: Path, tokens: int) -> str:
    """A model, its tokenizer and the config of the server; returns the server's address."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.data import toy

    tokenizer = toy.tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, tokens=tokens, url=url))
    return url


def start_server(folder: Path, url: str, core: int) -> subprocess.Popen:
    command = ["taskset", "-c", str(core), sys.executable, "-m", "align", "serve", str(folder / "run.yaml")]
    server = subprocess.Popen([*command, "--port", url.rpartition(":")[2]], stdout=subprocess.PIPE, text=True)
    if "serving at" not in (line := server.stdout.readline()):
        raise SystemExit(f"the server did not start: {line}")
    return server


def unique_words(completions, **columns) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


def make_trainer(folder: Path, url: str, ahead: int, options):
    from datasets import Dataset

    from align import RLOOConfig, RLOOTrainer
    from align.data import toy

    args = RLOOConfig(
        output_dir=str(folder / f"ahead_{ahead}"),
        rollouts_ahead=ahead,
        rollout_correction="token_truncate",
        rollout={"backend": "server", "urls": [url]},
        beta=0.0,
        num_generations=4,
        per_device_train_batch_size=options.prompts,
        max_prompt_length=32,
        max_completion_length=options.tokens,
        max_steps=options.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = Dataset.from_list(toy.split_prompts(0, options.prompts * options.steps)[0])
    return RLOOTrainer(str(folder), unique_words, args, rows)


def on_core(pid: int) -> tuple[float, float]:
    """Seconds that a process and those that it started had a processor core, and that their main threads were ready to
    and waited for one, which others had."""
    import psutil

    parent = psutil.Process(pid)
    every = [parent, *parent.children(recursive=True)] if pid != os.getpid() else [parent]
    waits = [int(Path(f"/proc/{one.pid}/schedstat").read_text().split()[1]) / 1e9 for one in every]
    return sum(sum(one.cpu_times()[:2]) for one in every), sum(waits)


def measured(trainer, server: subprocess.Popen) -> dict:
    """Seconds of a step by the clock, of its parts, and of the processor, means over a run's steps after the first; and
    of each of those steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append((time.perf_counter(), *on_core(server.pid), *on_core(os.getpid())))

    clock = Clock()
    clock.ends = []
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    logs = [entry for entry in trainer.state.log_history if "time/train" in entry][-trainer.args.max_steps + 1 :]
    parts = {name: statistics.mean(entry[f"time/{name}"] for entry in logs) for name in ("generate", "train", "sync")}
    spent = [(end - start) / (len(clock.ends) - 1) for start, end in zip(clock.ends[0], clock.ends[-1], strict=True)]
    each = [end[0] - start[0] for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    names = ("step", "server", "server_waited", "trainer", "trainer_waited")
    return dict(zip(names, spent, strict=True)) | parts | {"steps": each}


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 6), ("steps", 6), ("prompts", 16), ("tokens", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", ALIGN_ROLLOUT_KEY=KEY)  # before torch is imported
    os.sched_setaffinity(0, cores[:1])
    rounds: list[dict] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = write_world(folder, options.tokens)
        server = start_server(folder, url, cores[-1])
        try:
            trainers = [make_trainer(folder, url, ahead, options) for ahead in (0, 1)]
            for number in range(options.rounds + 1):  # the first one warms up
                order = (0, 1) if number % 2 else (1, 0)
                found = {ahead: measured(trainers[ahead], server) for ahead in order}
                if number:
                    rounds.append(found)
                    print(json.dumps(found), flush=True)
            for trainer in trainers:
                trainer.close()
        finally:
            server.terminate()
            server.wait(60)
    least = [(max(r[0]["generate"], r[0]["train"]) + over(r[0])) / r[0]["step"] for r in rounds]
    result = {
        "ratio": spread([r[1]["step"] / r[0]["step"] for r in rounds]),
        "least": spread(least),
        "undisturbed": fastest(rounds, 1) / fastest(rounds, 0),
        "seconds": {
            str(a): {part: spread([r[a][part] for r in rounds]) for part in rounds[0][a] if part != "steps"}
            for a in (0, 1)
        },
        "rounds": rounds,
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "processor": platform.processor() or platform.machine(),
        "cores": len(cores),
        "load_average": [load, os.getloadavg()[0]],  # before and after
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("ratio", "undisturbed", "least")}))


def fastest(rounds: list[dict], ahead: int) -> float:
    """Seconds of a step that nothing disturbed: the median of the fastest fifth of all rounds' steps."""
    steps = sorted(seconds for found in rounds for seconds in found[ahead]["steps"])
    return statistics.median(steps[: max(1, len(steps) // 5)])


def over(part: dict[str, float]) -> float:
    """Seconds of a step that are neither drawing nor training."""
    return part["step"] - part["generate"] - part["train"]


if __name__ == "__main__":
    main()
