"""Scoring that begins before a batch is whole: what a reward can ask about the completions that there are, it asks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from align.overrides import says
from align.reward_models.base import Reward, RewardBatch, RewardOutput, Steps, score_together
from align.reward_models.beside import Flight, stopping

Work = Callable[[int, Sequence[int]], Sequence[Callable[[], object]]]


class Early(ABC):
    """The scores of a batch whose prompts are known, and whose completions come one by one.

    What is asked, and about which completions at a time, follows from the batch alone, not from when they came: the
    scores are those of `Reward.score`.

    batch: the reward's own, which it may change.
    """

    def __init__(self, batch: RewardBatch):
        self.batch = batch

    def take(self, part: RewardBatch, indices: Sequence[int]) -> None:
        """The completions at `indices` have come. Called by one thread at a time, once about each. It begins work, and
        neither waits nor raises what comes of it."""
        self.batch.take(part, indices)
        self.ready(indices)

    @abstractmethod
    def ready(self, indices: Sequence[int]) -> None:
        """They are in `batch`."""

    @abstractmethod
    def output(self) -> RewardOutput:
        """When all have come; waits for what is under way, and raises what `Reward._score` does."""

    @abstractmethod
    def stop(self, *, wait: bool = True) -> None:
        """Give up what is not done. wait: for calls in threads, which cannot be ended."""


class EarlyPieces(Early):
    """Scores in pieces, each begun when its last completion comes.

    pieces: indices. work: from the number and the indices of a piece to what is to be done beside this thread, whose
    places in the flight are (number, 0), (number, 1) ... join: scores from the flight of all.
    """

    def __init__(
        self,
        batch: RewardBatch,
        pieces: Sequence[Sequence[int]],
        flight: Flight,
        work: Work,
        join: Callable[[Flight], RewardOutput],
    ):
        super().__init__(batch)
        self.pieces, self.flight, self.work, self.join = pieces, flight, work, join
        self.piece_of = {index: number for number, piece in enumerate(pieces) for index in piece}
        self.missing = [len(piece) for piece in pieces]

    def ready(self, indices: Sequence[int]) -> None:
        for index in indices:
            number = self.piece_of[index]
            self.missing[number] -= 1
            if self.missing[number]:
                continue
            try:
                for place, work in enumerate(self.work(number, self.pieces[number])):
                    self.flight.begin((number, place), work)
            except Exception as error:  # raised by `output`, in the thread that waits
                self.flight.fail((number, -1), error)

    def output(self) -> RewardOutput:
        return self.join(self.flight)

    def stop(self, *, wait: bool = True) -> None:
        self.flight.stop(wait=wait)


class Begun(Reward):
    """A reward whose scores of a batch are under way, beside others that score it. Where one of these is placed, what
    it raises is raised in all ranks."""

    def __init__(self, reward: Reward, early: Early):
        self.reward, self.early = reward, early

    def score(self, batch: RewardBatch, *, partial: bool = False) -> RewardOutput:
        return self.reward.checked(self.early.output(), batch, partial=partial)

    def steps(self, batch: RewardBatch, *, partial: bool = False) -> Steps[RewardOutput]:
        yield
        yield
        output = self.score(batch, partial=partial)
        yield
        yield
        return output

    def _score(self, batch: RewardBatch) -> RewardOutput:
        return self.early.output()


class EarlyRewards:
    """Several rewards of one batch, of which those score early that can.

    Args:
        batch: with all prompts. user_code: whether functions of users may be called before it is whole.
    """

    def __init__(self, rewards: Sequence[Reward], batch: RewardBatch, *, user_code: bool, partial: bool):
        self.rewards, self.partial = rewards, partial
        self.begun: dict[int, Early] = {}
        for number, reward in enumerate(rewards):
            early = reward.begin(batch, user_code=user_code) if knows(reward) else None
            if early is not None:
                self.begun[number] = early

    def take(self, part: RewardBatch, indices: Sequence[int]) -> None:
        for early in self.begun.values():
            early.take(part, indices)

    def outputs(self, batch: RewardBatch) -> list[RewardOutput]:
        """Of each reward. batch: whole. Those that could not begin score now, while others may still be waited for."""
        late = [number for number in range(len(self.rewards)) if number not in self.begun]
        order = [*late, *self.begun]
        under_way = [self.rewards[n] if n in late else Begun(self.rewards[n], self.begun[n]) for n in order]
        found = dict(zip(order, score_together(under_way, batch, partial=self.partial), strict=True))
        return [found[number] for number in range(len(self.rewards))]

    def stop(self, *, wait: bool = True) -> None:
        for early in self.begun.values():
            early.stop(wait=wait)


def knows(reward: Reward) -> bool:
    """Whether its `begin` is of the class that says how it scores. A subclass that scores in another way, and has no
    `begin` of its own, is asked for whole batches."""
    return says(reward, "begin", ("_score", "score"))


class EarlyParts(Early):
    """The scores of a reward that is made of others. combine: from the outputs of its parts to its own."""

    def __init__(
        self, batch: RewardBatch, parts: EarlyRewards, combine: Callable[[Sequence[RewardOutput]], RewardOutput]
    ):
        super().__init__(batch)
        self.parts, self.combine = parts, combine

    def ready(self, indices: Sequence[int]) -> None:
        self.parts.take(self.batch.select(indices), indices)

    def output(self) -> RewardOutput:
        return self.combine(self.parts.outputs(self.batch))

    def stop(self, *, wait: bool = True) -> None:
        self.parts.stop(wait=wait)


def begin_parts(
    reward: Reward,
    batch: RewardBatch,
    combine: Callable[[Sequence[RewardOutput]], RewardOutput],
    *,
    user_code: bool,
    partial: bool,
) -> Early | None:
    """`Reward.begin` of a reward that is made of others; None where none of them can begin."""
    if reward.placed:
        return None
    own = batch.copied()
    parts = EarlyRewards(reward.parts(), own, user_code=user_code, partial=partial)
    return EarlyParts(own, parts, combine) if parts.begun else None


def at_once(early: Early) -> RewardOutput:
    """The scores of a batch that is whole."""
    with stopping(early):
        early.ready(range(len(early.batch)))
        return early.output()
