"""Small controllers that hold a measured number at a target. Their state is saved and resumed with the run."""

from dataclasses import asdict, dataclass

from align.errors import ConfigError, TrainingError


@dataclass
class AdaptiveKL:
    """The KL coefficient that steers the KL to a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

        e = clip(KL / target - 1, +-clip),    beta <- beta * (1 + e * gain)

    value: beta, > 0. target: in the unit of what `update` is given: nats per sequence (6 in the paper) or per token;
    say which. gain: episodes / horizon there (horizon 10,000), a constant 0.1 in Moskovitz et al. 2023. clip: 0.2.
    """

    value: float
    target: float
    horizon: float = 10_000
    clip: float = 0.2
    gain: float | None = None

    def __post_init__(self):
        if not (self.value > 0 and self.target > 0 and self.horizon > 0):
            raise ConfigError(f"an adaptive KL coefficient needs value, target and horizon above 0: {self}")

    def update(self, kl: float, episodes: int) -> float:
        """Move beta by the measured KL of so many episodes; returns the new beta."""
        if kl != kl:
            raise TrainingError("the measured KL is not a number: the KL coefficient cannot follow it")
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        self.value *= 1 + error * self.share(episodes)
        return self.value

    def share(self, episodes: int) -> float:
        """What the error is multiplied by after so many episodes. ConfigError where that could take beta to 0 or below,
        which would reward the distance from the reference."""
        share = episodes / self.horizon if self.gain is None else self.gain
        if share * self.clip < 1:
            return share
        what = (
            f"kl_horizon is {self.horizon:g}, and a rollout has {episodes} episodes, so that"
            if self.gain is None
            else f"kl_gain is {self.gain:g}:"
        )
        usual = f"kl_horizon: {10 * episodes}, a gain of 0.1," if self.gain is None else "0.1"
        raise ConfigError(
            f"{what} beta could move by {share * self.clip:.0%} after one rollout, to 0 or below, where the distance "
            f"from the reference is rewarded: {usual} is usual",
            key="kl_horizon" if self.gain is None else "kl_gain",
        )

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]
