"""What a constrained run maximises: its task's reward, not the sum with the rewards that are held at a threshold.

The proxy of a run's evaluation file is the weighted sum of all rewards, also of those that constraints hold: a reply
that grows in length while a constraint holds the length would seem to earn more.
"""

from collections.abc import Iterable
from dataclasses import replace

from align.errors import DataError
from align.evaluation.records import Run


def held_rewards(run: Run) -> list[str]:
    """Names of the rewards that constraints hold; none in a run without."""
    constraints = run.config.get("constraints")
    if not isinstance(constraints, Iterable) or isinstance(constraints, str):
        return []
    return list(dict.fromkeys(c["reward"] for c in constraints if isinstance(c, dict) and "reward" in c))


def task_rewards(run: Run) -> dict[str, float] | None:
    """Weight of each reward of the task of a constrained run, empty where the task is the KL alone; None for a run
    without constraints, or one whose file lacks the rewards. DataError where evaluations, or weights, are of different
    rewards."""
    held = held_rewards(run)
    names = [key.removeprefix("rewards/") for key in run.per_prompt if key.startswith("rewards/")]
    # The file lists rewards by name, weights are in the order of the settings: the order of the first record is that.
    order = [key.removeprefix("rewards/") for key in run.reward_order] or names
    if not held or not order:
        return None
    wanted = run.config.get("task_rewards")
    weights = run.config.get("reward_weights")
    lost = [name for name in order if name not in names]
    if lost:
        raise DataError(f"{run.path}: not every evaluation has the scores of the reward {lost[0]!r} of the first")
    if isinstance(weights, list) and len(weights) != len(order):
        raise DataError(f"{run.path}: {len(weights)} reward_weights for {len(order)} rewards ({', '.join(order)})")
    by_name = dict(zip(order, weights, strict=True)) if isinstance(weights, list) else dict.fromkeys(order, 1.0)
    return {name: by_name[name] for name in order if (name in wanted if wanted is not None else name not in held)}


def of_the_task(run: Run) -> Run:
    """The run with the task's reward as its proxy; unchanged without constraints, or where the task is the KL alone."""
    task = task_rewards(run)
    if not task:
        return run
    columns = [weight * run.per_prompt[f"rewards/{name}"] for name, weight in task.items()]
    proxy = sum(columns[1:], columns[0])
    name = " + ".join(n if weight == 1 else f"{weight:g} {n}" for n, weight in task.items())
    return replace(run, proxy=proxy.mean(1), proxy_name=name, per_prompt={**run.per_prompt, "proxy": proxy})


def task_note(run: Run) -> str | None:
    """What a report says of a constrained run's proxy."""
    held, task = held_rewards(run), task_rewards(run)
    if task is None:
        return None
    names = ", ".join(held)
    if not task:
        return f"the task of this constrained run is the KL alone; its proxy is the sum of {names}, which are held"
    return f"constrained: the proxy is the reward of the task ({run.proxy_name}), without {names}, which are held"
