"""The parts of a run, made from its resolved config: rows, tokenizer, model, adapter, rewards, trainer."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from align.config.arguments import EnsembleArguments
from align.config.resolve import RunConfig
from align.errors import AlignError, ConfigError
from align.lazy import load

logger = logging.getLogger(__name__)


def train_rows(run: RunConfig, *, tell: bool = True):
    """The rows to train on, some labels flipped if `label_noise` says so. tell: log what a mixture is of."""
    from align.data import load_rows
    from align.data.mixture import load_mixture, parse_mixture
    from align.data.noise import flip_labels

    data, noise = run.data, run.ensemble
    if data.datasets is None:
        rows = load_rows(cast(str, data.dataset_name), data.dataset_train_split, data.dataset_config, data.streaming)
    else:
        rows = load_mixture(parse_mixture(data.datasets), data.mixture_seed)
        if tell:
            logger.info("%s", rows.info.description)
    if noise is None or not noise.label_noise:
        return rows
    if data.streaming:
        raise ConfigError("label_noise draws among all rows, which streaming does not know: leave one of the two out")
    return flip_labels(rows, noise.label_noise, noise.label_noise_seed)[0]


def save_label_noise(run: RunConfig, rows: Any) -> None:
    """Write which of the training rows are flipped to output_dir, if any are; a file of an earlier run goes."""
    from align.data.noise import FILE_NAME, flipped_rows, save_flips

    noise, folder = run.ensemble, Path(run.training.output_dir)
    if run.training.process_index != 0:
        return
    if noise is None or not noise.label_noise:
        (folder / FILE_NAME).unlink(missing_ok=True)
        return
    flipped = flipped_rows(len(rows), noise.label_noise, noise.label_noise_seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_flips(folder / FILE_NAME, flipped, share=noise.label_noise, seed=noise.label_noise_seed)


def evaluates(run: RunConfig) -> bool:
    return run.training.eval_strategy != "no" or bool(run.given.get("eval_on_start"))


def eval_rows(run: RunConfig):
    """The rows to evaluate on, None where the run does not evaluate."""
    from align.data import load_rows
    from align.data.rows import evaluation_split

    if not evaluates(run):
        return None
    other = run.data.eval_dataset_name
    if other is None and run.data.dataset_name is None:
        raise ConfigError("several datasets are trained on: set eval_dataset_name, or eval_strategy: 'no'")
    if other is None:
        return load_rows(cast(str, run.data.dataset_name), run.data.dataset_test_split, run.data.dataset_config)
    return load_rows(other, evaluation_split(other, run.data.dataset_test_split))


def source_options(run: RunConfig) -> dict[str, Any]:
    """Of `from_pretrained`, for whatever is read of the model's folder or hub name."""
    return {"revision": run.model.model_revision, "trust_remote_code": run.training.trust_remote_code}


def tokenizer(run: RunConfig):
    from align.modeling.load import load_tokenizer
    from align.trainers.core.loading import tokenizer_of

    return tokenizer_of(run.training, None, load_tokenizer(run.model.model_name_or_path, **source_options(run)))


def peft_config(run: RunConfig):
    """The LoRA config, None without `use_peft`."""
    from trl import get_peft_config

    from align.modeling.adapters import by_names

    try:
        config = by_names(get_peft_config(run.model))
    except ValueError as error:
        given = [key for key in run.given if key.startswith("lora_")]
        place = f"{run.where(given[0])}: " if given else ""
        raise ConfigError(f"{place}{', '.join(given) or 'use_peft'}: PEFT takes no such adapter: {error}") from error
    # TRL's default would be switched off, with a warning about an option that nobody has set
    if config is not None and "lora_dropout" not in run.given and getattr(run.training, "disable_dropout", False):
        config.lora_dropout = 0.0
    return config


def dtype(run: RunConfig) -> str:
    """As given, else `default_dtype`."""
    from align.modeling.pretrained import default_dtype

    return run.model.dtype if "dtype" in run.given else default_dtype(frozen=run.model.use_peft)


def model(run: RunConfig):
    """The model that is trained, without its adapter."""
    from accelerate import PartialState

    from align.modeling.load import load_policy, load_sequence_classifier

    options: dict[str, Any] = {**source_options(run), "dtype": dtype(run)}
    packed = quantization(run)
    if packed is not None:
        # quantised weights cannot be moved afterwards: every process loads them to where it trains
        device = PartialState(cpu=run.training.use_cpu).device
        options |= {"quantization_config": packed, "device_map": {"": device}}
    if run.method.model == "classifier":
        options["head_seed"] = run.training.seed
    load_model = load_sequence_classifier if run.method.model == "classifier" else load_policy
    return load_model(
        run.model.model_name_or_path, attn_implementation=run.model.attn_implementation, sharded=True, **options
    )


def name_options(run: RunConfig) -> dict[str, Any]:
    """What a trainer needs beside the model's name to load it as `model` does: in place, and arguments of its own."""
    options = {"dtype": dtype(run), "attn_implementation": run.model.attn_implementation, **source_options(run)}
    del options["trust_remote_code"]  # which is in `run.training`
    run.training.model_init_kwargs = {k: v for k, v in options.items() if v} | (run.training.model_init_kwargs or {})
    found = quantization(run)
    return {} if found is None else {"quantization_config": found}


def quantization(run: RunConfig):
    """Of bitsandbytes, None without it."""
    from transformers.integrations import is_deepspeed_zero3_enabled
    from trl import get_quantization_config

    found = get_quantization_config(run.model)
    if found is not None and is_deepspeed_zero3_enabled():
        raise ConfigError(
            "load_in_4bit and load_in_8bit do not work with DeepSpeed ZeRO-3: use --setup fsdp2, zero2 or ddp"
        )
    return found


def model_config(run: RunConfig):
    return pretrained_config(run.model.model_name_or_path, "model", **source_options(run))


def empty_model(run: RunConfig):
    """The model that is trained, on the meta device, without its weights and without its adapter."""
    from align.modeling import pretrained

    classifier = run.method.model == "classifier"
    return pretrained.empty_model(run.model.model_name_or_path, classifier=classifier, **source_options(run))


def longest_sequence(run: RunConfig, model) -> int:
    """Tokens of the longest sequence that the engine of an on-policy run makes, its questions to a policy that judges
    itself among them. `max_prompt_length` becomes what the trainer makes of it. model: `empty_model`."""
    from align.reward_models.judge_specs import SelfJudgeSpec
    from align.reward_models.repeats import leaves
    from align.reward_models.specs import parse_rewards
    from align.trainers.on_policy.samples import fit_prompts
    from align.trainers.on_policy.self_judges import room_of_judges

    args = run.training
    fit_prompts(args, model)
    judges = [spec.build() for spec in leaves(parse_rewards(run.rewards or [])) if isinstance(spec, SelfJudgeSpec)]
    room = room_of_judges(judges, tokenizer(run), args) if judges else 0
    return max(room, args.max_prompt_length + args.max_completion_length)


def pretrained_config(name: str, what: str, **options):
    """The transformers config of a folder or hub name; that of the base model for the folder of an adapter."""
    from align.modeling import pretrained

    return pretrained.pretrained_config(name, what, **options)


def rewards(run: RunConfig, key: str, tokenizer) -> list:
    """The rewards of a section (`rewards` or `gold_reward`), built; an error names the place of the section."""
    from align.reward_models.build import build_reward

    return _of_each_reward(run, key, lambda spec: build_reward(spec, tokenizer=tokenizer))


def check_rewards(run: RunConfig) -> None:
    """Raise what `rewards` would, as far as that can be told without loading a model or asking a server."""
    from align.reward_models.build import check_reward

    for key in ("rewards", "gold_reward"):
        _of_each_reward(run, key, check_reward)


def episodes(run: RunConfig, tokenizer):
    """What the conversations of an on-policy run are with, made as the trainer makes it; None where there are none."""
    if run.method.data != "prompts":
        return None
    from align.trainers.on_policy.episodes import make_episodes

    try:
        return make_episodes(run.training, None, None, tokenizer)
    except ConfigError as error:
        key = error.key or ("environment" if run.training.environment is not None else "tools")
        raise ConfigError(f"{run.where(key)}: {error}", key=key) from error


def reward_models(run: RunConfig, sections: Sequence[str] = ("rewards", "gold_reward")) -> dict[str, bool]:
    """Folders and hub names of the models that the rewards need; True for those with a score head."""
    from align.reward_models.build import model_paths

    found: dict[str, bool] = {}
    for key in sections:
        for paths in _of_each_reward(run, key, model_paths):
            found |= paths
    return found


def reward_ranks(run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Of the models that the rewards need, those that some ranks of the run alone load, with these ranks."""
    from align.reward_models.build import join_ranks, model_ranks

    found: dict[str, set[int] | None] = {}
    for key in ("rewards", "gold_reward"):
        for ranks in _of_each_reward(run, key, model_ranks):
            join_ranks(found, ranks)
    return {path: tuple(sorted(ranks)) for path, ranks in found.items() if ranks is not None}


def _of_each_reward(run: RunConfig, key: str, function: Callable) -> list:
    """function(spec) of each reward of a section; an error names the place of the section."""
    specs = getattr(run, key)
    results = []
    for i, spec in enumerate(specs if isinstance(specs, list) else [] if specs is None else [specs]):
        try:
            results.append(function(spec))
        except AlignError as error:
            name = f"{key}.{i}" if isinstance(specs, list) else key
            raise ConfigError(f"{run.where(name)}: {name}: {error}") from error
    return results


def trainer(run: RunConfig):
    """The method's trainer, ready to train one model."""
    text = tokenizer(run)  # a name that is not there is said before the rows are read
    train, evaluate = train_rows(run), eval_rows(run)
    save_label_noise(run, train)
    if evaluate is None:
        run.training.eval_on_start = False
    options: dict[str, Any] = name_options(run)
    if run.method.rewards:
        options["reward"] = None if run.rewards is None else rewards(run, "rewards", text)
        if run.gold_reward is not None:
            options["gold_reward"] = rewards(run, "gold_reward", text)
    return load(run.method.trainer)(
        model=run.model.model_name_or_path,  # whose weights it reads after the rows
        args=run.training,
        train_dataset=train,
        eval_dataset=evaluate,
        processing_class=text,
        peft_config=peft_config(run),
        **options,
    )


def is_sweep(run: RunConfig) -> bool:
    """Whether the run trains one policy per weight vector."""
    return run.method.sweep is not None and run.training.weights == "sweep"


def train_sweep(run: RunConfig, resume: bool) -> Path:
    """Train a front; return its folder. With `resume`, finished points are kept."""
    text = tokenizer(run)
    return load(cast(str, run.method.sweep))(
        lambda: model(run),
        rewards(run, "rewards", text),
        run.training,
        train_rows(run),
        eval_rows(run),
        text,
        peft_config=peft_config(run),
        resume=resume,
        model_name=run.model.model_name_or_path,
        model_options={"dtype": dtype(run), "revision": run.model.model_revision, "quantization": quantization(run)},
    )


def check_ensemble(run: RunConfig) -> None:
    """Raises `ConfigError` for options of loading that the members of an ensemble do not take."""
    from trl import get_quantization_config

    kind = cast(EnsembleArguments, run.ensemble).ensemble_kind
    if get_quantization_config(run.model) is not None and (kind != "separate" or not run.model.use_peft):
        raise ConfigError(
            "load_in_4bit and load_in_8bit with ensemble > 1 are for ensemble_kind separate with use_peft: what "
            "members share is not quantised"
        )


def train_ensemble(run: RunConfig, resume: bool) -> Path:
    """Train the members of an ensemble; return the folder that holds them. With `resume`, finished ones are kept."""
    check_ensemble(run)
    rows = train_rows(run)
    save_label_noise(run, rows)
    of_ensemble = cast(EnsembleArguments, run.ensemble)
    options = name_options(run)
    return load(cast(str, run.method.ensemble))(
        run.model.model_name_or_path,
        run.training,
        rows,
        eval_rows(run),
        tokenizer(run),
        members=of_ensemble.ensemble,
        kind=of_ensemble.ensemble_kind,
        upper_layers=of_ensemble.ensemble_upper_layers,
        train_trunk=of_ensemble.ensemble_train_trunk,
        peft_config=peft_config(run),
        resume=resume,
        member=of_ensemble.ensemble_member,
        **options,
    )
