"""Ensembles of reward models, trained on the same pairs: members differ in their seeds."""

import copy
import logging
from pathlib import Path
from typing import Any

from align.data.formats import columns_of
from align.data.sets import of_each
from align.distributed.checkpoints import newest_whole
from align.distributed.ranks import by_first, shared
from align.errors import ConfigError
from align.modeling.adapters import is_adapter
from align.modeling.load import hold_modules_in_float32, load_sequence_classifier
from align.modeling.member_lora import add_member_adapters
from align.modeling.members import share_trunk
from align.modeling.pretrained import default_dtype
from align.reward_models.ensemble import FILE_NAME, KINDS, save_ensemble
from align.reward_models.joint import save_adapters, save_trunk
from align.reward_models.normalizer import FILE_NAME as NORMALIZER_FILE
from align.trainers.core.identity import data_digest
from align.trainers.core.loading import loading_options, tokenizer_of
from align.trainers.reward import RewardConfig, RewardTrainer, pair_data
from align.trainers.sweeps.joint_ensemble import JointRewardTrainer
from align.trainers.sweeps.kept import described, finished, result_settings, start_identity, write_record

logger = logging.getLogger(__name__)

RECORD = "trained.json"
# loading options that change no result
OF_PLACE = {"attn_implementation", "device_map", "low_cpu_mem_usage", "trust_remote_code"}


def train_reward_ensemble(
    model: str | Path,
    args: RewardConfig,
    train_dataset,
    eval_dataset=None,
    processing_class=None,
    *,
    members: int = 5,
    kind: str = "separate",
    upper_layers: int | None = None,
    train_trunk: bool = False,
    peft_config=None,
    callbacks=None,
    resume: bool = False,
    member: int | None = None,
    quantization_config: Any = None,
) -> Path:
    """Train `members` reward models on the same pairs, tokenised once; member i has seed `args.seed + i`.

    kind: how the members are held.
        separate      Models of their own, one run each. The seed draws the head and the order of the data, nothing else
                      (Coste et al. 2023). With `peft_config` each is an adapter, and is loaded as a model of its own;
                      with `quantization_config` it is trained as `RewardTrainer` does that.
        lora          One frozen model with an adapter (`peft_config`) and a head per member, from one pass.
        shared_trunk  The upper `upper_layers` layers and the head per member, from one pass; the layers below are
                      shared, and frozen unless `train_trunk`.
    From one pass, all members see the data in the order of `args.seed`, and differ in the seed of the head (and of the
    adapter). A head that the model has already is replaced then: equal heads would stay equal.

    Saves the members and ensemble.json in `args.output_dir` and returns that folder, for `load_ensemble` or a reward of
    type ensemble. With `resume` a separate member that is already saved whole is kept, as is an ensemble of one pass;
    ConfigError if it was trained from other weights, on other data or with other settings. One pass that was stopped
    resumes from its newest checkpoint. `member` is the number of the one separate member to train in this call, so that
    each can be a job of its own; the call that finds all members there writes ensemble.json.
    """
    _check(model, members, kind, upper_layers, train_trunk, peft_config)
    _check_separate(member, members, kind, quantization_config)
    columns_of(train_dataset)  # no stream: every member goes through the same rows
    processing_class = tokenizer_of(args, model, processing_class)
    data = pair_data(processing_class, args)
    given = {"train_dataset": data.prepare(train_dataset, "train"), "processing_class": processing_class}
    given |= {"eval_dataset": of_each(eval_dataset, lambda rows: data.prepare(rows, "eval")), "callbacks": callbacks}
    folder, names = Path(args.output_dir), [f"member_{i}" for i in range(members)]
    identity = _identity(str(model), args, given, peft_config, quantization_config)
    if kind == "separate":
        given |= {"peft_config": peft_config, "quantization_config": quantization_config}
        for i in range(members) if member is None else [member]:
            _train_one(str(model), args, folder / names[i], i, given, identity, resume)
        if not shared(all(map(_whole, (folder / name for name in names)))):
            return folder
    else:
        form = {"members": members, "kind": kind, "upper_layers": upper_layers, "train_trunk": train_trunk}
        settings = result_settings(args, **identity, **form)
        if resume and (folder / FILE_NAME).exists():
            finished(folder / RECORD, settings)
            logger.info("%s holds a trained ensemble, which is kept", folder)
            return folder
        _train_joint(str(model), args, names, form, given, settings, peft_config, resume)
    by_first(lambda: save_ensemble(folder, names, kind=kind, upper_layers=upper_layers))  # which the others may load
    return folder


def _check(model, members: int, kind: str, upper_layers: int | None, train_trunk: bool, peft_config) -> None:
    if members < 1:
        raise ConfigError(f"an ensemble needs at least one member, got {members}")
    if kind not in KINDS:
        raise ConfigError(f"the kind of an ensemble is one of {', '.join(KINDS)}, got {kind!r}")
    if (kind == "shared_trunk") != (upper_layers is not None):
        raise ConfigError(
            "a shared trunk needs upper_layers: how many layers each member has of its own"
            if upper_layers is None
            else f"upper_layers belongs to the kind shared_trunk; {kind} would ignore it"
        )
    if train_trunk and kind != "shared_trunk":
        raise ConfigError(f"train_trunk belongs to the kind shared_trunk; {kind} would ignore it")
    if kind == "lora" and peft_config is None:
        raise ConfigError("an ensemble of kind lora needs a peft_config (use_peft: true, lora_r ...)")
    if kind == "shared_trunk" and peft_config is not None:
        raise ConfigError("a shared trunk has no adapters: leave peft_config (use_peft) out, or take the kind lora")
    if kind == "lora" and is_adapter(model):
        raise ConfigError(f"{model} holds an adapter, and members' adapters need a whole model: merge it first")


def _check_separate(member: int | None, members: int, kind: str, quantization_config: Any) -> None:
    if quantization_config is not None and kind != "separate":
        raise ConfigError(f"members of kind {kind} share a model that is not quantised: leave quantization_config out")
    if member is None:
        return
    if kind != "separate":
        raise ConfigError(
            f"members of kind {kind} are trained together, from one pass; member {member} cannot be alone"
        )
    if not 0 <= member < members:
        raise ConfigError(f"there is no member {member} among {members}, which are numbered from 0")


def _unmark(args: RewardConfig, mark: Path) -> None:
    """What was trained here before is not what is trained now, should that break off."""
    if args.process_index == 0:
        mark.unlink(missing_ok=True)


def _whole(folder: Path) -> bool:
    return (folder / NORMALIZER_FILE).exists()  # the last file of a reward model to be written


def _identity(model: str, args: RewardConfig, given: dict[str, Any], peft_config, quantization_config) -> dict:
    """What decides a member beside its options. The evaluation set does: its normaliser is fitted on that."""
    loading = loading_options(args, model)
    return {
        **start_identity(model),
        "model_options": {k: str(v) for k, v in loading.items() if k not in OF_PLACE and v is not None},
        "data": data_digest(given["train_dataset"]),
        "eval_data": of_each(given["eval_dataset"], data_digest),
        "lora": described(peft_config),
        "quantization": described(quantization_config),
    }


def _record(args: RewardConfig, folder: Path, settings: dict[str, Any]) -> None:
    """Before what marks the folder as whole, which never is without its settings."""
    if args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / RECORD, {"settings": settings})


def _train_one(
    model: str, args: RewardConfig, folder: Path, index: int, options: dict[str, Any], identity: dict, resume: bool
) -> None:
    member_args = copy.deepcopy(args)
    member_args.output_dir = str(folder)
    member_args.seed = member_args.data_seed = args.seed + index
    settings = result_settings(member_args, **identity)
    if resume and _whole(folder):
        finished(folder / RECORD, settings)
        logger.info("%s is complete and kept", folder)
        return
    _unmark(args, folder / NORMALIZER_FILE)
    member_args.run_name = f"{args.run_name or folder.parent.name}-{folder.name}"
    logger.info("%s: seed %d", folder, member_args.seed)
    trainer = RewardTrainer(model, member_args, **options)
    trainer.train(resume_from_checkpoint=False)  # a member that is not whole begins anew
    _record(args, folder, settings)
    trainer.save_model()


def _train_joint(
    model: str, args, names: list[str], form: dict, given: dict, settings: dict, peft_config, resume: bool
) -> None:
    """form: how the members are held. given: data, tokenizer and callbacks."""
    folder = Path(args.output_dir)
    _unmark(args, folder / FILE_NAME)
    joint = _joint_model(model, args, given["processing_class"], **form, peft_config=peft_config)
    trainer = JointRewardTrainer(joint, _of_loaded(args), **given)
    trainer.form = {**form, "lora": described(peft_config)}
    trainer.train(resume_from_checkpoint=resume and newest_whole(folder) is not None)
    _record(args, folder, settings)
    _save_joint(trainer, form["kind"], folder, names, peft_config)


def _joint_model(model: str, args, tokenizer, members: int, kind: str, upper_layers, train_trunk: bool, peft_config):
    seeds = [args.seed + i for i in range(members)]
    options = {"dtype": default_dtype(frozen=kind == "lora"), **loading_options(args, model)}
    core = load_sequence_classifier(model, pad_token_id=tokenizer.pad_token_id, head_seed=args.seed, **options)
    if kind == "lora":
        add_member_adapters(core, peft_config, seeds)
        hold_modules_in_float32(core, autocast=args.bf16 or args.fp16)
        return core
    return share_trunk(core, seeds, upper_layers, train_trunk=train_trunk)


def _of_loaded(args: RewardConfig) -> RewardConfig:
    """For a model that has been loaded with the options of loading."""
    args = copy.deepcopy(args)
    args.model_init_kwargs = None
    return args


def _save_joint(trainer: JointRewardTrainer, kind: str, folder: Path, names: list[str], peft_config) -> None:
    if not trainer.args.should_save:
        return
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    if kind == "lora":
        save_adapters(model, [folder / name for name in names], peft_config, tokenizer)
    else:
        save_trunk(model, folder)
        tokenizer.save_pretrained(folder)
    trainer.save_normalizers([folder / name for name in names])
