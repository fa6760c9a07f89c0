"""reward_eval.json, reward_eval.html (one file, readable offline) and the headline table on the terminal."""

from pathlib import Path

from align.evaluation import interactive, plots, reward_plots
from align.evaluation.report import draw, number, percent, render_page, tenths
from align.evaluation.strict_json import write_json

JSON_NAME, PAGE_NAME, TEMPLATE = "reward_eval.json", "reward_eval.html", "reward_eval.html.j2"

RULES_OF_TIES = {1: "RewardBench (ties are lost)", 2: "RewardBench 2 (k answers that share the best score: 1/k)"}
GLOSSARY = (
    ("Accuracy", "share of pairs in which the chosen answer has the higher score; a tie counts half. RewardBench "
     "counts a tie as lost, and so do its sections here."),
    ("Interval", "95 % bootstrap over prompts (pairs of one prompt are drawn together)."),
    ("Margin", "score of the chosen minus score of the rejected answer."),
    ("The longer answer", "a baseline that always prefers the answer with more characters."),
    ("ECE", "expected calibration error: a margin m claims that the preferred answer is better with probability "
     "sigmoid(|m|); the mean distance, over ten bins, between that claim and how often it is right."),
    ("Best scale", "the factor on the margins that makes the labels most likely. A reward that is no probability (a "
     "rule, an ensemble's aggregate) can only be judged there; a dash means that no such factor exists."),
    ("Rewrite", "a change that keeps the meaning; both answers of a pair get the same one. Accuracies and flips are "
     "over the pairs that it changes."),
    ("Flips", "share of pairs that are ranked differently after the rewrite."),
    ("Shift", "mean size of the change of a score, in standard deviations of the reward's scores."),
    ("Disagreement", "variance over an ensemble's members of their margins, each member's divided by its root mean "
     "square. Warning: probability that a wrongly ranked pair has more of it than a right one; 0.5 is no warning."),
)  # fmt: skip


def write_reward_eval(folder: str | Path, result: dict) -> list[Path]:
    """Write the page, its figures (PNG and SVG) and the numbers into one folder; returns page and numbers."""
    folder = Path(folder)
    numbers = write_json(folder / JSON_NAME, result)
    draw(figures(result), folder / "figures")
    rewards = {name: entry for name, entry in result["rewards"].items() if "accuracy" in entry}
    page = render_page(
        folder / PAGE_NAME,
        TEMPLATE,
        r=result,
        rewards=rewards,
        drawn=drawn_on_page(result, rewards),
        worst={name: worst_rewrite(entry) for name, entry in result["rewards"].items()},
        sentences=sentences(result["comparisons"]),
        glossary=GLOSSARY,
    )
    return [page, numbers]


def figures(result: dict) -> dict:
    """The figures that the result has numbers for, by name."""
    drawn = {}
    if any("accuracy" in entry for entry in result["rewards"].values()):
        drawn["accuracy"] = reward_plots.plot_accuracy(result)
        drawn["scores"] = reward_plots.plot_scores(result)
        drawn["length"] = reward_plots.plot_length(result)
        drawn["calibration"] = reward_plots.plot_calibration(result)
    if any(rewrite["changed"] for rewrite in result["rewrites"].values()):
        drawn["rewrites"] = reward_plots.plot_rewrites(result)
    if any("disagreement" in entry for entry in result["agreement"].values()):
        drawn["disagreement"] = reward_plots.plot_disagreement(result)
    if result["best_of_n"]:
        drawn["best_of_n"] = plots.plot_proxy_and_gold(result["best_of_n"], "best_of_n")
    return drawn


def drawn_on_page(result: dict, rewards: dict[str, dict]) -> dict[str, list[dict]]:
    """The same as the page draws them."""
    drawn: dict[str, list[dict]] = {}
    if rewards:
        series = {**rewards, **result["baselines"]}
        rows = reward_plots.accuracy_rows(series)
        chance = reward_plots.by_chance(series)
        drawn["accuracy"] = [interactive.estimates(rows, list(series), x="accuracy", reference=chance)]
        drawn["scores"] = interactive.margins(rewards)
        drawn["length"] = [interactive.by_length(rewards, result["baselines"])]
        drawn["calibration"] = interactive.calibration(rewards)
        rows = reward_plots.rewrite_rows(result)
        if rows:
            drawn["rewrites"] = [interactive.estimates(rows, list(rewards), x="change of accuracy", reference=0.0)]
    if any("disagreement" in entry for entry in result["agreement"].values()):
        drawn["disagreement"] = [interactive.disagreement(result["agreement"])]
    if result["best_of_n"]:
        drawn["best_of_n"] = interactive.proxy_and_gold(result["best_of_n"])
    return drawn


def worst_rewrite(entry: dict) -> dict | None:
    """The rewrite that costs a reward the most accuracy: {"name", "change", "flips"}; None without rewrites."""
    found = {name: e for name, e in entry.get("rewrites", {}).items() if e["change"]["value"] is not None}
    if not found:
        return None
    name = min(found, key=lambda n: found[n]["change"]["value"])
    return {"name": name, "change": found[name]["change"]["value"], "flips": found[name]["flips"]["value"]}


def sentences(comparisons: dict) -> list[str]:
    """The differences in accuracy from the first reward, in words."""
    lines = []
    for name, found in comparisons.get("accuracy_minus_base", {}).items():
        value, low, high = found["value"], found["low"], found["high"]
        sure = low is not None and (low > 0 or high < 0)
        span = "" if low is None else f" (difference {tenths(low)} … {tenths(high)})"
        lines.append(
            f"{name} is right in {tenths(abs(value))} {'more' if value >= 0 else 'fewer'} of the pairs than "
            f"{comparisons['base']}{span}{'' if sure else ': not told apart'}."
        )
    return lines


def print_reward_eval(result: dict, paths=()) -> None:
    """One table per kind of data, then `paths`."""
    from rich.console import Console

    console = Console()
    rewards = {name: entry for name, entry in result["rewards"].items() if "accuracy" in entry}
    if rewards:
        console.print(_pairs_table(result, rewards))
    if any(entry["rewardbench"] for entry in rewards.values()):
        console.print(_rewardbench_table(rewards))
    if result["best_of_n"]:
        console.print(_best_of_n_table(result["best_of_n"]))
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _table(title: str, columns: list[str]):
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("reward", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _row(table, name: str, *cells: str) -> None:
    from rich.markup import escape

    table.add_row(escape(name), *(escape(cell) for cell in cells))


def _share(estimate: dict) -> str:
    """A share with its interval: "61.5 % (58–65)"."""
    if estimate["value"] is None or estimate["low"] is None:
        return tenths(estimate["value"])
    return f"{tenths(estimate['value'])} ({100 * estimate['low']:.0f}–{100 * estimate['high']:.0f})"


def _pairs_table(result: dict, rewards: dict):
    columns = ["accuracy (95 %)", "ties", "ECE", "longer"]
    rewritten = any(worst_rewrite(entry) for entry in rewards.values())
    table = _table(
        f"{result['setup']['pairs']:,} pairs", [*columns, *(["accuracy, worst rewrite"] if rewritten else [])]
    )
    for name, entry in rewards.items():
        worst = worst_rewrite(entry)
        cells = [
            _share(entry["accuracy"]),
            percent(entry["ties"]),
            number(entry["calibration"]["ece"]),
            percent(entry["length"]["prefers_longer"]),
        ]
        hurt = f"{tenths(worst['change'])}, {worst['name']}" if worst and worst["change"] < 0 else "unchanged"
        _row(table, name, *cells, *([hurt] if worst else []))
    for name, entry in result["baselines"].items():
        _row(table, name, _share(entry["accuracy"]), percent(entry["ties"]), *[""] * (len(table.columns) - 3))
    return table


def _rewardbench_table(rewards: dict):
    sections = next(iter(rewards.values()))["rewardbench"]["sections"]
    version = next(iter(rewards.values()))["rewardbench"]["version"]
    table = _table(RULES_OF_TIES[version], ["score", *sections])
    for name, entry in rewards.items():
        found = entry["rewardbench"]
        score = tenths(found["score"]["value"]) if found["score"] else "–"
        _row(table, name, score, *(tenths(found["sections"][section]["value"]) for section in sections))
    return table


def _best_of_n_table(entries: dict):
    table = _table("Best-of-n: gold score", ["n = 1", "peak", "at n", "largest n", "rank correlation with gold"])
    for name, entry in entries.items():
        peak = entry["peak"]
        golds = [number(peak[place]["gold"]) for place in ("start", "peak")]
        cells = [*golds, number(peak["peak"]["n"]), number(peak["end"]["gold"])]
        _row(table, name, *cells, number(entry["rank_correlation"]["value"]))
    return table
