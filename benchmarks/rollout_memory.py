"""Peak memory of an on-policy step (GRPO) against samples per prompt and their length, with a token budget and without.

    OMP_NUM_THREADS=1 python benchmarks/rollout_memory.py [--lengths 512 2048] [--generations 2 8] [--output FILE]

A step has one prompt of 64 tokens, of which the policy, a randomly drawn Llama that never ends an answer itself, draws
`generations` completions of the given length. `budget`: `tokens_per_batch` is the longest sequence, so that a
micro-batch holds one of them; `whole`: a prompt's completions are in one micro-batch, the library's default. The loss
of both is the same, which is checked.

Each case is a process of its own. Its figure is that of the second step, which has gradients and optimiser states from
the first: the kernel's high-water mark of the resident set from when the completions are drawn (that is when the reward
is asked) to the end of the step, over what was resident then. So weights, states and the engine are not in it, and the
passes of reference and policy are. Freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_), for else what
generation has freed would be used again unseen.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.memory import resident
from transformers import TrainerCallback
from worlds.on_policy import SHAPE, end_after_some_words, even_words, make_model, make_prompts, make_tokenizer, save

RESULT = Path(__file__).parent / "results" / "rollout_memory.json"
PROMPT, VOCABULARY, STEPS = 64, 4096, 2


class Watch(TrainerCallback):
    """Bytes at most, in a step, over what is resident when its completions have been drawn."""

    def __init__(self):
        self.before, self.peak = 0, 0

    def reward(self, completions, **columns) -> list[float]:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = resident("VmRSS")
        return even_words(completions)

    def on_step_end(self, args, state, control, **kwargs):
        self.peak = resident("VmHWM") - self.before


def one(generations: int, length: int, budget: int | None) -> dict:
    from align import GRPOConfig, GRPOTrainer

    tokenizer, watch = make_tokenizer(VOCABULARY), Watch()
    model = make_model(tokenizer, max_position_embeddings=PROMPT + length)
    end_after_some_words(model, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            num_generations=generations, max_prompt_length=PROMPT, max_completion_length=length,
            tokens_per_batch=budget, forward_tokens_per_batch=budget, rollout={"backend": "transformers"},
            use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-5, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        )  # fmt: skip
        data = make_prompts(8, PROMPT, VOCABULARY)
        trainer = GRPOTrainer(model, watch.reward, config, data, processing_class=tokenizer, callbacks=[watch])
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        trainer.close()
    assert all(entry["completions/mean_length"] == length for entry in logs)
    return {"peak_mib": round(watch.peak / 2**20, 1), "losses": [entry["loss"] for entry in logs]}


def in_a_process(case: tuple[int, int, int | None]) -> dict:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="tokens of a completion")
    parser.add_argument("--generations", nargs="+", type=int, default=[2, 8], help="samples per prompt")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # in the process of a case
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one(*args.case)))
        return
    report, budget = {}, PROMPT + max(args.lengths)
    for length in args.lengths:
        for generations in args.generations:
            sides = {
                "budget": in_a_process((generations, length, budget)),
                "whole": in_a_process((generations, length, None)),
            }
            for a, b in zip(*(side["losses"] for side in sides.values()), strict=True):
                if abs(a - b) > 1e-4 * max(1.0, abs(b)):
                    raise SystemExit(f"{generations} x {length}: the losses are {a} and {b}")
            report[f"{generations} x {length}"] = {name: side["peak_mib"] for name, side in sides.items()}
            print(f"{generations} x {length}", report[f"{generations} x {length}"], flush=True)
    report = {"peak_mib": report, "tokens_per_batch": budget}
    save(report, args, {"policy": {**SHAPE, "vocab_size": VOCABULARY}}, args.output)


if __name__ == "__main__":
    main()
