"""Stage `on_policy` of gpu/check.py: steps of RLOO against TRL's RLOOTrainer, and of ReMax against PPO, with phases.

Prompts and completions have the lengths of hh-rlhf: a completion of the random model ends after a geometric number of
words (`worlds.on_policy`). Rollouts come from vLLM where it is installed (TRL's from its colocated engine, which needs
a GPU), on both sides with about as much memory. Each trainer is a process of its own, for two engines in one
process would share vLLM's globals. All import their libraries at once, which is much of a start; then the two of a
comparison start their engines, one after the other, and take turns, step by step, each round in another order, while
the other waits. A ratio is that of two steps of one round.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection

from benchmarks.gpu.common import SHAPES, SMALL, Part, Setting, hh_lengths, seconds_left, spread

START_SECONDS = 200  # to a trainer's first step
TO_REPORT = 5  # seconds before the stage's limit at which a trainer is given up: the message then names it
MEMORY_SHARE = 0.12  # of the GPU, for TRL's engine; an H100's is 9.6 GiB, 1 of them for the weights
KV_CACHE_GIB = 8  # of our engines, which then start without measuring the memory that others use beside them


def parts(setting: Setting) -> Iterator[Part]:
    sides = {name: Side(name, setting) for name in ("RLOO, ours", "RLOO, TRL", "ReMax, ours", "PPO, ours")}
    try:
        # TRL's engine first: it measures the memory that others use, so that none may start beside it
        yield "rloo", lambda: compared(setting, sides["RLOO, TRL"], sides["RLOO, ours"])
        yield "remax", lambda: compared(setting, sides["PPO, ours"], sides["ReMax, ours"])
    finally:
        for side in sides.values():
            side.end()


def sizes(setting: Setting) -> argparse.Namespace:
    shape = {**(SMALL if setting.small else SHAPES["0.5B"]), "tie_word_embeddings": False}
    return argparse.Namespace(
        prompts=4 if setting.small else 16,
        generations=4,
        steps=100,  # more than there are turns
        vocabulary=shape.pop("vocab_size"),
        shape=shape,
        device_options=setting.options,
    )


def world(setting: Setting):
    from worlds.on_policy import Workload

    if setting.small:
        return Workload(8, 8, 8, None)
    prompts = [prompt for prompt, _, _ in hh_lengths() if prompt <= 256]
    answers = [chosen for _, chosen, _ in hh_lengths()]
    return Workload(prompts, 256, 160, len(answers) / sum(answers))


# ---- in the process of a trainer -------------------------------------------------------------------------------------


def make(side: str, setting: Setting, folder: str):
    """The trainer of a side."""
    from rloo_vs_trl import make as make_world
    from rloo_vs_trl import ours, shared_options, theirs
    from worlds.on_policy import even_words

    args, lengths = sizes(setting), world(setting)
    with_vllm = setting.device == "cuda" and importlib.util.find_spec("vllm") is not None
    if "TRL" in side:
        options = {"use_vllm": with_vllm}
        if with_vllm:
            options |= {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": MEMORY_SHARE}
            options |= {"vllm_max_model_length": lengths.max_prompt_length + lengths.max_completion_length}
        return theirs(1, lengths, args, folder, **options)
    backend, engine = "transformers", {}
    if with_vllm:
        backend, engine = "vllm", {"kv_cache_gib": KV_CACHE_GIB}
    if side == "RLOO, ours":
        return ours(backend, lengths, args, folder, **engine)
    from align import PPOConfig, PPOTrainer, ReMaxConfig, ReMaxTrainer

    config, trainer = {"ReMax, ours": (ReMaxConfig, ReMaxTrainer), "PPO, ours": (PPOConfig, PPOTrainer)}[side]
    options = {**shared_options(folder, lengths, args), "per_device_train_batch_size": args.prompts}
    options |= {"max_prompt_length": lengths.max_prompt_length, "rollout": {"backend": backend, **engine}}
    if side == "PPO, ours":
        options["num_iterations"] = 1  # the cheapest, as in benchmarks/remax_vs_ppo.py
    tokenizer, data, model = make_world(lengths, args)
    return trainer(model, even_words, config(**options), data, processing_class=tokenizer)


def take_turns(side: str, setting: Setting, pipe: Connection) -> None:
    """Train step by step, as the other end of the pipe asks for it: "go" or "stop". The first "go" makes a trainer."""
    from transformers import TrainerCallback

    method, whose = side.lower().split(", ")
    importlib.import_module("trl.trainer.rloo_trainer" if whose == "trl" else f"align.trainers.{method}")
    pipe.recv()

    class Turns(TrainerCallback):
        start = setting.clock()

        def on_step_end(self, args, state, control, **kwargs):
            pipe.send(setting.clock() - self.start)
            control.should_training_stop = pipe.recv() == "stop"
            self.start = setting.clock()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(side, setting, folder)
        trainer.add_callback(Turns())
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
        pipe.send(
            {name: mean_of(logs, name) for name in sorted({n for entry in logs for n in entry}) if reported(name)}
        )
        if "ours" in side:
            trainer.close()


def reported(name: str) -> bool:
    return name.startswith(("time/", "rollout/")) or name in ("completions/mean_length", "padding", "loss")


def mean_of(logs: list[dict], name: str) -> float:
    values = [float(entry[name]) for entry in logs if name in entry]
    return round(sum(values) / len(values), 5)


# ---- in the process of the stage -------------------------------------------------------------------------------------


class Side:
    """A trainer's process, and what it answers."""

    def __init__(self, name: str, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, end) = name, context.Pipe()
        self.process = context.Process(target=take_turns, args=(name, setting, end), daemon=True)
        self.process.start()
        end.close()

    def ask(self, what: str):
        """What the trainer sends next. SystemExit if it ended, or says nothing for too long."""
        self.pipe.send(what)
        limit = max(0.0, min(START_SECONDS, seconds_left() - TO_REPORT))
        if not self.pipe.poll(limit):
            raise SystemExit(f"{self.name}: no step in {limit:.0f} seconds")
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: its process ended (its error is in the stage's output_tail)") from None

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def compared(setting: Setting, other: Side, ours: Side) -> dict:
    """Seconds per step of each side, and the other's over ours."""
    rounds, sides = 2 if setting.small else 6, [other, ours]
    try:
        first = {side.name: side.ask("go") for side in sides}
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(rounds):
            for side in sides[:: 1 if number % 2 else -1]:
                seconds[side.name].append(side.ask("go"))
        means = {side.name: side.ask("stop") for side in sides}
    finally:
        for side in sides:
            side.end()
    ratios = [b / a for a, b in zip(seconds[ours.name], seconds[other.name], strict=True)]
    return {
        "times_faster": {f"than {other.name}": spread(ratios)},
        "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
        "seconds_to_first_step": {name: round(value, 1) for name, value in first.items()},
        "means_of_steps": means,
    }
