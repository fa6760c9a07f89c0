"""Which phase runs, how far it is, and how long is left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


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

    def left(self, fraction: float, phase: str) -> float:
        """Seconds left, when `fraction` of `phase` is done."""
        done = self.done + fraction * self.expected[phase]
        total = sum(self.expected.values()) - self.skipped
        elapsed = time.perf_counter() - self.start
        pace = elapsed / done if done > 0.05 * total else 1.0
        return max(total - done, 0.0) * pace

    def skip(self, phase: str) -> None:
        """The phase was finished in an earlier start."""
        self.skipped += self.expected[phase]
        self.console.print(f"[dim]{phase}: finished earlier, kept[/]")

    @contextmanager
    def phase(self, name: str) -> Iterator["PhaseHandle"]:
        began = time.perf_counter()
        task = self.bar.add_task(name, total=1.0, note=self._note(0.0, name))
        if self.bar.disable:
            number = list(self.expected).index(name) + 1
            self.console.print(f"[{number}/{len(self.expected)}] {name} ... ({self._note(0.0, name)})", markup=False)
        yield PhaseHandle(self, task, name)
        self.bar.update(task, completed=1.0, note="")
        self.done += self.expected[name]
        if self.bar.disable:
            self.console.print(f"      {name}: {time.perf_counter() - began:.0f} s")

    def _note(self, fraction: float, phase: str) -> str:
        left = self.left(fraction, phase)
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"


class PhaseHandle:
    """Reports the progress of one phase."""

    def __init__(self, progress: PhaseProgress, task, name: str):
        self.progress, self.task, self.name = progress, task, name

    def update(self, fraction: float) -> None:
        self.progress.bar.update(self.task, completed=fraction, note=self.progress._note(fraction, self.name))

    def callback(self, offset: float = 0.0, share: float = 1.0):
        """A transformers callback that reports a training run as the part [offset, offset + share] of the phase."""
        from transformers import TrainerCallback

        handle = self

        class Report(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                handle.update(offset + share * state.global_step / max(state.max_steps, 1))

        return Report()
