"""The headline numbers of a summary, on the terminal."""

from align.evaluation.report import number, percent, percent_span

STYLES = {"over-optimised": "bold red", "collapsed": "bold red", "not over-optimised": "green"}
TITLES = {"runs": ("Training runs", "trained on", "step"), "best_of_n": ("Best-of-n", "chosen by", "n")}


def print_summary(summary: dict, paths=()) -> None:
    """Print one table per kind of curve, then `paths`."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for kind, (title, name_title, axis) in TITLES.items():
        if not summary[kind]:
            continue
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column(name_title)
        for column in ("gold at start", "at peak", "at end", f"{axis} at peak", "KL at peak", "drop, share of gain"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        for name, entry in summary[kind].items():
            peak = entry["peak"]
            if peak is None:
                table.add_row(name, *["–"] * 6, "no gold reward")
                continue
            interval = percent_span(peak["drop_share_low"], peak["drop_share_high"])
            share = percent(peak["drop_share"]) + (f"  ({interval})" if interval else "")
            style = STYLES.get(peak["verdict"], "")
            table.add_row(
                name,
                *(number(peak[place]["gold"]) for place in ("start", "peak", "end")),
                number(peak["peak"][axis]),
                number(peak["peak"]["kl"]),
                share,
                f"[{style}]{peak['verdict']}[/]" if style else peak["verdict"],
            )
        console.print(table)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
