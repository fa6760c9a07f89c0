"""What the commands print: our own messages and others' warnings, each once, from the first process alone."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Messages on what one process alone has seen: they are shown from every process.
OF_ONE_PROCESS = ("align.reward_models.failures", "align.trainers.core.signals")
# Its one warning, on processors with bfloat16 instructions: compiled code of a hub was not loaded. Nothing misses it.
OF_NO_USE = ("bitsandbytes.backends.cpu.ops",)
LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Once(logging.Filter):
    """Lets a warning through the first time only."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.getMessage())
        if record.levelno != logging.WARNING or key not in self.seen:
            self.seen.add(key)
            return True
        return False


class AboveBars(logging.Handler):
    """Writes above the progress bars, where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if "tqdm" not in sys.modules:
            print(line, file=sys.stderr)
            return
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)


def set_up_logging() -> None:
    """Our own messages from INFO; progress bars on terminals only. To be called before other libraries are imported."""
    handler = AboveBars()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Once())
    logger = logging.getLogger("align")
    logger.setLevel(logging.INFO if main_process() else logging.ERROR)
    logger.handlers[:] = [handler]
    for name in () if main_process() else OF_ONE_PROCESS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in OF_NO_USE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not (main_process() and sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log file a bar is a line per redraw
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quieten_libraries() -> None:
    """Warnings of the libraries once each, from the first process; no bar for every saved and loaded set of weights
    (transformers draws one at each checkpoint)."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:  # the library's own, not what somebody else has attached
                show_once(handler)
        if not main_process():
            logger.setLevel(logging.ERROR)
    if logging.lastResort is not None:  # prints the warnings of libraries that have no handler of their own
        show_once(logging.lastResort)


def show_once(handler: logging.Handler) -> None:
    """A filter for each handler: what the first one has shown is new to the second."""
    if not any(isinstance(found, Once) for found in handler.filters):
        handler.addFilter(Once())


@contextmanager
def errors_only() -> Iterator[None]:
    """No message below an error, of any package."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Python's own warnings, also where a library resets the filters, which lets the same one through again."""
    seen: set[tuple[type[Warning], str]] = set()
    show = warnings.showwarning

    def show_once(message, category, filename, lineno, file=None, line=None):
        key = (category, str(message))
        if main_process() and key not in seen:
            seen.add(key)
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_once
    try:
        yield
    finally:
        warnings.showwarning = show
