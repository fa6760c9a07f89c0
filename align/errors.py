"""The errors a user can act on. The command line prints them as one line and exits with 2."""


class AlignError(Exception):
    """An error that the user can fix: the message says what is wrong, where, and what to do."""


class ConfigError(AlignError, ValueError):
    """A configuration file or a command line that does not describe a run. key: the dotted path of the option at fault
    (`rewards.0.path`), where it is known, so that a reader of files can name the line."""

    def __init__(self, message: str, *, key: str | None = None):
        super().__init__(message)
        self.key = key


class DataError(AlignError, ValueError):
    """Rows that cannot be trained on, named by number."""


class RewardError(AlignError):
    """A reward that returned something that is not a score, named with the rows."""


class RolloutError(AlignError):
    """The rollout engine cannot generate, or does not hold the weights that it should."""


class TrainingError(AlignError):
    """A step that must not be taken: no trained token, a non-finite loss, a policy that is not its reference."""


def one_line(error: Exception) -> str:
    """The first line of an error of a library, with its kind where that says more."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {text}"
