"""The page of `align front`: points and their prices, hypervolumes, in one HTML file."""

from pathlib import Path

from align.evaluation import interactive

TEMPLATE = "front.html.j2"


def write_page(path: str | Path, summary: dict) -> Path:
    """Write the page of a summary of `align.evaluation.front_scores.summarise`."""
    from align.evaluation.report import render_page

    return render_page(Path(path), TEMPLATE, s=summary, drawn=interactive.fronts(summary))
