"""Short runs of a config, as `align check` compares them."""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.doctor.machine import free_gib
from align.errors import ConfigError

SHORT = {
    "max_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": "false",
    "report_to": "none",
    "push_to_hub": "false",
    "load_best_model_at_end": "false",
    "disable_tqdm": "true",
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": "null",
    "warmup_steps": 0,
    "resume_from_checkpoint": "false",
}
WITHOUT_DROPOUT = ("lora_dropout", "mask_dropout")  # which is drawn otherwise for other batches
ONE_BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
OWNED = {*SHORT, *WITHOUT_DROPOUT, *ONE_BATCH, "output_dir", "num_train_epochs", "save_steps", "save_only_model"}
ROWS = 8  # two steps of four
OF_ROWS = {"datasets": "null", "mixture_seed": 0, "dataset_config": "null", "label_noise": 0, "label_noise_seed": 0}
"""Options that have done their work when the rows are in a file of their own."""
LOOKED_AT = 16
"""Rows that are tokenised for each row that is used: some of a real dataset are too long, or bad."""


@dataclass
class Result:
    """What a short run left. logs: of each step. folder: its output, with the final model. from_reference: whether
    the policy is its reference before the first step."""

    logs: list[dict]
    folder: Path
    dtype: str
    from_reference: bool = False


class Checker:
    """Makes the short runs of one config. Each is made once."""

    def __init__(self, config: str, options: list[str], rows: int, work: Path):
        from align.cli import build
        from align.config.resolve import resolve
        from align.config.source import read_file, read_overrides
        from align.data.streams import sample_of

        stated = read_file(config).get("method")
        if stated is None:
            raise ConfigError(f"{config}: a line `method:` is needed, to know what is checked")
        self.config, self.method, self.work = config, str(stated.value), work
        self.given = [f"--{option}" for option in options]
        if own := [key for key, _ in read_overrides(self.given) if key in OWNED]:
            raise ConfigError(f"--set {own[0]}: the check sets this itself for its short runs: leave it out")
        if rows < ROWS:
            raise ConfigError(f"--rows {rows} is too few: two steps of four rows need {ROWS}")
        self.run = resolve(self.method, config, self.given)
        found = sample_of(build.train_rows(self.run))
        if len(found) < ROWS:
            raise ConfigError(f"there are {len(found)} rows to train on: two steps of four rows need {ROWS}")
        self.rows = usable(self.run, found, rows)
        self.rows.to_parquet(work / "rows.parquet")
        self.results: dict[str, Result] = {}

    def tokens(self, output: Path, **options: Any) -> list[str]:
        """The command line of a short run. What a method has no option for is left out."""
        from align.config.options import options_of

        known = options_of(self.method)
        own = {**SHORT, **ONE_BATCH, "output_dir": output}
        own |= {"dataset_name": self.work / "rows.parquet", "dataset_train_split": "train", "streaming": "false"}
        own |= {key: value for key, value in OF_ROWS.items() if key in self.run.given}
        own |= {key: 0 for key in WITHOUT_DROPOUT} | options
        if not self.run.model.use_peft:
            del own["lora_dropout"]  # which is refused without an adapter
        return [*self.given, *(f"--{key}={value}" for key, value in own.items() if key in known)]

    def made(self, name: str, *, keep: bool = False, **options: Any) -> Result:
        """The short run of this name. keep: its final model stays in its folder, which is else deleted."""
        if name not in self.results:
            self.results[name] = self._train(self.work / name.replace(" ", "_"), keep, **options)
        return self.results[name]

    def whole(self) -> Result:
        """The run that the others are compared with; its model stays."""
        return self.made("4 at once", keep=True)

    def _train(self, output: Path, keep: bool, **options: Any) -> Result:
        from align.cli import build
        from align.config.arguments import resume_from
        from align.config.resolve import resolve

        run = resolve(self.method, self.config, self.tokens(output, **options))
        trainer = build.trainer(run)
        try:
            if not self.results:
                check_space(trainer.model, self.work)
            trainer.train(resume_from_checkpoint=resume_from(run.training.resume_from_checkpoint))
            if keep:
                trainer.save_model(str(output))
            logs = list(trainer.state.log_history)
            return Result(logs, output, _dtype(run.training), starts_from_reference(trainer))
        finally:
            if hasattr(trainer, "close"):
                trainer.close()
            del trainer
            free()
            if not keep:
                shutil.rmtree(output, ignore_errors=True)


def usable(run, found, count: int):
    """The first rows that the run would train on. ConfigError where they are too few."""
    from align.cli import build
    from align.cli.dry_run import tokenize

    looked_at = found.select(range(min(LOOKED_AT * count, len(found))))
    tokenised, _ = tokenize(run, looked_at, build.tokenizer(run), max_bad_share=1.0)
    numbers = sorted(set(tokenised["row"]))[:count]
    if len(numbers) < ROWS:
        raise ConfigError(
            f"of the first {len(looked_at)} rows {len(numbers)} can be used, and two steps of four rows need {ROWS}: "
            "`--dry-run` shows why; --rows N looks at more"
        )
    return looked_at.select(numbers)


def starts_from_reference(trainer) -> bool:
    """Whether the trainer compares policy and reference in its first step: not where the run names another reference,
    nor without one."""
    from align.trainers.on_policy.loop import OnPolicyTrainer
    from align.trainers.pairs.preference import PreferenceTrainer

    if isinstance(trainer, PreferenceTrainer):
        return trainer.check_start and trainer.needs_reference
    return isinstance(trainer, OnPolicyTrainer) and trainer.check_start and bool(trainer.args.beta)


def check_space(model, folder: Path) -> None:
    """ConfigError where a folder has no room for what the check keeps at one time: a checkpoint with the states of
    AdamW, two trained models and, for an adapter, the merged one; 4 bytes a number."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    full = sum(p.numel() for p in model.parameters())
    need, found = (20 * trained + (4 * full if trained < full else 0)) / 2**30, free_gib(folder)
    if found < need:
        raise ConfigError(
            f"the short runs need up to {need:.1f} GiB in {folder}, which has {found:.1f} GiB free: "
            "name another --folder"
        )


def free() -> None:
    """Give the memory of a trainer back before the next one is made."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dtype(args) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
