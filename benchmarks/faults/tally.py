"""The table of a campaign: what was tried, and how it ended."""

import sys
from collections import Counter
from dataclasses import dataclass, field

OUTCOMES = ("exact", "refused", "raised", "wrong")


@dataclass
class Tally:
    """Counts by area. exact: as if nothing had happened. refused: one sentence of an `AlignError`, or a damaged
    checkpoint that is passed over. raised: the own error of a user's function, with a note that names it. wrong: all
    else, with a description that is enough to make it again."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, area: str, outcome: str, what: str = "") -> None:
        self.counts[area, outcome] += 1
        if outcome == "wrong":
            self.faults.append(f"{area}: {what}")
            print(self.faults[-1], file=sys.stderr, flush=True)

    @classmethod
    def together(cls, tallies: "list[Tally]") -> "Tally":
        made = cls()
        for one in tallies:
            made.counts.update(one.counts)
            made.faults += one.faults
        return made

    def found(self) -> dict:
        """As the file of results holds it."""
        return {"tried": sum(self.counts.values()), "table": self.rows(), "faults": self.faults}

    @property
    def areas(self) -> list[str]:
        return list(dict.fromkeys(area for area, _ in self.counts))

    def tried(self, area: str) -> int:
        return sum(self.counts[area, outcome] for outcome in OUTCOMES)

    def rows(self) -> list[dict]:
        return [
            {"area": area, "tried": self.tried(area)} | {name: self.counts[area, name] for name in OUTCOMES}
            for area in self.areas
        ]

    def table(self) -> str:
        lines = [f"{'':36}{'tried':>8}{'exact':>8}{'refused':>9}{'raised':>8}{'wrong':>7}"]
        for row in self.rows():
            lines.append(
                f"{row['area']:36}{row['tried']:8}{row['exact']:8}{row['refused']:9}{row['raised']:8}{row['wrong']:7}"
            )
        return "\n".join(lines)
