"""What goes into a rollout engine and what comes out, the same for every back-end."""

from dataclasses import dataclass, field

from align.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is completed. `temperature=0` is greedy decoding; then `n` must be 1.

    `top_p` and `top_k` truncate the sampling distribution, so the returned log-probs are those of the truncated
    distribution: leave them off (1.0 and 0) for training.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_tokens < 1 or self.n < 1:
            raise ConfigError(f"sampling needs max_tokens >= 1 and n >= 1, got {self.max_tokens} and {self.n}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if self.greedy and self.n != 1:
            raise ConfigError(f"greedy decoding (temperature 0) gives one completion; n={self.n} would repeat it")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass
class Completion:
    """One completion: the token ids up to and including the end-of-sequence token, and their log-probs.

    `logprobs[t]` is the natural log of the probability with which token t was drawn (after temperature, top-p and
    top-k); None for greedy requests. `finish_reason` is "stop" (ended by itself) or "length" (cut at max_tokens).
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


@dataclass
class Rollout:
    """The completions of one prompt, and the version of the weights that made them."""

    prompt_ids: list[int]
    completions: list[Completion]
    weight_version: int


@dataclass
class PushReport:
    """What a weight push cost and the proof that it arrived."""

    weight_version: int
    seconds: float
    probe_max_abs_diff: float
    details: dict = field(default_factory=dict)
