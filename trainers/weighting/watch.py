"""Notices constraints that are not going to be met."""

from align.objectives.multipliers import Multipliers

AT_LIMIT = 25  # updates in a row with the multiplier at its limit
ONE_SIDED = 200  # updates in a row on the wrong side, the multiplier still moving


class ConstraintWatch:
    """Counts, per constraint, the updates in a row that it was violated on one side, and those of them in which its
    multiplier could push no further. Reports when there are many, and again when there are twice as many."""

    def __init__(self, count: int):
        self.violated, self.at_limit = [0] * count, [0] * count

    def observe(self, multipliers: Multipliers, values: dict[str, float]) -> list[str]:
        """What there is to say after an update of the multipliers by these values."""
        messages = []
        for i, constraint in enumerate(multipliers.constraints):
            slack = constraint.slack(values[constraint.reward])
            side = (slack > 0) - (slack < 0) if constraint.direction == "equal" else -int(slack < 0)
            same = side != 0 and side * self.violated[i] >= 0  # the sign of a count is its side
            self.violated[i] = self.violated[i] + side if same else side
            stuck = side != 0 and multipliers.at_limit(i, upper=side < 0)
            self.at_limit[i] = self.at_limit[i] + 1 if stuck and same else int(stuck)
            what = (
                f"{constraint.reward} {constraint.direction} {constraint.threshold:g} was violated in each of the last "
                f"{{}} updates (now {values[constraint.reward]:.4g}; raw multiplier {multipliers.raw[i].item():.3g}, "
                f"weights {multipliers.describe_weights()})"
            )
            if _due(self.at_limit[i], AT_LIMIT):
                messages.append(
                    f"{what.format(self.at_limit[i])} with its multiplier at its limit: the threshold cannot be "
                    "reached, or not together with the others and the KL. Choose thresholds that were seen together "
                    "(align proxy-points), lower beta, or train longer if the value still moves"
                )
            elif _due(abs(self.violated[i]), ONE_SIDED) and not stuck:
                messages.append(
                    f"{what.format(abs(self.violated[i]))} and its multiplier still moves: raise "
                    "multipliers.learning_rate if this is too slow"
                )
        return messages

    def state_dict(self) -> dict:
        return {"violated": list(self.violated), "at_limit": list(self.at_limit)}

    def load_state_dict(self, state: dict) -> None:
        self.violated, self.at_limit = state["violated"], state["at_limit"]


def _due(count: int, patience: int) -> bool:
    """At patience, twice patience, four times ..."""
    times, rest = divmod(count, patience)
    return times > 0 and rest == 0 and times & (times - 1) == 0
