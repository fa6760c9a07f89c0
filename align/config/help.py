"""`align <method> --help`: the method's own options; `--help all` adds transformers' and TRL's hundred others."""

import argparse
from typing import Any

from align.config.options import options_of
from align.methods import Method

# Of the others, what nearly every run sets.
COMMON = (
    *("dataset_name", "dataset_train_split", "dataset_test_split", "eval_dataset_name", "datasets"),
    *("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_target_modules"),
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps", "eval_strategy", "eval_steps", "save_steps", "seed", "report_to"),
    "resume_from_checkpoint",
)
WITHOUT_EFFECT = ("TRL's, only with its default", "Without effect in this method")
TITLES = {
    "method": "method ({config})",
    "ensemble": "ensemble",
    "rewards": "rewards",
    "data": "data",
    "model": "model (trl.ModelConfig)",
    "training": "training (transformers.TrainingArguments)",
}


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def format_help(method: Method, parser: argparse.ArgumentParser, everything: bool = False) -> str:
    """The help of one method; `parser` holds the options of the command itself (--config, --dry-run ...)."""
    options = options_of(method.name)
    shown = argparse.ArgumentParser(
        prog=f"align {method.name}",
        usage=f"align {method.name} [--config FILE] [--KEY VALUE ...]",
        description=f"{method.help[0].upper()}{method.help[1:]}. Keys of the file and of the command line are the "
        "same; the command line wins, and a dotted key (--rewards.0.path X) reaches into nested values.",
        epilog=None if everything else f"`align {method.name} --help all` lists the {len(options)} options.",
        formatter_class=_Formatter,
        parents=[parser],
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    for group, title in TITLES.items():
        others = group in ("data", "model", "training")
        names = [name for name, record in options.items() if record["group"] == group]
        names = [name for name in names if everything or not others or name in COMMON]
        # TRL's names that take nothing but their default stand before the method's own, and would hide them
        names = [name for name in names if everything or not options[name]["help"].startswith(WITHOUT_EFFECT)]
        # the command line's --debug is the command's own; transformers' is for files
        names = [name for name in names if name != "debug"]
        if not names:
            continue
        section = shown.add_argument_group(title.format(config=method.config.partition(":")[2]))
        for name in names:
            section.add_argument(f"--{name}", metavar=options[name]["type"], help=_text(options[name]))
    return shown.format_help()


def _text(record: dict[str, Any]) -> str:
    default = record.get("default", "")
    text = record["help"] + (f" [{default}]" if default != "" else "")
    for kind, keys in record.get("keys", {}).items():
        text += f" {kind or 'keys'}{': ' if not kind else ' {'}{', '.join(keys)}{'}' if kind else ''};"
    return text.rstrip(";").replace("%", "%%")
