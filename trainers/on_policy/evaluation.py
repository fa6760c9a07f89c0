"""Evaluation of a policy: what it earns from the proxy and the gold reward, and how far it is from the reference."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from align.config.sections import plain
from align.data.sets import of_each
from align.data.streams import is_stream, read_whole
from align.distributed.ranks import by_first
from align.errors import ConfigError, RewardError
from align.evaluation.records import EvalWriter
from align.modeling.load import Reference
from align.reward_models.base import joined
from align.rollout.seeds import derive_seed
from align.rollout.types import SamplingParams
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.early_scores import EarlyScores, early_scores, expecting
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.forward import ForwardPasses
from align.trainers.on_policy.pipeline import CompletionSource, complete
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample, as_text, make_samples
from align.trainers.on_policy.stopping import disagreement_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TRAINING = ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size")
METRICS = ("kl", "kl_k3", "entropy", "proxy", "gold", "length")


def run_options(args: Any) -> dict[str, Any]:
    """The options that say what was run: all of ours, and the few of transformers' that decide how far it went. As JSON
    has them: `model_init_kwargs` may hold anything, such as a torch.dtype."""
    ours = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    options = {name: getattr(args, name) for name in sorted(ours | {*TRAINING, "gradient_accumulation_steps"})}
    values = {name: str(value) if isinstance(value, Enum) else plain(value) for name, value in options.items()}
    return json.loads(json.dumps(values, default=str))


def eval_prompts(dataset: Dataset, tokenize: Callable, most: int | None) -> Dataset:
    """The first `most` prompts, tokenised; of several sets by name, the first of each; None of None."""

    def first(rows):
        rows = tokenize(whole(rows, most))
        return rows.select(range(min(most or len(rows), len(rows))))

    return of_each(dataset, first)


def whole(rows: Any, most: int | None) -> Any:
    """A stream's first `most` rows (None: all), which every evaluation goes through; a dataset as it is."""
    return read_whole(rows if most is None else rows.take(most)) if is_stream(rows) else rows


def sets_of(own, given) -> dict[str, Any] | None:
    """What `evaluate` has to call itself with, by name, where it was asked for several sets; None for one set. own: the
    trainer's eval_dataset; given: what was passed instead."""
    if given is None:
        return {name: name for name in own} if isinstance(own, dict) else None
    return given if isinstance(given, dict) else None


def one_set(own, given, tokenize: Callable) -> tuple[Any, bool]:
    """The prompts that one evaluation is on, and whether it is the run's own (of several sets: the first). given: None,
    the name of one of the trainer's sets, or prompts."""
    if isinstance(given, str):
        return own[given], given == next(iter(own))
    dataset = own if given is None else tokenize(whole(given, None))
    if dataset is None:
        raise ConfigError("there is nothing to evaluate on: pass eval_dataset")
    return dataset, given is None


class PolicyEvaluator:
    """Samples from a policy on prompts, at the training temperature, and measures the completions.

    Args:
        engine: holds the policy's weights.
        gold: scored beside the rewards, None without.
        forward: passes of policy and reference.
        episodes: where completions are conversations of several turns.
    """

    def __init__(
        self,
        args: OnPolicyConfig,
        engine: CompletionSource,
        tokenizer,
        rewards: RewardColumns,
        gold: RewardColumns | None,
        forward: ForwardPasses,
        ranks: Ranks,
        episodes: Episodes | None = None,
    ):
        self.episodes = episodes
        self.args, self.engine, self.tokenizer, self.ranks = args, engine, tokenizer, ranks
        self.rewards, self.gold, self.forward = rewards, gold, forward
        self.ensembles = disagreement_columns(rewards.rewards)
        self.logged: dict[str, float] = {}  # by the rewards' functions in the newest evaluation (TRL's `log_metric`)
        self.warned = False  # of a name that is taken

    @property
    def measured(self) -> list[str]:
        """What there is of every prompt: `METRICS`, gold only where there is one, every reward, and of every ensemble
        the standard deviation of its members' scores."""
        return [
            *(name for name in METRICS if name != "gold" or self.gold is not None),
            *(f"rewards/{name}" for name in self.rewards.names),
            *(f"disagreement/{name}" for name in self.ensembles),
        ]

    def evaluate(self, prompts, model: nn.Module, reference: Reference) -> list[dict]:
        """One row per prompt, the same on all processes: `measured`, means over its samples, and a `sample`.

        The requests are seeded by prompt and sample only, so evaluations do not move the training run's randomness and
        two steps are compared on the same draws.
        """
        # Every process gets the same number, repeating some prompts: sharded models (FSDP2, ZeRO-3) run in step.
        ranks, share = self.ranks, -(-len(prompts) // self.ranks.count)
        indices = [(i * ranks.count + ranks.index) % len(prompts) for i in range(share)]
        parts = gather_object([self._rows([prompts[i] for i in indices], indices, model, reference)])
        self.logged = self._without_taken({n: sum(v) / len(v) for n, v in joined(given for _, given in parts).items()})
        by_index = {row["index"]: row for rows, _ in parts for row in rows}
        return with_means([by_index[i] for i in range(len(prompts))], self.measured)

    def _without_taken(self, given: dict[str, float]) -> dict[str, float]:
        """Without the names that evaluations have themselves; others than these may be taken while training."""
        taken = sorted(given.keys() & {*self.measured, "loss"})
        if taken and not self.warned:
            self.warned = True
            logger.warning(
                "log_metric(%r, ...): an evaluation logs a number of its own by this name, and not the reward's: take "
                "another",
                taken[0],
            )
        return {name: value for name, value in given.items() if name not in taken}

    def _rows(
        self, prompts: list[dict], indices: list[int], model, reference
    ) -> tuple[list[dict], dict[str, list[float]]]:
        """Of this process's prompts; and what the rewards' functions logged."""
        count = self.args.eval_num_generations
        asked = [prompt for prompt in prompts for _ in range(count)]
        with self._early(self.rewards, len(asked)) as early, self._early(self.gold, len(asked)) as early_gold:
            samples = self._sample(asked, indices, [scores for scores in (early, early_gold) if scores is not None])
            # before the rewards: a sample that they have no score for has a KL and an entropy all the same
            columns: dict[str, Sequence[float | None]] = {**self._kl_and_entropy(samples, model, reference)}
            _, given = self.rewards.fill(samples, early)
            columns["proxy"] = [None if sample.left_out else sample.score for sample in samples]
            if self.gold is not None:
                columns["gold"] = self.gold.totals(samples, early_gold)
        columns["length"] = [sample.written for sample in samples]
        columns |= {f"rewards/{name}": [sample.rewards.get(name) for sample in samples] for name in self.rewards.names}
        for name, key in self.ensembles.items():
            variances = [sample.extras.get(key) for sample in samples]
            columns[f"disagreement/{name}"] = [None if v is None else math.sqrt(v) for v in variances]
        rows = []
        for i, index in enumerate(indices):
            own = slice(i * count, (i + 1) * count)
            first = {
                "prompt": prompts[i]["prompt"],
                "completion": samples[i * count].completion,
                "proxy": columns["proxy"][i * count],
                "gold": None if self.gold is None else columns["gold"][i * count],
                "shown": samples[i * count].shown,
            }
            means = {name: mean_of(column[own]) for name, column in columns.items()}
            rows.append({"index": index, **means, "sample": first})
        return rows, given

    def _early(self, rewards: RewardColumns | None, count: int) -> AbstractContextManager[EarlyScores | None]:
        """What scores so many completions while others are drawn."""
        if rewards is None:
            return nullcontext()
        places = [range(i, i + 1) for i in range(count)]
        return early_scores(self.engine, rewards, self.tokenizer, places, turns=self.episodes is not None)

    def _sample(self, asked: list[dict], indices: list[int], early: list[EarlyScores]) -> list[Sample]:
        """One sample of each prompt of `asked`, in which those of `indices` stand several times, side by side."""
        each = [(index, j) for index in indices for j in range(self.args.eval_num_generations)]
        params = [
            SamplingParams(**self.args.drawing, seed=derive_seed(self.args.seed, "evaluate", index, j))
            for index, j in each
        ]
        if self.episodes is None:
            rollouts = complete(self.engine, asked, params, expecting(early))
        else:
            seeds = [derive_seed(self.args.seed, "evaluate environment", index, j) for index, j in each]
            rollouts = self.episodes.complete(self.engine, asked, params, seeds, expecting(early))
        return [
            make_samples(self.tokenizer, prompt, rollout.completions, rollout.weight_version)[0]
            for prompt, rollout in zip(asked, rollouts, strict=True)
        ]

    def _kl_and_entropy(self, samples: list[Sample], model, reference) -> dict[str, list[float]]:
        size = self.args.per_device_eval_batch_size
        parts = self.forward.planner.plan_evaluation(samples, size)
        found = self.forward.kl_and_entropy(parts, model, reference)
        rows = [found[id(sample)] for sample in samples]
        return {name: [row[i] for row in rows] for i, name in enumerate(("kl", "kl_k3", "entropy"))}


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those that there are; None without any."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def with_means(rows: list[dict], measured: list[str]) -> list[dict]:
    """A prompt without a score (its reward failed or does not apply) gets the mean of the others, which leaves the
    evaluation's mean what it is. Raises `RewardError` if there is no score at all, unless it is of one reward of
    several: that one is 0."""
    for name in measured:
        mean = mean_of([row[name] for row in rows])
        if mean is None and name in ("proxy", "gold"):
            raise RewardError(f"the evaluation has no {name} score: the rewards failed or apply to no prompt of it")
        for row in rows:
            row[name] = (mean or 0.0) if row[name] is None else row[name]
    return rows


class EvaluationFile:
    """The evaluations of a run, `overoptimization.jsonl` in its output folder. Main process only.

    Args:
        method: its name. proxy, gold: names of the rewards, gold None without.
    """

    def __init__(self, args: OnPolicyConfig, *, method: str, proxy: str, gold: str | None):
        self.args, self.method, self.proxy, self.gold = args, method, proxy, gold
        self.writer: EvalWriter | None = None

    @property
    def last_step(self) -> int | None:
        """The step of the newest evaluation in it."""
        return None if self.writer is None else self.writer.last_step

    def open(self, resume_step: int | None, evaluated: int | None) -> None:
        """Start the file of a run, or continue it after this step. evaluated: as of `EvalWriter`."""
        args = self.args
        self.writer = EvalWriter(
            args.output_dir,
            name=args.run_name or Path(args.output_dir).name,
            method=self.method,
            proxy=self.proxy,
            gold=self.gold,
            seed=args.seed,
            config=run_options(args),
            resume_step=resume_step,
            evaluated=evaluated,
        )

    def close(self) -> None:
        """Later evaluations are not part of this run."""
        self.writer = None

    def write(self, step: int, rows: list[dict], measured: list[str]) -> tuple[list[str], list[list]]:
        """Add an evaluation; returns columns and rows of a table that shows its completions. Writes nothing before the
        file is open (a file in this folder is another run's), and no step twice (its draws would be the same)."""
        if self.writer is None or (self.last_step is not None and step <= self.last_step):
            return [], []
        samples = [row["sample"] for row in rows[: self.args.num_logged_completions]]
        self.writer.write(step, samples=samples, **{name: [row[name] for row in rows] for name in measured})
        named = sorted({name for sample in samples for name in sample["shown"]})
        table = [
            [step, as_text(s["prompt"]), as_text(s["completion"]), s["proxy"], s["gold"]]
            + [s["shown"].get(name, "") for name in named]
            for s in samples
        ]
        return ["step", "prompt", "completion", "proxy", "gold", *named], table


class Curve(TrainerCallback):
    """Opens the evaluation file when training begins (so that errors of the file come before the first steps),
    and at the end shows its curve, proxy and gold score against KL, to the trackers.

    resumed: returns the step that a run resumes from and that of its newest evaluation then, None for a new run.
    log_figure: sends a figure.
    """

    def __init__(
        self,
        file: EvaluationFile,
        resumed: Callable[[], tuple[int | None, int | None]],
        log_figure: Callable[[str, "Figure"], None],
    ):
        self.file, self.resumed, self.log_figure = file, resumed, log_figure

    def on_train_begin(self, args, state, control, **kwargs):
        by_first(lambda: self.file.open(*self.resumed()))

    def on_train_end(self, args, state, control, **kwargs):
        writer = self.file.writer
        if writer is None or writer.last_step is None or not {"wandb", "tensorboard"} & set(args.report_to):
            return
        from align.evaluation.plots import plot_proxy_and_gold
        from align.evaluation.records import read_run
        from align.evaluation.summary import build_summary

        run = read_run(writer.path)
        if len(run) > 1:
            entries = build_summary(runs={run.name: run})["runs"]
            self.log_figure("overoptimization", plot_proxy_and_gold(entries, "runs"))
