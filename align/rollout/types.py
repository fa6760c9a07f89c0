"""What goes into a rollout engine and what comes out, the same for every back-end."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError

if TYPE_CHECKING:
    from align.rollout.probe import Probe

MAX_PENALTY = 10.0
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # vLLM silently raises smaller ones to 0.01 and refuses larger ones


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is completed. `temperature=0` is greedy decoding; then `n` must be 1.

    `top_p`, `top_k` and `min_p` truncate the sampling distribution, and the returned log-probs are those of the
    truncated one; 1, 0 and 0 are off. `min_p`, before the other two, leaves the tokens out whose probability is less
    than that share of the most likely one's. Before `min_tokens` tokens, no token that ends the completion
    can be drawn, which the log-probs show too. `repetition_penalty`, before the temperature and of greedy requests too,
    divides the positive logits of tokens that the prompt or the completion has already and multiplies the negative ones
    (CTRL, arXiv 1909.05858); 1 is off. `seed` fixes the draws of this request whatever else is in the call;
    the `n` samples differ all the same. A completion ends with the model's end tokens or one of `stop_token_ids`.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_tokens < 1 or self.n < 1:
            raise ConfigError(f"sampling needs max_tokens >= 1 and n >= 1, got {self.max_tokens} and {self.n}")
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise ConfigError(
                f"temperature must be 0 (greedy) or between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}, "
                f"got {self.temperature}"
            )
        if self.greedy and self.n != 1:
            raise ConfigError(f"greedy decoding (temperature 0) gives one completion; n={self.n} would repeat it")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p} (1 is off)")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0, got {self.top_k} (0 is off)")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be in [0, 1], got {self.min_p} (0 is off)")
        if not 0 < self.repetition_penalty <= MAX_PENALTY:
            raise ConfigError(
                f"repetition_penalty must be above 0 and at most {MAX_PENALTY:g} (1 is off), got "
                f"{self.repetition_penalty}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens must be in [0, max_tokens={self.max_tokens}], got {self.min_tokens}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether what was there before changes the distribution: log-probs are above or below the policy's."""
        return self.repetition_penalty != 1


@dataclass(slots=True)
class Episode:
    """What a completion of several turns is beside its tokens (`align.trainers.on_policy.episodes`).

    policy_mask: 1 on the tokens that the policy wrote, 0 on those of its environment. messages: the turns, from the
    first answer on. prompt: the row with what the environment added to its prompt. turns: the policy's answers. reward:
    the environment's, None where it has none; failure: why there is none. finished: whether the environment, or an
    answer without a tool call, ended it. calls, failed_calls: of tools. environment: its class, None with tools alone.
    played: the environment itself, for rewards; None once they have scored, so that it is in no checkpoint.
    """

    policy_mask: list[int]
    messages: list[dict]
    prompt: dict
    turns: int
    reward: float | None = None
    failure: str | None = None
    finished: bool = False
    calls: int = 0
    failed_calls: int = 0
    environment: str | None = None
    played: Any = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class Completion:
    """One completion: the token ids up to and including the token that ended it, and their log-probs.

    `logprobs[t]` is the natural log of the probability with which token t was drawn (after temperature, min-p,
    top-p and top-k); None for greedy requests. `finish_reason` is "stop" (ended by itself) or "length" (cut at
    max_tokens). `episode`: of a completion of several turns, which no engine makes by itself; the log-probs of the
    environment's tokens are 0. `drawn_by`: of one that was drawn in parts, the version of the weights and the number of
    tokens of each; None: all of them are of its rollout's version.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    episode: Episode | None = None
    drawn_by: list[tuple[int, int]] | None = None


# What is told, once per request, that its completions are there: (index of the request, completions).
OnDone = Callable[[int, list[Completion]], None]


@dataclass(slots=True)
class Rollout:
    """The completions of one prompt, and the version of the weights that made them (their first tokens, where they were
    drawn in parts)."""

    prompt_ids: list[int]
    completions: list[Completion]
    weight_version: int


@dataclass(slots=True)
class Request:
    """What a back-end gets: a checked prompt, its parameters, the seed of its first sample (sample j has seed + j; None
    for greedy) and every token id that ends it."""

    prompt_ids: list[int]
    params: SamplingParams
    seed: int | None
    stop_ids: tuple[int, ...]


@dataclass
class PushReport:
    """What a weight push cost, and the proof that it arrived.

    load_seconds, proof_seconds: parts of `seconds`. proved_tensors: how many tensors were compared bit by bit in the
    engine's own memory; None if the back-end cannot, and then `probe` has the differences of log-probs. arrived_share:
    of the adapters' change of the weights, how much is left in the engine's dtype; None without adapters.
    """

    weight_version: int
    seconds: float
    load_seconds: float
    proof_seconds: float
    proved_tensors: int | None
    arrived_share: float | None
    probe: "Probe | None" = None


def plain(value: Any) -> Any:
    """A record, or a list of records, as mappings of their fields, to be saved at once: nothing else is copied.

    `dataclasses.asdict` copies number by number: half a minute for a thousand completions of 16,000 tokens.
    """
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return [plain(item) for item in value]
    return value
