"""`log_completions`: what the policy writes while it trains, with its scores."""

from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from align.errors import ConfigError
from align.trainers.core.hooks import TrainingSettings
from align.trainers.on_policy.samples import Sample, as_text


@dataclass
class ShownCompletionsOptions(TrainingSettings):
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "At each log, print completions of the newest rollout with their scores, and send them to wandb."
        },
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "With log_completions: at most so many. Default: all of the main process."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_completions_to_print is not None and not self.log_completions:
            raise ConfigError(
                "num_completions_to_print: only with log_completions: true", key="num_completions_to_print"
            )


class ShownCompletions:
    """Samples of the newest rollout of this process, until they are shown. args: with `ShownCompletionsOptions`."""

    def __init__(self, args: Any):
        self.on, self.most = args.log_completions and args.process_index == 0, args.num_completions_to_print
        self.samples: list[Sample] = []

    def keep(self, samples: list[Sample]) -> None:
        if self.on:
            self.samples = samples[: self.most]

    def take(self, step: int) -> tuple[list[str], list[list]]:
        """Columns and rows of a table, which is printed too; no rows where nothing is new."""
        samples, self.samples = self.samples, []
        names = sorted({name for sample in samples for name in sample.rewards})
        said = sorted({name for sample in samples for name in sample.shown})
        rows = [
            [step, as_text(s.prompt["prompt"]), as_text(s.completion), s.score, _advantage(s)]
            + [s.rewards.get(name) for name in names]
            + [s.shown.get(name, "") for name in said]
            for s in samples
        ]
        columns = ["step", "prompt", "completion", "reward", "advantage", *(f"rewards/{name}" for name in names), *said]
        for row in rows:
            scores = [(name, value) for name, value in zip(columns[3:], row[3:], strict=True) if value is not None]
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in scores if isinstance(value, float))
            tqdm.write(f"---- step {step}  {numbers}\n{row[1]}\n>>>> {row[2]}")
        return columns, rows


def _advantage(sample: Sample) -> float | None:
    """Of the first token, summed over the streams; None where the loss has none."""
    return None if sample.advantages is None else float(sample.advantages[0].sum())
