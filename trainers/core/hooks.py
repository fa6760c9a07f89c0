"""What mix-ins are put in front of: transformers' `Trainer` and `TrainingArguments`.

Empty here. hooks.pyi beside this file tells the type checker what the classes have that come behind them.
"""


class TrainingSettings:
    """Base of a mix-in for a `TrainingArguments`."""


class TrainerHooks:
    """Base of a mix-in for a `Trainer`."""
