"""Whole fronts: one policy per weight vector, each in its own folder, and soups between neighbours.

What does not depend on the weights (tokens, margin rewards, reference log-probs) is computed once. A sweep that was
stopped resumes where it was: finished points are kept.
"""

import copy
import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.data.sets import of_each
from align.distributed.ranks import by_first
from align.errors import ConfigError
from align.evaluation.front import Front, Point, write_front
from align.modeling.adapters import is_adapter, named_base
from align.modeling.load import load_policy, load_tokenizer, source_of
from align.modeling.logprobs import language_model
from align.modeling.soups import make_soup
from align.modeling.weights_digest import named_digest
from align.reward_models.base import Reward
from align.reward_models.implicit import ImplicitReward
from align.reward_models.margins import MarginRewards, rows_fingerprint
from align.trainers.modpo import SWEEP, MODPOConfig, MODPOTrainer, WeightOptions
from align.trainers.pairs.data import numbered_pairs
from align.trainers.sweeps.kept import described, finished, result_settings, start_identity, write_record

logger = logging.getLogger(__name__)

POINT_FILE = "point.json"
SWEEP_OPTIONS = ("sweep_points", "sweep_min_weight", "interpolate")
Model = str | Path | Callable[[], nn.Module]


NO_LAST_POLICY = (
    "sweep_min_weight 0: no pair trains the policy of that weight. It is there already where the one margin reward is "
    "`implicit` and its policy in a folder, trained from {start} with beta {beta} and saved as the sweep's are "
    "(adapter or whole model); here it must be above 0"
)


def train_front(
    model: Model,
    reward: Any,
    args: MODPOConfig,
    train_dataset,
    eval_dataset=None,
    processing_class=None,
    *,
    peft_config=None,
    callbacks=None,
    resume: bool = False,
    model_name: str | None = None,
    model_options: dict[str, Any] | None = None,
) -> Path:
    """Train MODPO for every weight vector of a sweep; returns `args.output_dir`, which holds front.json.

    Args:
        model: a folder or hub name, or a function that loads the policy: every point starts from it anew.
        reward, peft_config, callbacks: as `MODPOTrainer` takes them.
        resume: keep the finished points, and resume the one that was stopped.
        model_name, model_options: of the policy that a function loads, and what it loads it with: points that started
            from another one are not kept.
    """
    processing_class = check_model(model, processing_class)
    check_sweep(args)
    margins = MarginRewards(reward, processing_class, args.margin_folder)
    objectives = [args.objective, *margins.names]
    start = model_name if callable(model) else str(model)
    assert margins.rewards is not None  # not freed yet
    vectors, last = points_to_train(objectives, margins.rewards, start, args, peft_config)
    tokenized = partial(numbered_pairs, tokenizer=processing_class, num_proc=args.dataset_num_proc)
    tokenized = partial(tokenized, max_length=args.max_length, max_bad_share=args.max_bad_share)
    train_dataset = tokenized(train_dataset)
    eval_dataset = of_each(eval_dataset, tokenized)
    started = time.perf_counter()
    margins.add_to(train_dataset)  # kept on disk, where every point finds them
    of_each(eval_dataset, margins.add_to)
    seconds = {"margin rewards": time.perf_counter() - started}

    def trainer(point_args: MODPOConfig) -> MODPOTrainer:
        return MODPOTrainer(
            loaded(model),
            margins,
            point_args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config=lora(peft_config),
            callbacks=callbacks,
        )

    identity = {
        **start_identity(start),
        "model_options": model_options,
        "data": rows_fingerprint(train_dataset),
        "margins": margins.fingerprints,
    }
    return train_points(
        "modpo", trainer, args, objectives, vectors, identity, peft_config, seconds=seconds, resume=resume, last=last
    )


def points_to_train(
    objectives: list[str], rewards: list[Reward], start: str | None, args: MODPOConfig, peft_config: Any
) -> tuple[list[dict[str, float]], Path | None]:
    """The weight vectors of a sweep, and the policy of the last one, where it need not be trained."""
    reference = args.ref_model_name_or_path or start
    last = margin_policy(rewards, reference, args, peft_config)
    vectors = sweep_weights(objectives, args, 0.1 if last is None else 0.0)
    if vectors[-1][args.objective] > 0:
        return vectors, None
    if last is None:
        raise ConfigError(NO_LAST_POLICY.format(start=reference, beta=args.beta))
    return vectors, last


def train_points(
    method: str,
    make_trainer: Callable[[Any], Any],
    args: WeightOptions,
    objectives: list[str],
    vectors: list[dict[str, float]],
    identity: dict[str, Any],
    peft_config: Any,
    *,
    seconds: dict[str, float],
    resume: bool,
    last: Path | None = None,
) -> Path:
    """Train and save one policy per weight vector, then the soups between neighbours where asked.

    make_trainer: from the config of one point. identity: what else decides the result; a point that was trained with
    another identity, or with other options, is not taken for this sweep's. last: a policy for the last vector, which is
    then not trained.
    """
    root = Path(args.output_dir)
    front = Front(method, "", objectives, [], seconds)
    identity = {**identity, "lora": described(peft_config), "seed": args.seed}
    reference = vars(args).get("ref_model_name_or_path")
    if reference is not None:
        identity["reference_weights"] = named_digest(reference)
    if args.interpolate is not None and len(objectives) != 2:
        raise ConfigError(f"interpolate is for two objectives, whose points have neighbours; there are {objectives}")
    for number, weights in enumerate(vectors):
        name = point_name(weights)
        if last is not None and number == len(vectors) - 1:
            front.points.append(Point(name, str(last), weights, kind="margin"))
            continue
        point_args = point_config(args, weights, root / name)
        settings, record = result_settings(point_args, **identity), root / name / POINT_FILE
        done = finished(record, settings) if resume and record.exists() else None
        if done is None:
            logger.info("point %d of %d: %s", number + 1, len(vectors), weights)
            done = train_point(make_trainer, point_args, settings, resume)
        else:
            logger.info("point %d of %d: %s is complete and kept", number + 1, len(vectors), root / name)
        front.reference = done["reference"]
        front.points.append(Point(name, name, weights, seconds=done["seconds"]))
        if args.process_index == 0:
            write_front(front, root)

    def finish() -> None:
        if args.interpolate is not None:
            front.points = with_soups(front.points, args.interpolate, root)
        write_front(front, root)

    by_first(finish)  # the others wait: they may read it
    return root


def train_point(make_trainer: Callable[[Any], Any], args: Any, settings: dict, resume: bool) -> dict:
    """Train and save one policy; then write point.json, which says that it is complete and how it was trained."""
    from align.distributed.checkpoints import flush_files, newest_whole

    started, folder = time.perf_counter(), Path(args.output_dir)
    (folder / POINT_FILE).unlink(missing_ok=True)
    trainer = make_trainer(args)
    trainer.train(resume_from_checkpoint=resume and folder.exists() and newest_whole(folder) is not None)
    trainer.save_model(str(folder))
    reference = named_base(args.ref_model_name_or_path or source_of(language_model(trainer.model)))
    done = {"settings": settings, "reference": reference, "seconds": time.perf_counter() - started}
    if args.process_index == 0:
        flush_files(folder)
        write_record(folder / POINT_FILE, done)
    trainer.accelerator.wait_for_everyone()
    del trainer  # before the next one is loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return done


# ---- weights --------------------------------------------------------------------------------------------------------


def sweep_weights(objectives: list[str], args: WeightOptions, min_weight: float) -> list[dict[str, float]]:
    """Weight vectors that sum to 1, evenly spread, the first objective's weight from 1 down to `sweep_min_weight`, or
    where that is not given to min_weight.

    Two objectives: `sweep_points` vectors in order. More: the lattice with so many along each edge.
    """
    points = args.sweep_points or 5
    min_weight = min_weight if args.sweep_min_weight is None else args.sweep_min_weight
    if len(objectives) < 2:
        raise ConfigError(f"a sweep needs at least two objectives, got {objectives}")
    steps, free = points - 1, len(objectives) - 1
    counts = [c for c in product(range(steps + 1), repeat=free) if sum(c) <= steps]
    vectors = []
    for others in sorted(counts, key=sum):
        rest = [(1 - min_weight) * count / steps for count in others]
        weights = [round(w, 10) for w in (1 - sum(rest), *rest)]
        vectors.append(dict(zip(objectives, weights, strict=True)))
    return vectors


def point_name(weights: dict[str, float]) -> str:
    return "w_" + "_".join(f"{weight:.4g}" for weight in weights.values())


def point_config(args: Any, weights: dict[str, float], folder: Path) -> Any:
    """The config of one point of a sweep: its own weights and folder; what is shared is in the sweep's folder."""
    root, own = Path(args.output_dir), copy.deepcopy(args)
    own.weights, own.output_dir = dict(weights), str(folder)
    own.run_name = f"{args.run_name or root.name}-{folder.name}"
    for name in SWEEP_OPTIONS:
        setattr(own, name, None)
    if isinstance(own, MODPOConfig):
        own.margin_cache_dir = str(args.margin_folder)
    if own.precompute_ref_log_probs and own.ref_log_probs_dir is None:
        own.ref_log_probs_dir = str(root / "ref_log_probs")
    return own


def with_soups(points: list[Point], count: int, root: Path) -> list[Point]:
    """The points, and `count` soups between each and the next, in order."""
    found = [points[0]]
    for left, right in pairwise(points):
        for step in range(1, count + 1):
            share = step / (count + 1)
            mixed = {key: (1 - share) * left.weights[key] + share * right.weights[key] for key in left.weights}
            name = point_name(mixed)
            make_soup([root / left.folder, root / right.folder], [1 - share, share], root / name)
            found.append(Point(name, name, mixed, kind="soup"))
        found.append(right)
    return found


# ---- models ---------------------------------------------------------------------------------------------------------


def check_model(model: Model, processing_class):
    """The tokenizer; ConfigError for a model that not every point could start from anew."""
    if isinstance(model, nn.Module):
        raise ConfigError("every point starts from the same weights: give the folder of the model, or a function")
    if callable(model) and processing_class is None:
        raise ConfigError("a function that loads the policy does not say which tokenizer: pass processing_class")
    return processing_class or load_tokenizer(model)


def margin_policy(rewards: list[Reward], reference: str | None, args: MODPOConfig, peft_config: Any) -> Path | None:
    """The folder of the optimum for weight 0 of `objective`, which need not be trained: the policy that the one margin
    reward is made of. None if there are more rewards or another kind of, if its policy was trained from another one
    than `reference`, the sweep's, or with another beta, or if it is saved in another form than the sweep's policies."""
    (reward, *others) = rewards
    if others or not isinstance(reward, ImplicitReward) or reward.beta != args.beta:
        return None
    policy, start = reward.model_folders
    if policy is None or start is None or reference is None or not Path(policy).is_dir():
        return None
    adapter = is_adapter(policy)
    same = start == reference or Path(start).resolve() == Path(reference).resolve()
    return Path(policy).absolute() if same and adapter == (peft_config is not None) else None


def check_sweep(args: WeightOptions) -> None:
    if args.weights != SWEEP:
        raise ConfigError(f"a front is trained with `weights: sweep`, not {args.weights!r}: that is one policy's")


def loaded(model: Model) -> nn.Module:
    return model() if callable(model) else load_policy(model)


def lora(peft_config):
    """A copy of the config for one point: PEFT writes into it."""
    return copy.deepcopy(peft_config)
