"""`align <method> --dry-run`: everything up to the first training step that needs no weights, then stop.

Printed in the order in which it can fail, so that a machine without the network or without the data shows as much as
it can: config, one step, tokenizer and rows, first example, steps of the run, memory.
"""

import math
from typing import Any, cast

import numpy as np
import yaml

from align.cli import build
from align.cli.estimate import Packed, Shape, estimate, members_shape, model_shape
from align.config.arguments import EnsembleArguments
from align.config.resolve import RunConfig, settings
from align.data.dialogue import unused_template
from align.data.limits import check_fits, lengths_of, longest_of, longest_sequence
from align.data.streams import LOOKED_AT, sample_of
from align.errors import ConfigError
from align.modeling.rotary import choose_factors
from align.rollout.engine import check_length


def dry_run(run: RunConfig, processes: int | None = None) -> int:
    """Print what `run` would do with `processes` processes (default: as many as this one belongs to)."""
    processes = processes or run.training.world_size
    _title(f"align {run.method.name}: dry run, nothing is trained")
    print(_config_text(run), end="")
    build.check_rewards(run)
    if run.ensemble is not None and run.ensemble.several:
        build.check_ensemble(run)
    check_ranks(run, processes)
    _title("one step")
    print(step_text(run, processes))
    tokenizer = build.tokenizer(run)
    episodes = build.episodes(run, tokenizer)
    model = build.empty_model(run)
    if run.method.data == "prompts":
        check_length(model.config.get_text_config(), build.longest_sequence(run, model))
    _title("data")
    given = build.train_rows(run, tell=False)  # which is printed here
    if run.data.streaming:
        print(f"a stream: its first {LOOKED_AT} rows are looked at, the others when training reaches them")
    if run.data.datasets is not None:
        print(given.info.description)
    rows, report = tokenize(run, sample_of(given), tokenizer, episodes=episodes)
    print(report.summary())
    if run.method.data != "prompts":
        choose_factors(model, longest_sequence(run.training.max_length, [rows]))
    check_fits(model, rows, "training", tokenizer)
    if (evaluated := build.eval_rows(run)) is not None:
        rows_there, report_there = tokenize(run, evaluated, tokenizer, evaluation=True, episodes=episodes)
        print(f"evaluation: {report_there.summary()}")
        check_fits(model, rows_there, "evaluation", tokenizer)
    if (note := unused_template(sample_of(given), tokenizer)) is not None:
        print(f"  note:    {note}")
    _title("first example")
    print(_example_text(run, rows[0], tokenizer))
    _title("steps")
    if run.data.streaming:
        print(f"{run.training.max_steps} optimiser steps (max_steps) of {global_batch(run, processes)} rows")
    else:
        print(steps_text(run, len(rows), processes))
    _title("memory (an estimate from the model's config, no weights are loaded)")
    print("\n".join(_memory(run, build.model_config(run), rows).lines(processes)))
    return 0


def _title(text: str) -> None:
    print(f"\n### {text}")


def _config_text(run: RunConfig) -> str:
    """The settings that differ from the defaults, as YAML, each with the place it was set."""
    lines = []
    for key, value in settings(run).items():
        text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip("\n").split("\n")
        where = run.entries[key].places if key in run.entries else "the command" if key == "method" else "this machine"
        text[0] = f"{text[0]:<56} # {where}"
        lines += text
    return "\n".join(lines) + "\n"


# ---- data -----------------------------------------------------------------------------------------------------------


LENGTH_LIMIT = {
    "prompts": "max_prompt_length",
    "completions": "max_length",
    "pairs": "max_length",
    "ranked": "max_length",
    "unpaired": "max_length",
}


def tokenize(
    run: RunConfig, rows, tokenizer, max_bad_share: float | None = None, evaluation: bool = False, episodes=None
) -> tuple[Any, Any]:
    """The tokenised rows and what was found in them (`align.data.BadRows`): the trainers' own functions and options.
    max_bad_share: in the place of the run's. evaluation: of rows to evaluate on, prompts beside offline pairs.
    episodes: that the prompts are for (`build.episodes`)."""
    import align.data

    training, report = run.training, align.data.BadRows()
    share = training.max_bad_share if max_bad_share is None else max_bad_share
    kind = run.method.data if evaluation else _example(run)
    function, limit = getattr(align.data, f"tokenize_{kind}"), LENGTH_LIMIT[run.method.data]
    options = {limit: getattr(training, limit), "max_bad_share": share, "num_proc": training.dataset_num_proc}
    if run.method.offline_pairs and not evaluation:
        options["max_length"] = training.max_prompt_length + training.max_completion_length
    if kind == "prompts":
        tools = {"tools": episodes.schemas} if episodes is not None and episodes.schemas else {}
        options["template_options"] = {**(training.chat_template_kwargs or {}), **tools} or None
        if episodes is not None:
            from align.trainers.on_policy.environments import with_prompts

            episodes.environments.check(rows)
            rows, tokenizer, options["completed"] = with_prompts(rows), episodes.tokenizer, True
    if vars(training).get("implicit_reward_beta") is not None:  # of SFT
        options["scored"] = True
    return function(rows, tokenizer, report=report, **options), report


def _example_text(run: RunConfig, row: dict, tokenizer) -> str:
    from align.data import describe_example

    return describe_example(row, tokenizer, _example(run))


def _example(run: RunConfig) -> str:
    """What a row to train on is (`align.data.tokenize_*`)."""
    return "pairs" if run.method.offline_pairs else run.method.data


# ---- arithmetic -----------------------------------------------------------------------------------------------------

UNITS = {"prompts": "prompts", "completions": "sequences", "pairs": "pairs"}
UNITS |= {"ranked": "lists", "unpaired": "answers"}


def global_batch(run: RunConfig, processes: int) -> int:
    """Rows of one optimiser step."""
    training = run.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes


def step_text(run: RunConfig, processes: int) -> str:
    """One line: where the rows of an optimiser step come from, and how many sequences they become."""
    training, unit = run.training, UNITS[run.method.data]
    rows = global_batch(run, processes)
    text = (
        f"{training.per_device_train_batch_size} {unit} per device x {training.gradient_accumulation_steps} "
        f"accumulated x {processes} {'process' if processes == 1 else 'processes'} = {rows} {unit}"
    )
    if run.method.data == "prompts":
        text += f" x {training.num_generations} samples -> {rows * training.num_generations} sequences"
        if training.steps_per_rollout > 1:
            prompts = rows * training.num_mini_batches
            return f"{text} -> 1 optimiser step; a rollout of {prompts} prompts -> {training.steps_per_rollout} steps"
    elif run.method.data == "pairs":
        text += f" -> {2 * rows} sequences"
    return f"{text} -> 1 optimiser step"


def steps_text(run: RunConfig, rows: int, processes: int) -> str:
    """One line: rows -> steps per epoch -> steps in all. ConfigError when the rows do not fill one step."""
    training, unit = run.training, UNITS[run.method.data]
    batch = global_batch(run, processes)
    if rows < batch:
        raise ConfigError(
            f"{rows} {unit} do not fill one step of {batch}: lower per_device_train_batch_size "
            f"({training.per_device_train_batch_size}), gradient_accumulation_steps "
            f"({training.gradient_accumulation_steps}) or the number of processes ({processes})"
        )
    per_epoch, left = _steps_per_epoch(run, rows, processes)
    if training.max_steps > 0:
        total, epochs = training.max_steps, training.max_steps / per_epoch
    else:
        total, epochs = math.ceil(training.num_train_epochs * per_epoch), training.num_train_epochs
    words = "1 epoch" if epochs == 1 else f"{epochs:.4g} epochs"
    return f"{rows} {unit} -> {per_epoch} steps per epoch -> {total} optimiser steps in {words}{left}"


def _steps_per_epoch(run: RunConfig, rows: int, processes: int) -> tuple[int, str]:
    """Optimiser steps of an epoch, and what becomes of rows that do not fill the last. ConfigError when the rows do not
    fill one rollout."""
    training, unit = run.training, UNITS[run.method.data]
    batch = global_batch(run, processes)
    if run.method.data == "prompts" and training.steps_per_rollout > 1:  # `BlockSampler`
        block = batch * training.num_mini_batches
        if rows < block:
            raise ConfigError(
                f"{rows} prompts do not fill one rollout of {block}: lower num_mini_batches "
                f"({training.num_mini_batches}) or the {batch} prompts of a step",
                key="num_mini_batches",
            )
        left = f"; {rows % block} prompts of every epoch fill no rollout" if rows % block else ""
        return rows // block * training.steps_per_rollout, left
    micro = training.per_device_train_batch_size * processes
    batches = rows // micro if training.dataloader_drop_last else math.ceil(rows / micro)
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    last = rows % batch if per_epoch > rows // batch else 0
    return per_epoch, f"; the last step of an epoch has {last} {unit}" if last else ""


# ---- memory ---------------------------------------------------------------------------------------------------------


def _memory(run: RunConfig, config, rows):
    training, data = run.training, run.method.data
    peft_config, packed = build.peft_config(run), _packed(run)
    classifier = run.method.model == "classifier"
    frozen = peft_config is not None or packed is not None  # else all is trained, and held in float32 for that
    dtype = build.dtype(run) if frozen else "float32"
    if one_pass(run):
        shape = _members_shape(run, config)
    else:
        shape = model_shape(config, dtype=dtype, classifier=classifier, peft_config=peft_config, packed=packed)
    mixed = bool(training.bf16 or training.fp16)
    on_policy = data == "prompts"
    return estimate(
        shape,
        optim=training.optim.value,
        mixed=mixed,
        checkpointing=bool(training.gradient_checkpointing),
        tokens=micro_batch_tokens(run, rows),
        logits=not classifier,
        reference=_holds_reference(run, adapter=peft_config is not None),
        reference_width=_reference_width(run),
        engine_width=_engine_width(run, 2 if mixed else shape.bytes_per_weight) if on_policy else None,
        engine_ranks=run.training.engine_options.sharing if on_policy else 1,
        critic=_critic_shape(run, config) if on_policy else None,
        rewards=reward_shapes(run) if run.method.rewards else {},
        learning=learning_rewards(run),
        ranks=build.reward_ranks(run) if run.method.rewards else {},
    )


def one_pass(run: RunConfig) -> bool:
    """Whether the members of an ensemble share a model, and are trained from one pass over the data."""
    return run.ensemble is not None and run.ensemble.several and run.ensemble.ensemble_kind != "separate"


def _members_shape(run: RunConfig, config) -> Shape:
    ensemble = cast(EnsembleArguments, run.ensemble)
    return members_shape(
        config,
        ensemble.ensemble,
        dtype=build.dtype(run),
        peft_config=build.peft_config(run),
        upper_layers=ensemble.ensemble_upper_layers or 0,
        train_trunk=ensemble.ensemble_train_trunk,
    )


def _holds_reference(run: RunConfig, *, adapter: bool) -> bool:
    """Whether a second model of the policy's size is held while it trains."""
    if run.method.data == "prompts":
        return not adapter and (run.training.beta != 0 or build.evaluates(run))
    if run.method.model != "policy":
        return False
    return run.training.holds_reference(adapter)


def _critic_shape(run: RunConfig, config) -> Shape | None:
    """Of the network that estimates values; None where the estimator needs none. config: of the policy."""
    from align.trainers.on_policy.estimators import make_estimator

    if not make_estimator(run.training).needs_values:
        return None
    path = vars(run.training).get("critic_model_name_or_path")
    if path is not None:
        config = build.pretrained_config(path, "critic")
    return model_shape(config, dtype="float32", classifier=True)


def _packed(run: RunConfig) -> Packed | None:
    bits = 4 if run.model.load_in_4bit else 8 if run.model.load_in_8bit else None
    return None if bits is None else Packed(bits, nested=run.model.use_bnb_nested_quant)


def _engine_width(run: RunConfig, computed: int) -> int | None:
    """Bytes of each weight of an engine on this device. computed: of the dtype that the policy computes in."""
    rollout = run.training.rollout
    if rollout.backend == "server":
        return None  # its copy lies elsewhere
    return computed if rollout.dtype is None else 4 if rollout.dtype == "float32" else 2


def _reference_width(run: RunConfig) -> int | None:
    """Bytes of each weight of a reference with a `ref_dtype` of its own."""
    dtype = vars(run.training).get("ref_dtype")  # of SFT and preference methods
    return None if dtype is None else 4 if dtype == "float32" else 2


def micro_batch_tokens(run: RunConfig, rows) -> int:
    """Tokens of a micro-batch whose rows are all as long as the longest. Unless batches are `padded`, the completions
    of a prompt share it: what the model allows is not looked at here."""
    training = run.training
    whole, least = _row_tokens(run, rows)
    budget = vars(training).get("tokens_per_batch")
    if budget is None:
        return training.per_device_train_batch_size * whole
    # It is filled from all rows of the step, whatever per_device_train_batch_size.
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps * whole
    return min(step, max(least, budget))


def _row_tokens(run: RunConfig, rows) -> tuple[int, int]:
    """(tokens of the longest row, a prompt with all of its completions; the part of it that is never cut)."""
    training, data = run.training, run.method.data
    shared = vars(training).get("batching") != "padded" and not one_pass(run)
    if data != "prompts":
        revised = run.method.name == "srpo"
        whole = longest_revised(rows, shared) if revised else longest(rows, data, shared)
        return whole, whole
    pairs = getattr(training, "trained_together", None)  # of online DPO and its kin, which train few of what they draw
    prompt, completion, samples = longest(rows, data), training.max_completion_length, pairs or training.num_generations
    one = prompt + completion
    whole = prompt + samples * completion if shared else samples * one
    return whole, whole if pairs else one


def longest(rows, data: str, shared: bool = False) -> int:
    """Tokens of the longest row of a tokenised dataset; of a pair or list, what a batch holds for all of its sequences,
    whose prompt may be shared."""
    if data == "unpaired":
        return int((lengths_of(rows, "prompt_ids") + lengths_of(rows, "completion_ids")).max())
    if data == "ranked":
        lists = zip(lengths_of(rows, "prompt_ids").tolist(), rows["lengths"][:], strict=True)
        return max(p + sum(own) if shared else len(own) * (p + max(own)) for p, own in lists)
    if data != "pairs":
        return longest_of(rows, "prompt_ids" if data == "prompts" else "input_ids")
    p, c, r = (lengths_of(rows, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return int((p + c + r if shared else 2 * (p + np.maximum(c, r))).max())


def longest_revised(rows, shared: bool) -> int:
    """Tokens of the longest pair in SRPO's three contexts: after its prompt, and after one that shows either answer,
    without what the template adds."""
    p, c, r = (lengths_of(rows, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return int((3 * p + 4 * (c + r) if shared else 6 * (p + 2 * np.maximum(c, r))).max())


def check_ranks(run: RunConfig, processes: int) -> None:
    """ConfigError for a reward model on a rank beyond these processes; one process may be a dry run of more."""
    for path, ranks in build.reward_ranks(run).items() if processes > 1 else ():
        if max(ranks) >= processes:
            raise ConfigError(
                f"reward {path}: ranks places its model on rank {max(ranks)}, and {processes} processes have the ranks "
                f"0 to {processes - 1}"
            )


def learning_rewards(run: RunConfig) -> dict[str, bool]:
    """Of `build.reward_models` those that are trained: D2PO's discriminator."""
    return build.reward_models(run, ("rewards",)) if run.method.name == "d2po" else {}


def reward_shapes(run: RunConfig) -> dict[str, Shape]:
    """Sizes of the reward models that the specs name, by path, from their configs."""
    shapes, learning = {}, learning_rewards(run)
    for path, has_score in build.reward_models(run).items():
        config, adapter = build.pretrained_config(path, "reward model"), None
        if path in learning and run.training.discriminator_lora_r is not None:
            from peft import LoraConfig

            adapter = LoraConfig(r=run.training.discriminator_lora_r, target_modules="all-linear", task_type="SEQ_CLS")
        shapes[path] = model_shape(config, dtype="float32", classifier=has_score, peft_config=adapter)
    return shapes
