"""Rewards whose numbers a model computes, batch by batch, in every process or on some ranks of the run."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.data.batching import length_batches
from align.data.limits import known_tokens, longest_input
from align.distributed.shells import release
from align.errors import ConfigError
from align.modeling.rotary import choose_recorded
from align.modeling.score_head import reads_end_token
from align.modeling.types import Model
from align.reward_models.base import Reward, RewardBatch, RewardOutput, Steps
from align.reward_models.offload import OnDevice
from align.reward_models.placement import Asked, Placement
from align.reward_models.sequences import SequenceEncoder


@dataclass(frozen=True)
class Known:
    """Of a model: the tokens that it has embeddings for and takes at most (None: no limit), and whether its score is
    read at the end token."""

    tokens: int
    longest: int | None
    at_end_token: bool

    @classmethod
    def of(cls, models: Sequence[Model]) -> "Known":
        """Of the first one."""
        (model, *_) = models
        return cls(known_tokens(model), longest_input(model), reads_end_token(model.config))


class ModelReward(OnDevice, Reward):
    """Subclasses say what the model reads (`inputs`), how many tokens that is, and what it makes of a batch.

    model: on ranks that do not hold it, `Elsewhere`. placement: None where every process holds it.
    """

    model: Model
    encoder: SequenceEncoder
    placement: Placement | None
    batch_tokens: int
    batch_size: int | None = None

    @abstractmethod
    def inputs(self, batch: RewardBatch) -> list:
        """What the model reads, one entry per completion. Raises `RewardError` naming the row."""

    @abstractmethod
    def tokens(self, one: list | tuple) -> int:
        """Of one of the inputs."""

    @abstractmethod
    def forward(self, inputs: list) -> Tensor:
        """The model's numbers for one batch, [b] or [b, K]."""

    @abstractmethod
    def output(self, numbers: Tensor) -> RewardOutput:
        """From the numbers in the order of the completions, float64 on the CPU."""

    @property
    def placed(self) -> bool:
        return self.placement is not None

    @property
    def here(self) -> bool:
        """Whether this process holds the model."""
        return self.placement is None or self.placement.here

    def _load(self, load: Callable[[], list[Model]], ranks: Sequence[int] | None, given: bool) -> tuple[list, Known]:
        """The models of `load` where they belong, and what is known of them. given: whether one came loaded."""
        if given and ranks is not None:
            raise ConfigError(
                f"reward {self.name!r}: ranks says which processes load the model, and this one is loaded in each "
                "already: give its folder or hub name"
            )

        def ready() -> list[Model]:
            first, *others = load()
            for model in (first, *others):
                release(model)  # of the trainer that has trained it, which may have computed in 16 bits
            choose_recorded(first)
            for other in others:  # the reference of an implicit reward
                choose_recorded(other, like=first)
            return [first, *others]

        self.placement = Placement.of(self.name, ranks)
        if self.placement is not None:
            return self.placement.load(ready, Known.of)
        models = ready()
        return models, Known.of(models)

    def check_room(self, prompt: int, completion: int, *, conversational: bool) -> None:
        self.encoder.check_room(prompt, completion, conversational=conversational)

    def models(self) -> list[nn.Module]:
        return [self.model] if self.here else []

    def numbers(self, inputs: list) -> Tensor:
        """The model's numbers [B] or [B, K], float64 on the CPU, computed in this process."""
        if not inputs:
            return torch.empty(0, dtype=torch.float64)
        batches = self._batches(inputs)
        with self._ready():
            parts = [self.forward([inputs[row] for row in rows]) for rows in batches]
            found = torch.cat(parts).double().cpu()  # once: a GPU works on one while the next is put together
        return _in_order(found, batches)

    def steps_of_numbers(self, inputs: list, batch: RewardBatch) -> Steps[Tensor]:
        """The same, computed where the model is. The batches are those of a model that is here, so the numbers are."""
        placement, batches = self.placement, self._batches(inputs)
        if placement is None:
            yield
            yield
            found = self.numbers(inputs)
            yield
            yield
            return found
        asked = [
            Asked([inputs[row] for row in rows], len(rows) * self.tokens(inputs[rows[0]]), batch.row_names(rows))
            for rows in batches
        ]
        yield
        own = placement.ask(asked)
        yield
        computed = placement.compute(own, self.forward, self._ready)
        yield
        found = placement.answers(computed, len(asked))
        yield
        return _in_order(found, batches)

    def _score(self, batch: RewardBatch) -> RewardOutput:
        return self.output(self.numbers(self.inputs(batch)))

    def _steps(self, batch: RewardBatch) -> Steps[RewardOutput]:
        numbers = yield from self.steps_of_numbers(self.inputs(batch), batch)
        return self.output(numbers)

    def _batches(self, inputs: list) -> list[list[int]]:
        return length_batches(list(map(self.tokens, inputs)), self.batch_tokens, self.batch_size)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with self.working(), torch.no_grad():
                yield
        finally:
            self.model.train(training)


def _in_order(numbers: Tensor, batches: list[list[int]]) -> Tensor:
    """Numbers of one batch after the other, as their rows stand."""
    found = torch.empty_like(numbers)
    found[[row for rows in batches for row in rows]] = numbers
    return found
