"""Which phases run, how far they are, and how long is left."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class PhaseProgress:
    """One line per phase on a terminal, one line per start and end elsewhere.

    `expected` gives every phase's share of the work, in seconds on the machine it was measured on. What is left is the
    expected rest, scaled by how long the finished part took here.
    """

    def __init__(self, expected: dict[str, float], console: Console):
        self.expected = expected
        self.console = console
        self.start = time.perf_counter()
        self.done = 0.0  # expected seconds of the phases finished in this start
        self.skipped = 0.0
        self.began: dict[str, float] = {}
        self.fractions: dict[str, float] = {}  # done of the phases that run
        self.tasks: dict[str, TaskID] = {}
        self.bar = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *error):
        return self.bar.__exit__(*error)

    def left(self) -> float:
        """Seconds left."""
        done = self.done + sum(self.expected[name] * self.fractions[name] for name in self.fractions)
        total = sum(self.expected.values()) - self.skipped
        elapsed = time.perf_counter() - self.start
        pace = elapsed / done if done > 0.05 * total else 1.0
        return max(total - done, 0.0) * pace

    def skip(self, phase: str) -> None:
        """The phase was finished in an earlier start."""
        self.skipped += self.expected[phase]
        self.console.print(f"[dim]{phase}: finished earlier, kept[/]")

    def begin(self, phase: str) -> None:
        self.began[phase], self.fractions[phase] = time.perf_counter(), 0.0
        self.tasks[phase] = self.bar.add_task(phase, total=1.0, note=self._note())
        if self.bar.disable:
            number = list(self.expected).index(phase) + 1
            self.console.print(f"[{number}/{len(self.expected)}] {phase} ... ({self._note()})", markup=False)

    def update(self, phase: str, fraction: float) -> None:
        self.fractions[phase] = fraction
        self.bar.update(self.tasks[phase], completed=fraction, note=self._note())

    def end(self, phase: str) -> None:
        del self.fractions[phase]
        self.done += self.expected[phase]
        self.bar.update(self.tasks[phase], completed=1.0, note="")
        self.bar.stop_task(self.tasks[phase])
        if self.bar.disable:
            self.console.print(f"      {phase}: {time.perf_counter() - self.began[phase]:.0f} s")

    @contextmanager
    def phase(self, name: str) -> Iterator["PhaseHandle"]:
        self.begin(name)
        yield PhaseHandle(partial(self.update, name))
        self.end(name)

    def _note(self) -> str:
        left = self.left()
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"


class PhaseHandle:
    """Reports how far one phase is: `update` takes the fraction done."""

    def __init__(self, update: Callable[[float], None]):
        self.update = update

    def callback(self, share: float = 1.0):
        """A transformers callback that reports a training run as the first `share` of the phase."""
        from transformers import TrainerCallback

        handle = self

        class Report(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                handle.update(share * state.global_step / max(state.max_steps, 1))

        return Report()


def quieten() -> None:
    """One progress display instead of seven libraries' bars and notes. Before these libraries are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("align").setLevel(logging.WARNING)
