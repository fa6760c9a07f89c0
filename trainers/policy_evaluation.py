"""Evaluation of a policy: what it earns from the proxy and the gold reward, and how far it is from the reference."""

import logging
from dataclasses import fields
from enum import Enum

import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from align.modeling.logprobs import token_logps
from align.objectives.kl import k1, k3, masked_sum
from align.rollout.seeds import derive_seed
from align.rollout.types import SamplingParams
from trainers.rollouts import Sample, collate, make_samples, split

logger = logging.getLogger(__name__)


TRAINING = ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size")


def run_options(args) -> dict:
    """The options that say what was run: all of ours, and the few of transformers' that decide how far it went."""
    ours = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    options = {name: getattr(args, name) for name in sorted(ours | {*TRAINING, "gradient_accumulation_steps"})}
    return {name: str(value) if isinstance(value, Enum) else value for name, value in options.items()}


class PolicyEvaluation:
    """The `evaluate` of on-policy trainers. Writes `overoptimization.jsonl` in the output folder."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Sample from the policy at the training temperature on the evaluation prompts, score, and log the means.

        The requests are seeded by prompt and sample only, so evaluations do not move the training run's randomness and
        two steps are compared on the same draws.
        """
        self.sync_engine()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        world, rank = self.args.world_size, self.args.process_index
        indices = list(range(rank, len(dataset), world))
        with self.phase("evaluate"):
            rows = self.evaluate_prompts([dataset[i] for i in indices], indices)
        rows = sorted((row for part in gather_object([rows]) for row in part), key=lambda row: row["index"])
        metrics = {
            f"{metric_key_prefix}_{name}": sum(row[name] for row in rows) / len(rows)
            for name in ("kl", "kl_k3", "proxy", "gold", "length")
            if rows[0][name] is not None
        }
        if self.is_world_process_zero():
            self.write_evaluation(rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        gold = self.gold.totals(samples) if self.gold is not None else None
        kl, kl_k3 = self.kl_of(samples)
        rows = []
        for i, index in enumerate(indices):
            own = range(i * count, (i + 1) * count)
            mean = lambda values, own=own: sum(values[j] for j in own) / count  # noqa: E731
            rows.append(
                {
                    "index": index,
                    "kl": mean(kl),
                    "kl_k3": mean(kl_k3),
                    "proxy": mean([sample.score for sample in samples]),
                    "gold": mean(gold) if gold is not None else None,
                    "length": mean([sample.length for sample in samples]),
                    "prompt": prompts[i]["prompt"],
                    "completion": samples[own[0]].completion,
                    "completion_proxy": samples[own[0]].score,
                    "completion_gold": gold[own[0]] if gold is not None else None,
                }
            )
        return rows

    @torch.no_grad()
    def kl_of(self, samples: list[Sample]) -> tuple[list[float], list[float]]:
        """k1 and k3 per sequence, nats, in the order of the samples."""
        model = self.model
        was_training = model.training
        model.eval()
        size = self.args.per_device_eval_batch_size
        order = {id(sample): i for i, sample in enumerate(samples)}
        first, third = [0.0] * len(samples), [0.0] * len(samples)
        for part in split(samples, max(1, len(samples) // size)):
            self.fill_reference(part)
            batch = self._prepare_inputs(collate(part, self.pad_token_id))
            logps = token_logps(
                model, batch["input_ids"], batch["attention_mask"], temperature=self.args.temperature
            )
            mask = batch["completion_mask"]
            for values, estimator in ((first, k1), (third, k3)):
                sums = masked_sum(estimator(logps, batch["ref_logps"]), mask, dim=-1).tolist()
                for sample, value in zip(part, sums, strict=True):
                    values[order[id(sample)]] = value
        model.train(was_training)
        return first, third

    def write_evaluation(self, rows: list[dict]) -> None:
        from align.evaluation.records import EvalWriter

        args = self.args
        if self.eval_writer is None:
            self.eval_writer = EvalWriter(
                args.output_dir,
                name=args.run_name or args.output_dir.rstrip("/").split("/")[-1],
                method=type(self).__name__.removesuffix("Trainer").lower(),
                proxy=self.rewards.name,
                gold=self.gold.name if self.gold is not None else None,
                seed=args.seed,
                config=run_options(args),
                resume_step=self.state.global_step - 1 if self.resume_state else None,
            )
        samples = [
            {
                "prompt": row["prompt"],
                "completion": row["completion"],
                "proxy": row["completion_proxy"],
                "gold": row["completion_gold"],
            }
            for row in rows[: args.num_logged_completions]
        ]
        has_gold = rows[0]["gold"] is not None
        self.eval_writer.write(
            self.state.global_step,
            kl=[row["kl"] for row in rows],
            kl_k3=[row["kl_k3"] for row in rows],
            proxy=[row["proxy"] for row in rows],
            gold=[row["gold"] for row in rows] if has_gold else None,
            length=[row["length"] for row in rows],
            samples=samples,
        )
        self.log_table(
            "completions",
            ["step", "prompt", "completion", "proxy", "gold"],
            [
                [self.state.global_step, str(s["prompt"]), str(s["completion"]), s["proxy"], s["gold"]]
                for s in samples
            ],
        )
