"""Do the intervals and verdicts of `align.evaluation.peak` hold what they state? Made-up curves whose truth is known.

    python benchmarks/peak_coverage.py [--trials 200] [--runs 60] [--out benchmarks/results/peak_coverage.json]

A world is a true curve of the gold score, a kind of noise, a number of evaluations and of prompts. In every trial
prompts and answers are drawn anew: a prompt has a level of its own, and a share of the curve's changes of its own, so
that its scores at different evaluations go together. Counted are, in percent of the trials:

    fall_low, fall_high    the true fall (highest to last evaluation) lies below, above the interval
    gain_low, gain_high    the true gain (first to highest) lies below, above the interval
    share                  the true share of the gain that was lost lies outside its interval
    fell                   the fall's lower end is above 0: false alarms where nothing fell, else power
    verdict_fell           a verdict of a fall
    trusted_late           of those called over-optimised: "trusted up to" lies after the true peak
    taken_as_given         the true fall lies outside the interval that takes the observed peak as given

An interval of 95 % should miss in at most 2.5 % on either side. Intervals exist where the highest evaluation is not the
last; a trial without one counts as a hit.

`stops` has, for runs of 100 evaluations whose gold score never falls, the share that `stop_at: gold_peak` would end.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from align.evaluation.fits import gao_bon, gao_rl
from align.evaluation.peak import FALLEN, analyse_peak

LOOKS = 100
PATIENCES = (1, 2, 3)


def plateau(x):
    return np.minimum(1, 3 * x)


CURVES = {
    "flat": lambda x: 0.3 + 0 * x,
    "rising": lambda x: 0.1 + 0.5 * np.sqrt(x),
    "plateau": lambda x: 0.1 + 0.4 * plateau(x),
    "falling": lambda x: 0.6 - 0.4 * x,
    "gao_rl": lambda x: 0.1 + 0.5 * gao_rl(2 * x, 0.95, 0.75),
    "gao_bon": lambda x: 0.1 + gao_bon(2 * x, 0.9, 0.36),
    "fall at the end": lambda x: 0.1 + 0.4 * plateau(x) - 0.15 * (x > 2 / 3),
    "last point": lambda x: 0.1 + 0.4 * plateau(x) - 0.15 * (x == 1),
}
NOISES = {  # of deviation 1
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(3, size=shape) / np.sqrt(3),
    "skew": lambda rng, shape: (np.exp(0.5) - rng.lognormal(size=shape)) / np.sqrt(np.e * (np.e - 1)),
}
SPREAD = 0.4  # deviation of a prompt's level, and of the noise of an answer


@dataclass
class World:
    """noise: one of NOISES, or bounded (0 or 1, by a chance that each prompt scales), rare (a 10th of that chance)."""

    curve: str
    noise: str
    evaluations: int
    prompts: int

    def truth(self) -> np.ndarray:
        curve = CURVES[self.curve](np.linspace(0, 1, self.evaluations))
        return curve / 10 if self.noise == "rare" else curve

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Gold scores [K, P] whose expectation over prompts is the truth."""
        truth, shape = self.truth()[:, None], (self.evaluations, self.prompts)
        if self.noise in ("bounded", "rare"):
            return (rng.random(shape) < truth * rng.uniform(0.5, 1.5, self.prompts)).astype(float)
        noise = NOISES[self.noise]
        own = rng.gamma(10, 0.1, self.prompts)  # mean 1: how strongly a prompt follows the curve
        return truth * own + SPREAD * (noise(rng, self.prompts) + noise(rng, shape))


WORLDS = [
    World("flat", "normal", 5, 50),
    World("flat", "normal", 60, 50),
    World("flat", "heavy", 20, 50),
    World("flat", "skew", 20, 50),
    World("flat", "bounded", 20, 100),
    World("flat", "rare", 20, 100),
    World("flat", "normal", 20, 20),
    World("flat", "normal", 20, 1000),
    World("rising", "normal", 20, 100),
    World("plateau", "normal", 20, 100),
    World("plateau", "bounded", 60, 200),
    World("plateau", "skew", 20, 50),
    World("gao_rl", "normal", 20, 100),
    World("gao_rl", "heavy", 20, 50),
    World("gao_rl", "skew", 20, 50),
    World("gao_rl", "bounded", 20, 200),
    World("gao_rl", "normal", 60, 1000),
    World("gao_bon", "normal", 7, 100),
    World("fall at the end", "normal", 20, 100),
    World("fall at the end", "normal", 60, 500),
    World("last point", "normal", 20, 100),
    World("falling", "bounded", 20, 200),
]


def proxy_of(world: World, rng: np.random.Generator) -> np.ndarray:
    """A proxy that rises all the way."""
    rise = np.linspace(0, 2, world.evaluations)[:, None]
    return rise + SPREAD * rng.normal(size=(world.evaluations, world.prompts))


def measure(world: World, trials: int) -> dict:
    truth = world.truth()
    fall, gain = truth.max() - truth[-1], truth.max() - truth[0]
    share = fall / gain if gain > 0 else np.inf
    misses: dict[str, list[bool]] = {}
    for trial in range(trials):
        rng = np.random.default_rng((trial, world.evaluations, world.prompts))
        gold = world.draw(rng)
        found = analyse_peak(proxy_of(world, rng), gold, seed=trial)
        low, high = found.drop_interval or (0.0, np.inf)
        gained = found.gain_interval or (0.0, np.inf)
        shares = found.drop_share_interval or (0.0, np.inf)
        falls = gold[found.peak] - gold[-1]
        given = 1.96 * falls.std(ddof=1) / np.sqrt(world.prompts)
        outcome = {
            "fall_low": low > fall + 1e-9,
            "fall_high": high < fall - 1e-9,
            "gain_low": gained[0] > gain + 1e-9,
            "gain_high": gained[1] < gain - 1e-9,
            "share": not shares[0] - 1e-9 <= share <= shares[1] + 1e-9,
            "fell": low > 0,
            "verdict_fell": found.verdict in FALLEN,
            "taken_as_given": abs(falls.mean() - fall) > given + 1e-9,
        }
        if found.trusted is not None and found.verdict == "over-optimised" and fall > 0:
            outcome["trusted_late"] = found.trusted > truth.argmax()
        for name, value in outcome.items():
            misses.setdefault(name, []).append(bool(value))
    return {
        **asdict(world),
        "true_fall": round(float(fall), 3),
        **{name: round(100 * float(np.mean(values)), 1) for name, values in misses.items()},
    }


def stopped(world: World, runs: int) -> dict:
    """Percent of runs that are ended within LOOKS evaluations, by patience, as `stop_at` decides."""
    ended = dict.fromkeys(PATIENCES, 0)
    for run in range(runs):
        rng = np.random.default_rng((run, 7))
        gold, proxy = world.draw(rng), proxy_of(world, rng)
        in_a_row, longest = 0, 0
        for end in range(2, world.evaluations + 1):
            in_a_row = in_a_row + 1 if analyse_peak(proxy[:end], gold[:end]).verdict in FALLEN else 0
            longest = max(longest, in_a_row)
            if longest == max(PATIENCES):
                break
        for patience in PATIENCES:
            ended[patience] += longest >= patience
    shares = {f"patience {patience}": round(100 * count / runs, 1) for patience, count in ended.items()}
    return {**asdict(world), **shares}


def table(result: dict) -> str:
    """The rows of docs/overoptimization.md."""
    rows = []
    for found in result["worlds"]:
        kind = f"{found['curve']}, {found['noise']} scores"
        size = f"{found['evaluations']} / {found['prompts']:,}"
        missed = (
            f"{found[low] + found[high]:.1f}" for low, high in (("fall_low", "fall_high"), ("gain_low", "gain_high"))
        )
        cells = [
            kind,
            size,
            f"{found['true_fall']:g}",
            *missed,
            f"{found['fell']:.1f}",
            f"{found['taken_as_given']:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


STOPS = [World("flat", "normal", LOOKS, 50)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict = {"python": platform.python_version(), "numpy": np.__version__}
    result |= {"trials": args.trials, "runs": args.runs, "worlds": [], "stops": []}
    for name, worlds, of_one, count in (
        ("worlds", WORLDS, measure, args.trials),
        ("stops", STOPS, stopped, args.runs),
    ):
        for world in worlds if count else []:
            result[name].append(of_one(world, count))
            print(result[name][-1], flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
