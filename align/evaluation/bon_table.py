"""Best-of-n by rewards on a table of completions with a gold score."""

from dataclasses import dataclass, field
from pathlib import Path

from align.evaluation.best_of_n import bon_curve, joined_notes
from align.evaluation.pair_report import rank_correlation
from align.evaluation.score_table import read_score_table
from align.evaluation.scoring import score_table
from align.evaluation.summary import build_summary


@dataclass
class BonTable:
    """source: the table of completions. scored: where it is written with a column per reward. prompt, completion: its
    columns, as in `read_score_table`. min_answers: as in `bon_curve`. chat: as in `score_table`. names: of the rewards
    so far."""

    source: Path
    scored: Path
    gold: str
    prompt: str | None
    completion: str
    min_answers: int | None
    chat: bool = False
    names: list[str] = field(default_factory=list)

    def score(self, reward) -> None:
        """Add the scores of one more reward."""
        source = self.scored if self.names else self.source
        score_table(
            source,
            {reward.name: reward},
            self.scored,
            prompt=self.prompt,
            completion=self.completion,
            chat=self.chat,
        )
        self.names.append(reward.name)

    def describe(self, result: dict, seed: int) -> None:
        """Add `best_of_n`: the curve of each reward, and its rank correlation with gold."""
        table = read_score_table(
            self.scored, proxies=self.names, gold=self.gold, prompt=self.prompt, completion=self.completion
        )
        gold = table.by_prompt(self.gold)
        curves = {
            name: bon_curve(table.by_prompt(name), gold, min_answers=self.min_answers, name=name, gold_name=self.gold)
            for name in self.names
        }
        result["best_of_n"] = build_summary(best_of_n=curves, seed=seed)["best_of_n"]
        for name in self.names:
            result["best_of_n"][name]["rank_correlation"] = rank_correlation(table.by_prompt(name), gold, seed)
        result["notes"] += [f"{self.source}: {note}" for note in joined_notes(curves)]
        found = {"completions": str(self.source), "prompts of completions": len(table.rows), "gold": self.gold}
        result["setup"].update(found)
