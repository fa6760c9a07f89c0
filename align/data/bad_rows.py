"""Rows that cannot be trained on: found before training, reported by number, dropped only up to a stated share."""

import logging
import math
from dataclasses import dataclass, field

from align.errors import DataError

logger = logging.getLogger(__name__)

SHOWN = 5  # row numbers named per reason


class BadRow(Exception):
    """One row cannot be used. The message is the reason, the same text for every row with the same fault."""


@dataclass
class BadRows:
    """What was found wrong in a dataset. Row numbers count from 0 in the source.

    `reasons` are faults: the row is dropped, or the data refused. `notes` are rows that are kept although something
    was done to them that the user should know, such as a completion cut at the length limit. Each maps a text to the
    numbers of its rows; a row has at most one reason and any number of notes.
    """

    source: str = "dataset"
    total: int = 0
    reasons: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: int, reason: str) -> None:
        self.reasons.setdefault(reason, []).append(row)

    def note(self, row: int, text: str) -> None:
        self.notes.setdefault(text, []).append(row)

    @property
    def counts(self) -> dict[str, int]:
        """Bad rows per reason, most frequent first."""
        return {reason: len(rows) for reason, rows in sorted(self.reasons.items(), key=lambda item: -len(item[1]))}

    @property
    def bad(self) -> int:
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        return self.bad / self.total if self.total else 0.0

    def summary(self) -> str:
        """One line per reason and per note, with counts and the first row numbers."""
        head = f"{self.source}: {self.total - self.bad} of {self.total} rows can be used"
        lines = [head + (" (rows count from 0)" if self.reasons or self.notes else "")]
        lines += [f"  dropped: {_with_rows(reason, self.reasons[reason])}" for reason in self.counts]
        lines += [f"  kept:    {_with_rows(text, rows)}" for text, rows in self.notes.items()]
        return "\n".join(lines)

    def check(self, max_bad_share: float) -> None:
        """Log what was found; raise DataError if more than `max_bad_share` of the rows are bad, or no row is left."""
        if self.total == 0:
            raise DataError(f"{self.source} has no rows: nothing to train on.")
        if self.bad == self.total or self.share > max_bad_share:
            raise DataError(self.refusal(max_bad_share))
        if self.reasons or self.notes:
            logger.warning("%s", self.summary())

    def refusal(self, max_bad_share: float, of: int | None = None) -> str:
        """The sentence that refuses these rows. of: so many rows `max_bad_share` is a share of; default: all."""
        of = of or self.total
        found = "; ".join(_with_rows(reason, self.reasons[reason]) for reason in self.counts)
        message = f"{self.source}: {self.bad} of {self.total} rows cannot be used (rows count from 0): {found}. "
        if self.bad == self.total:
            return message + "No row is left: see docs/data.md for the columns and limits that a method expects."
        raise_limit = ", raise the length limit" if any("max_" in reason for reason in self.reasons) else ""
        enough = math.ceil(1e4 * self.bad / of) / 1e4
        return message + (
            f"max_bad_share={max_bad_share:g} allows {math.floor(max_bad_share * of)}. Fix or remove these "
            f"rows{raise_limit}, or drop them with max_bad_share={enough:g} or more."
        )


def _with_rows(text: str, rows: list[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:SHOWN])
    more = ", ..." if len(rows) > SHOWN else ""
    return f"{text}: {len(rows)} ({'row' if len(rows) == 1 else 'rows'} {shown}{more})"
