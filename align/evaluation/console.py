"""The headline numbers of a summary, on the terminal."""

from align.evaluation.report import number, percent

STYLES = {
    "over-optimised": "bold red",
    "collapsed": "bold red",
    "never helped": "bold red",
    "not over-optimised": "green",
}
TITLES = {"runs": ("Training runs", "trained on", "step"), "best_of_n": ("Best-of-n", "chosen by", "n")}

LOG_WIDTH = 120  # of a log file: rich takes 80 columns, in which names are cut in two


def print_summary(summary: dict, paths=()) -> None:
    """Print one table per kind of curve, then `paths`."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    for kind, (title, name_title, axis) in TITLES.items():
        if not summary[kind]:
            continue
        table = Table(
            title=f"{title}: gold score",
            title_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column(name_title, overflow="fold", min_width=12)
        for column in ("start", "peak", "end", f"at {axis}", "at KL", "lost"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for name, entry in summary[kind].items():
            peak = entry["peak"]
            if peak is None:
                table.add_row(escape(name), *["–"] * 6, "no gold reward")
                continue
            style = STYLES.get(peak["verdict"], "")
            table.add_row(
                escape(name),
                *(number(peak[place]["gold"]) for place in ("start", "peak", "end")),
                number(peak["peak"][axis]),
                number(peak["peak"]["kl"]),
                percent(peak["drop_share"]),
                f"[{style}]{peak['verdict']}[/]" if style else peak["verdict"],
            )
        console.print(table)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
