"""What mix-ins are put in front of: transformers' `Trainer` and `TrainingArguments`.

Here they only answer arguments and methods that would have no effect, before anything else is looked at. hooks.pyi
beside this file tells the type checker what the classes have that come behind them.
"""

from importlib.metadata import version

from align.config.arguments import init_fields
from align.config.names import check_arguments
from align.config.types import check_types
from align.errors import ConfigError

OVERRIDDEN = (
    "_clip_grad_norm",
    "_determine_best_metric",
    "_finish_current_push",
    "_get_train_sampler",
    "_issue_warnings_after_load",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_prepare_input",
    "_report_to_hp_search",
    "_save",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "_track_num_input_tokens",
)
"""Private methods of transformers' `Trainer` that ours take the place of. One that had another name in a version of
transformers would never be called, and nothing would say so."""


NEVER_CALLED = (
    # older releases'
    "build_tokenized_answer",
    "concatenated_forward",
    "dpo_loss",
    "get_batch_loss_metrics",
    "get_batch_logps",
    "tokenize_row",
    # the tested release's
    "_calculate_rewards",
    "_compute_loss",
    "_generate",
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies",
    "_get_tool_suffix_ids",
    "_log_completion_extra",
    "_log_metric",
    "_precompute_ref_logps",
    "_prepare_dataset",
    "_tokenize_prompts",
    "_tool_call_loop",
    "compute_ref_log_probs",
    "get_gamma_weights",
    "get_high_entropy_mask",
    "get_off_policy_mask",
)
"""Methods of TRL's trainers that their subclasses override, and that nothing here would call."""


def check_methods(trainer: type) -> None:
    """ConfigError for a class with a method of `NEVER_CALLED` that none of its bases has."""
    bases = trainer.__mro__[1:]
    for name in NEVER_CALLED:
        if name in vars(trainer) and not any(name in vars(base) for base in bases):
            raise ConfigError(
                f"{trainer.__name__}.{name}: TRL's trainers call a method of this name, and those of align do not: it "
                "would have no effect. What to write instead: docs/coming_from_trl.md, Subclasses. If it is yours "
                "alone, give it another name"
            )


def check_overridden(base: type) -> None:
    """Raises `ConfigError` where a method of `OVERRIDDEN` is none of transformers' `Trainer` (base)."""
    if gone := [name for name in OVERRIDDEN if not hasattr(base, name)]:
        raise ConfigError(
            f"transformers {version('transformers')} has no Trainer.{gone[0]}, in whose place align does a part of its "
            "training: install a version that it was tested with (`align doctor` names it)"
        )


class TrainingSettings:
    """Base of a mix-in for a `TrainingArguments`."""

    def __new__(cls, *values, **given):
        check_arguments(cls, given)
        check_types(cls, {**dict(zip(init_fields(cls), values, strict=False)), **given})
        return super().__new__(cls)


class TrainerHooks:
    """Base of a mix-in for a `Trainer`."""

    config_class = None

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        check_methods(cls)

    def __new__(cls, *args, **given):
        check_arguments(cls, given, cls.config_class, positional=len(args))
        return super().__new__(cls)
