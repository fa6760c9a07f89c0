"""What a front of five points costs with MODPO and with RL where prompts and answers are as long as in real data.

    OMP_NUM_THREADS=1 python benchmarks/modpo_cost.py [--pairs FILE] [--blocks 5] [--output FILE]

Time only; how good the fronts are is measured on the toy world (modpo_front.py). A random Llama, prompts and answers of
random words with the lengths of real ones (`worlds.on_policy.workload`, "data"), two objectives. Per pair or prompt, in
steps of the same number of them:

    dpo       a step of DPO with cached reference log-probs: the margin policy of MODPO, its last point
    modpo     a step of MODPO with cached margins and reference log-probs
    once      the margins of an implicit reward and the reference log-probs, once for a whole front
    reward    a step of a reward model; `padded`: with padded rows, for comparison
    remax     a step of ReMax on two such models' weighted scores, with the KL to the reference; both rollout engines

A front of MODPO is a margin policy, `once` for each pair, and four more points; one of RL is two reward models and five
points. The sides take turns; the first step of each block is left out. `front` gives MODPO's seconds over RL's, RL with
the faster engine and one prompt for every pair: in one pass over the pairs for all, and in two passes of MODPO and one
of RL.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from datasets import Dataset
from worlds.on_policy import (
    DATA,
    SHAPE,
    StepClock,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    sizes,
    spread,
    workload,
)

import align
from align.data import load_rows
from align.reward_models.margins import MarginRewards
from align.trainers.pairs.data import numbered_pairs

RESULT = Path(__file__).parent / "results" / "modpo_cost.json"
BETA = 0.1
WEIGHTS = {"main": 0.5, "margin": 0.5}


class World:
    """The models and data of all sides, in a folder."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.lengths = workload("data", args.pairs)
        self.tokenizer = make_tokenizer(args.vocabulary)
        self.policy, self.margin_policy = folder / "policy", folder / "margin_policy"
        for path in (self.policy, self.margin_policy):
            make_model(self.tokenizer, self.lengths.end, **sizes(args)).save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        count = args.items * (args.steps + 1)
        self.prompts = make_prompts(count, self.lengths.prompt_lengths, args.vocabulary)
        self.pairs = self.make_pairs(count)
        self.classifiers = [self.classifier(name) for name in WEIGHTS]

    def make_pairs(self, count: int) -> Dataset:
        """Random words; the two answers of a pair have the lengths of those of a real pair, 1 to the limit."""
        generator = torch.Generator().manual_seed(1)
        real = load_rows(self.args.pairs)
        rows = [real[i] for i in torch.randperm(len(real), generator=generator)[:count].tolist()]
        sides = {}
        for side in ("chosen", "rejected"):
            lengths = [min(max(len(row[side].split()), 1), self.lengths.max_completion_length) for row in rows]
            drawn = [torch.randint(2, self.args.vocabulary, (n,), generator=generator).tolist() for n in lengths]
            sides[side] = [" ".join(f"w{i}" for i in answer) for answer in drawn]
        return Dataset.from_dict({"prompt": self.prompts["prompt"], **sides})

    def options(self, name: str, steps: int, **other) -> dict:
        return {
            "output_dir": str(self.folder / name), "max_steps": steps, "learning_rate": 1e-5,
            "per_device_train_batch_size": self.args.items, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, **other,
        }  # fmt: skip

    def classifier(self, name: str) -> str:
        self.train("reward", name, 1)
        return str(self.folder / name)

    def trainer(self, side: str, name: str, steps: int):
        policy = str(self.policy)
        if side.startswith("reward"):
            batching = "padded" if "padded" in side else "shared_prefix"
            args = align.RewardConfig(**self.options(name, steps, batching=batching))
            return align.RewardTrainer(policy, args, self.pairs)
        if side == "dpo":
            args = align.DPOConfig(**self.options(name, steps, beta=BETA, precompute_ref_log_probs=True))
            return align.DPOTrainer(policy, args, self.pairs)
        if side == "modpo":
            options = self.options(name, steps, beta=BETA, precompute_ref_log_probs=True)
            args = align.MODPOConfig(**options, objective="main", weights=WEIGHTS)
            return align.MODPOTrainer(policy, self.implicit(), args, self.pairs)
        options = self.options(name, steps, beta=BETA, reward_weights=list(WEIGHTS.values()))
        args = align.ReMaxConfig(
            **options,
            rollout=side.split()[1],
            max_prompt_length=self.lengths.max_prompt_length,
            max_completion_length=self.lengths.max_completion_length,
        )
        rewards = [
            {"type": "classifier", "path": path, "name": n} for n, path in zip(WEIGHTS, self.classifiers, strict=True)
        ]
        return align.ReMaxTrainer(policy, rewards, args, self.prompts)

    def implicit(self) -> dict:
        paths = {"path": str(self.margin_policy), "reference": str(self.policy)}
        return {"type": "implicit", **paths, "beta": BETA, "name": "margin"}

    def train(self, side: str, name: str, steps: int) -> dict[str, float]:
        """Seconds per item of all steps but the first."""
        trainer, clock = self.trainer(side, name, steps), StepClock()
        trainer.add_callback(clock)
        trainer.train()
        if side == "reward":
            trainer.save_model()
        if side.startswith("remax"):
            trainer.close()
        items = self.args.items * max(len(clock.seconds), 1)
        return {"clock": sum(clock.seconds) / items, "processor": sum(clock.processor_seconds) / items}

    def once(self, number: int) -> dict[str, float]:
        """Seconds per pair of what a front computes once."""
        pairs = numbered_pairs(self.pairs, self.tokenizer, max_length=None, max_bad_share=0.0)
        margins = MarginRewards(self.implicit(), self.tokenizer, self.folder / f"margins_{number}")
        started = time.perf_counter(), time.process_time()
        margins.add_to(pairs)
        options = self.options(f"once_{number}", 1, beta=BETA, precompute_ref_log_probs=True)
        align.DPOTrainer(str(self.policy), align.DPOConfig(**options), self.pairs)  # computes them when it is made
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        return dict(zip(("clock", "processor"), (s / len(self.pairs) for s in seconds), strict=True))


def measure(world: World, blocks: int) -> list[dict]:
    sides = ["dpo", "modpo", "once", "reward", "reward padded", "remax vllm", "remax transformers"]
    found = []
    for number in range(blocks):
        first = number % len(sides)
        block = {}
        for side in sides[first:] + sides[:first]:
            name = f"{side}_{number}".replace(" ", "_")
            block[side] = world.once(number) if side == "once" else world.train(side, name, world.args.steps + 1)
        found.append(block)
        print({side: round(1000 * block[side]["processor"], 1) for side in sides}, "ms per item", flush=True)
    return found


def ratio(block: dict, clock: str, passes: int) -> float:
    """A front of MODPO over one of RL in one pass."""
    cost = {side: seconds[clock] for side, seconds in block.items()}
    remax = min(cost["remax vllm"], cost["remax transformers"])
    return (cost["once"] + passes * (cost["dpo"] + 4 * cost["modpo"])) / (2 * cost["reward"] + 5 * remax)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=DATA, help="pairs whose lengths the random ones have")
    parser.add_argument("--blocks", type=int, default=5, help="at least 2")
    parser.add_argument("--items", type=int, default=32, help="pairs or prompts per step")
    parser.add_argument("--steps", type=int, default=3, help="measured per block")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), args)
        parameters = sum(p.numel() for p in make_model(world.tokenizer, **sizes(args)).parameters())
        found = measure(world, args.blocks)
    report = {
        "front": {
            f"{clock}, {'one pass' if passes == 1 else 'two passes of MODPO'}": spread(
                [ratio(block, clock, passes) for block in found]
            )
            for clock in ("processor", "clock")
            for passes in (1, 2)
        },
        "milliseconds_per_item": {
            side: {clock: spread([1000 * block[side][clock] for block in found]) for clock in ("processor", "clock")}
            for side in found[0]
        },
    }
    save(report, args, {"all": {"parameters": parameters}}, args.output)


if __name__ == "__main__":
    main()
