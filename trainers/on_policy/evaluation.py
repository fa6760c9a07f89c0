"""Evaluation of a policy: what it earns from the proxy and the gold reward, and how far it is from the reference."""

import logging
from dataclasses import fields
from enum import Enum
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments

from align.errors import ConfigError
from align.objectives.kl import k1, k3, masked_sum
from align.rollout.seeds import derive_seed
from align.rollout.types import SamplingParams
from align.trainers.on_policy.batches import split
from align.trainers.on_policy.rollouts import Sample, as_text, make_samples, tokenized_prompts

logger = logging.getLogger(__name__)

TRAINING = ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size")
METRICS = ("kl", "kl_k3", "entropy", "proxy", "gold", "length")


def run_options(args) -> dict:
    """The options that say what was run: all of ours, and the few of transformers' that decide how far it went."""
    ours = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    options = {name: getattr(args, name) for name in sorted(ours | {*TRAINING, "gradient_accumulation_steps"})}
    return {name: str(value) if isinstance(value, Enum) else value for name, value in options.items()}


def eval_prompts(dataset, tokenizer, args):
    """The first `num_eval_prompts` prompts, tokenised."""
    dataset = tokenized_prompts(dataset, tokenizer, args)
    count = len(dataset) if args.num_eval_prompts is None else min(args.num_eval_prompts, len(dataset))
    return dataset.select(range(count))


class PolicyEvaluation:
    """The `evaluate` of on-policy trainers. Writes `overoptimization.jsonl` in the output folder."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Sample from the policy at the training temperature on the evaluation prompts, score, and log the means.

        The requests are seeded by prompt and sample only, so evaluations do not move the training run's randomness and
        two steps are compared on the same draws. The evaluation file takes what training and, after it, calls without
        `eval_dataset` (raw or tokenised prompts, all of which are used) evaluate, once per step.
        """
        dataset = self.eval_dataset
        if eval_dataset is not None:
            dataset = tokenized_prompts(eval_dataset, self.processing_class, self.args)
        if dataset is None:
            raise ConfigError("there is nothing to evaluate on: pass eval_dataset")
        self.sync_engine()
        world, rank = self.args.world_size, self.args.process_index
        # Every process gets as many, some of them twice: sharded models (FSDP2, ZeRO-3) must run in step.
        indices = [(i * world + rank) % len(dataset) for i in range(-(-len(dataset) // world))]
        with self.phase("evaluate"):
            rows = self.evaluate_prompts([dataset[i] for i in indices], indices)
        by_index = {row["index"]: row for part in gather_object([rows]) for row in part}
        rows = [by_index[i] for i in range(len(dataset))]
        metrics = {
            f"{metric_key_prefix}_{name}": sum(row[name] for row in rows) / len(rows) for name in self.measured(rows)
        }
        if eval_dataset is None and self.is_in_train:
            scores = {name: [row[f"rewards/{name}"] for row in rows] for name in self.rewards.names}
            learned = self.weighting.observe(scores)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in learned.items()}
        self.log(metrics)
        if self.is_world_process_zero() and eval_dataset is None:
            self.write_evaluation(rows)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, rows: list[dict]) -> list[str]:
        """What the evaluation of a prompt holds: `METRICS`, gold only where there is one, and every reward."""
        return [*(n for n in METRICS if rows[0][n] is not None), *(f"rewards/{name}" for name in self.rewards.names)]

    def evaluate_prompts(self, prompts: list[dict], indices: list[int]) -> list[dict]:
        """One row per prompt: means over its samples, and its first completion."""
        count = self.args.eval_num_generations
        params = [
            SamplingParams(
                max_tokens=self.args.max_completion_length,
                temperature=self.args.temperature,
                seed=derive_seed(self.args.seed, "evaluate", index, j),
            )
            for index in indices
            for j in range(count)
        ]
        rollouts = self.engine.generate([prompt["prompt_ids"] for prompt in prompts for _ in range(count)], params)
        samples = [
            make_samples(self.processing_class, prompts[i // count], rollout.completions, rollout.weight_version)[0]
            for i, rollout in enumerate(rollouts)
        ]
        self.rewards.fill(samples)
        columns = self.kl_and_entropy(samples)
        columns["proxy"] = [sample.score for sample in samples]
        columns["gold"] = self.gold.totals(samples) if self.gold is not None else None
        columns["length"] = [sample.length for sample in samples]
        columns |= {f"rewards/{name}": [sample.rewards[name] for sample in samples] for name in self.rewards.names}
        rows = []
        for i, index in enumerate(indices):
            own = slice(i * count, (i + 1) * count)
            means = {name: None if column is None else sum(column[own]) / count for name, column in columns.items()}
            first = {
                "prompt": prompts[i]["prompt"],
                "completion": samples[i * count].completion,
                "proxy": samples[i * count].score,
                "gold": None if self.gold is None else columns["gold"][i * count],
            }
            rows.append({"index": index, **means, "sample": first})
        return rows

    @torch.no_grad()
    def kl_and_entropy(self, samples: list[Sample]) -> dict[str, list[float]]:
        """k1 and k3 per sequence (`kl`, `kl_k3`) and the mean entropy of its tokens, nats, in the order of the
        samples."""
        model = self.model  # not the DDP wrapper, whose buffers would be broadcast; with FSDP2 this is the sharded one
        was_training = model.training
        model.eval()
        found = {}
        size = self.args.per_device_eval_batch_size
        for part in split(samples, -(-len(samples) // size)):
            self.fill_reference(part)
            batch = self._prepare_inputs(self.collate(part))
            logps, entropy = self.policy_logps(model, batch)
            mask = batch["completion_mask"]
            sums = [masked_sum(e(logps, batch["ref_logps"]), mask, dim=-1) for e in (k1, k3)]
            values = torch.stack([*sums, masked_sum(entropy, mask, dim=-1) / mask.sum(-1)], dim=-1)
            found |= {id(sample): row for sample, row in zip(part, values.tolist(), strict=True)}
        model.train(was_training)
        columns = zip(*(found[id(sample)] for sample in samples), strict=True)
        return dict(zip(("kl", "kl_k3", "entropy"), columns, strict=True))

    def open_evaluation_file(self) -> None:
        from align.evaluation.records import EvalWriter

        args = self.args
        self.eval_writer = EvalWriter(
            args.output_dir,
            name=args.run_name or Path(args.output_dir).name,
            method=type(self).__name__.removesuffix("Trainer").lower(),
            proxy=self.rewards.name,
            gold=self.gold.name if self.gold is not None else None,
            seed=args.seed,
            config=run_options(args),
            resume_step=self.resume_step,
        )

    def write_evaluation(self, rows: list[dict]) -> None:
        step = self.state.global_step
        if self.eval_writer is None:
            return  # before training: a file in this folder is another run's
        if self.eval_writer.last_step is not None and step <= self.eval_writer.last_step:
            return  # this step is there already, from the same draws
        samples = [row["sample"] for row in rows[: self.args.num_logged_completions]]
        columns = {name: [row[name] for row in rows] for name in self.measured(rows)}
        self.eval_writer.write(step, samples=samples, **columns)
        if samples:
            table = [[step, as_text(s["prompt"]), as_text(s["completion"]), s["proxy"], s["gold"]] for s in samples]
            self.log_table("completions", ["step", "prompt", "completion", "proxy", "gold"], table)


class Curve(TrainerCallback):
    """Opens the evaluation file when training begins (what is wrong with it is said then, not after the first steps),
    and at the end sends its curve, proxy and gold score against KL, to the trackers."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.trainer.eval_dataset is not None:
            self.trainer.open_evaluation_file()

    def on_train_end(self, args, state, control, **kwargs):
        writer = self.trainer.eval_writer
        if writer is None or writer.last_step is None or not {"wandb", "tensorboard"} & set(args.report_to):
            return
        from align.evaluation.plots import plot_proxy_and_gold
        from align.evaluation.records import read_run
        from align.evaluation.summary import build_summary

        run = read_run(writer.path)
        if len(run) > 1:
            entries = build_summary(runs={run.name: run})["runs"]
            self.trainer.log_figure("overoptimization", plot_proxy_and_gold(entries, "runs"))
