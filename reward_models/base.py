"""The one interface of every reward: named scorers of completions."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from align.errors import RewardError
from align.reward_models.steps import STEPS, in_step

if TYPE_CHECKING:
    from align.reward_models.early import Early

T = TypeVar("T")
Steps = Generator[None, None, T]
"""What is computed in `STEPS` steps, which all ranks take together (`align.reward_models.steps`)."""

IMMUTABLE = frozenset({str, int, float, bool, bytes, type(None)})


@dataclass
class RewardBatch:
    """What a reward may look at. All lists have one entry per completion.

    prompts, completions: text, or lists of {"role", "content"} messages for conversational data.
    prompt_ids, completion_ids: the policy's token ids (the completion includes its end-of-sequence token if it ended).
    columns: every other column of the dataset, by name.
    rows: the numbers of the dataset's rows that the prompts come from, for errors.
    ended: whether each completion ended by itself (its last token is then the one that ended it) or was cut; None: as
    its last token says, where the policy's tokenizer is known.
    groups: in training, one number per prompt of the rollout; completions of the same prompt may be compared. None
    elsewhere, where completions that stand together need not be of one prompt.
    numbers: of a part of a batch, the places of its completions there, for errors.
    environments: what each completion was a conversation with, the objects themselves; None without.
    trainer_state: transformers' `TrainerState` in training, else None.
    """

    prompts: list
    completions: list
    prompt_ids: list[list[int]] | None = None
    completion_ids: list[list[int]] | None = None
    columns: dict[str, list] = field(default_factory=dict)
    rows: list[int] | None = None
    ended: list[bool] | None = None
    groups: list[int] | None = None
    numbers: list[int] | None = None
    environments: list | None = None
    trainer_state: Any = None

    def __len__(self) -> int:
        return len(self.completions)

    def row_name(self, index: int) -> str:
        """What an error calls the completion at `index`."""
        of_dataset = "" if self.rows is None else f" (row {self.rows[index]} of the dataset)"
        return f"row {self._numbered([index])[0]} of the batch{of_dataset}"

    def row_names(self, indices: Sequence[int]) -> str:
        """What an error calls several completions: the first ten."""
        more = " ..." if len(indices) > 10 else ""
        of_dataset = (
            "" if self.rows is None else f" ({[self.rows[index] for index in indices[:10]]}{more} of the dataset)"
        )
        return f"rows {self._numbered(indices[:10])}{more} of the batch{of_dataset}"

    def _numbered(self, indices: Sequence[int]) -> list[int]:
        return list(indices) if self.numbers is None else [self.numbers[index] for index in indices]

    def copied(self) -> "RewardBatch":
        """A copy with its own lists and messages, which a reward may change. Environments, which may hold connections,
        are no copies."""
        return replace(replace(self, environments=None)._each(own_copy), environments=self.environments)

    def select(self, indices: Sequence[int]) -> "RewardBatch":
        """The completions at `indices`, in that order."""

        def take(values: Any) -> Any:
            if isinstance(values, dict):
                return {name: take(column) for name, column in values.items()}
            return None if values is None else [values[index] for index in indices]

        return replace(self._each(take), numbers=self._numbered(indices))

    def take(self, part: "RewardBatch", indices: Sequence[int]) -> None:
        """Copies of completions for the prompts at `indices`, and of columns, some of which are known only with them
        (what an environment says of a conversation), in the place of what is there."""
        lists = [(getattr(self, name), getattr(part, name)) for name in ("completions", "completion_ids", "ended")]
        for own, given in [*lists, *((column, part.columns[name]) for name, column in self.columns.items())]:
            for index, value in zip(indices, given, strict=True) if own is not None else ():
                own[index] = own_copy(value)

    def _each(self, function: Callable[[Any], Any]) -> "RewardBatch":
        """The batch with `function` of all that there is per completion; `columns` is a mapping of such lists."""
        per_completion = [f.name for f in fields(self) if f.name != "trainer_state"]
        return replace(self, **{name: function(getattr(self, name)) for name in per_completion})


def joined(parts: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Lists by name, one after another where several parts have a name."""
    found: dict[str, list[float]] = {}
    for part in parts:
        for name, values in part.items():
            found.setdefault(name, []).extend(values)
    return found


def own_copy(value):
    """A copy down to numbers and text; lists of token ids, which are long, at once."""
    if isinstance(value, list):
        flat = IMMUTABLE.issuperset(map(type, value))
        return list(value) if flat else [own_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: own_copy(item) for key, item in value.items()}
    return value if type(value) in IMMUTABLE else copy.deepcopy(value)


@dataclass
class RewardOutput:
    """scores: float32 [B], one per completion. extras: further float32 [B] tensors by name, logged beside the score
    (an ensemble returns its members, its mean and its variance there).

    absent, failed: bool [B], completions that the reward does not apply to, and those that are to be left out because
    it failed; None where there are none. Their scores are NaN. metrics: numbers by name to log, their mean, under
    the reward's name; given: the same of a function of the user's, under the name that it chose (TRL's `log_metric`).
    columns: one text or number per completion, to be shown beside it.
    """

    scores: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    absent: torch.Tensor | None = None
    failed: torch.Tensor | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    given: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)

    @property
    def missing(self) -> torch.Tensor:
        """Completions without a score, bool [B]."""
        missing = torch.zeros(len(self.scores), dtype=torch.bool)
        for some in (self.absent, self.failed):
            missing = missing if some is None else missing | some
        return missing


class Reward(ABC):
    """A named scorer. Subclasses implement `_score`; callers use `score`, which refuses made-up numbers.

    partial_extras: whether an extra may be NaN, for a completion that a part of the reward has no score for.
    """

    name: str
    partial_extras = False

    @abstractmethod
    def _score(self, batch: RewardBatch) -> RewardOutput: ...

    def _steps(self, batch: RewardBatch) -> Steps[RewardOutput]:
        """`_score` in steps; a reward of several takes those of its parts."""
        yield
        yield
        output = self._score(batch) if len(batch) else RewardOutput(torch.empty(0))
        yield
        yield
        return output

    def parts(self) -> "Sequence[Reward]":
        """The rewards that it is made of."""
        return ()

    @property
    def placed(self) -> bool:
        """Whether a model of it is on some ranks of the run alone (`align.reward_models.placement`). Then all ranks
        score together, also one that has nothing to score, in the main thread."""
        return any(part.placed for part in self.parts())

    @property
    def may_log(self) -> bool:
        """Whether a function of it asks for `log_metric`, whose names are known when it is called alone."""
        return any(part.may_log for part in self.parts())

    def check_room(self, prompt: int, completion: int, *, conversational: bool) -> None:
        """Raises `ConfigError` where its models take less than a prompt of so many tokens of the policy's with a
        completion of so many."""
        for part in self.parts():
            part.check_room(prompt, completion, conversational=conversational)

    def offload(self) -> None:
        """From now on its models are on the device only while they score (`align.reward_models.offload`)."""
        for part in self.parts():
            part.offload()

    def score(self, batch: RewardBatch, *, partial: bool = False) -> RewardOutput:
        """Score a batch. Raises `RewardError` naming the reward and the rows on a wrong count or non-finite score, and,
        unless `partial`, on completions without a score (`RewardOutput.missing`)."""
        if self.placed:
            return in_step(self.steps(batch, partial=partial))
        return self.checked(self._score(batch.copied()), batch, partial=partial)

    def begin(self, batch: RewardBatch, *, user_code: bool) -> "Early | None":
        """Scores of a batch whose completions are still to come (`align.reward_models.early`); None for a reward that
        scores whole batches alone. user_code: whether functions of users may be called meanwhile."""
        return None

    def steps(self, batch: RewardBatch, *, partial: bool = False) -> Steps[RewardOutput]:
        """`score` in steps. An empty batch has no scores, and nothing is asked but of other ranks."""
        return self.checked((yield from self._steps(batch.copied())), batch, partial=partial)

    def checked(self, output: RewardOutput, batch: RewardBatch, *, partial: bool) -> RewardOutput:
        """The output, unless something is wrong with it that `score` raises."""
        columns = {"score": output.scores, **output.extras}
        for name, values in columns.items():
            if values.shape != (len(batch),):
                raise RewardError(
                    f"reward {self.name!r} returned {name} of shape {tuple(values.shape)} for {len(batch)} completions"
                )
        missing = output.missing
        if missing.any() and not partial:
            indices = torch.nonzero(missing).flatten().tolist()
            raise RewardError(
                f"reward {self.name!r} has no score for {batch.row_names(indices)}: it "
                f"{'does not apply there (None)' if output.failed is None else 'failed there'}, and here every "
                "completion needs one"
            )
        for name, values in columns.items():
            may = missing | values.isnan() if self.partial_extras and values is not output.scores else missing
            bad = torch.nonzero(~torch.isfinite(values) & ~may).flatten().tolist()
            if bad:
                raise RewardError(
                    f"reward {self.name!r} returned a non-finite {name} ({values[bad[0]].item()}) for "
                    f"{batch.row_names(bad)}; first such completion: {str(batch.completions[bad[0]])[:200]!r}"
                )
        return output


def within(rewards: Iterable[Reward]) -> Iterator[Reward]:
    """The rewards, and those that they are made of, at any depth."""
    for reward in rewards:
        yield reward
        yield from within(reward.parts())


def score_together(rewards: Sequence[Reward], batch: RewardBatch, *, partial: bool = False) -> list[RewardOutput]:
    """The scores of several rewards. Models that lie on different ranks score at the same time."""
    if any(reward.placed for reward in rewards):
        return in_step(together(rewards, batch, partial=partial))
    if not len(batch):
        return [RewardOutput(torch.empty(0)) for _ in rewards]
    return [reward.score(batch, partial=partial) for reward in rewards]


def together(rewards: Sequence[Reward], batch: RewardBatch, *, partial: bool = False) -> Steps[list[RewardOutput]]:
    """`score_together` in steps, each taken by every reward before the next one."""
    under_way = [reward.steps(batch, partial=partial) for reward in rewards]
    for _ in range(STEPS - 1):
        for one in under_way:
            next(one)
        yield
    return [ended(one) for one in under_way]


def ended(steps: Steps[T]) -> T:
    """What comes of the last step."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise AssertionError(f"more than {STEPS} steps")
