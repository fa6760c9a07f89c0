"""Token masks as pictures: the tokens of chosen and rejected completions, coloured by their weights.

The content of a picture is plain: {"masks": {NAME: {"max", "mean", "sparsity"}}, "pairs": [{"prompt", "chosen",
"rejected"}]}; either completion is {"tokens": [text], "masks": {NAME: [weight]}}. NAME is `m` where one mask weighs
both terms, else `m_u` (log-ratios) and `m_d` (KL).
"""

import json
from pathlib import Path

from align.errors import DataError

FILE_NAME, PAGE = "masks.json", "masks.html"
TEMPLATE = "masks.html.j2"
LABELS = {"m": "both terms", "m_u": "log-ratios", "m_d": "KL"}
FIGURE_TOKENS = 24


def picture(rows: list[dict], tokenizer, m_u=None, m_d=None) -> dict:
    """The content for B tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    m_u, m_d: weights [2B, L], left-aligned, B chosen and then B rejected; None for a term that is not masked.
    """
    same = m_u is m_d
    weights = {"m": m_u} if same else {name: m for name, m in (("m_u", m_u), ("m_d", m_d)) if m is not None}
    pairs = []
    for number, row in enumerate(rows):
        pair = {"prompt": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)}
        for side, row_index in (("chosen", number), ("rejected", len(rows) + number)):
            ids = row[f"{side}_ids"]
            masks = {name: m[row_index, : len(ids)].double().tolist() for name, m in weights.items()}
            pair[side] = {"tokens": pieces(tokenizer, ids), "masks": masks}
        pairs.append(pair)
    return {"masks": {name: _figures_of(name, pairs) for name in weights}, "pairs": pairs}


def _figures_of(name: str, pairs: list[dict]) -> dict[str, float]:
    values = [value for pair in pairs for side in ("chosen", "rejected") for value in pair[side]["masks"][name]]
    return {
        "max": max(values),
        "mean": sum(values) / len(values),
        "sparsity": sum(value == 0 for value in values) / len(values),
    }


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text. Of a character in several tokens, the last one shows it."""
    shown, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            shown.append("")
            continue
        shown.append(text[len(before) :])
        before = text
    return shown


def read_content(folder: str | Path) -> dict | None:
    """What a run left in masks.json; None for a run without masks."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["masks"], content["pairs"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of token masks: {error}") from error
    return content


def write_page(path: str | Path, content: dict, *, title: str, intro: str) -> Path:
    """One HTML file that holds everything it shows."""
    from align.evaluation.report import render_page

    return render_page(Path(path), TEMPLATE, title=title, intro=intro, content=content, labels=LABELS)


def tracker_rows(content: dict, step: int) -> tuple[list[str], list[list]]:
    """(columns, rows) of a table: one row per completion and mask, weights beside their tokens."""
    columns = ["step", "prompt", "completion", "mask", "mean", "zeros", "tokens and weights"]
    rows = []
    for pair in content["pairs"]:
        for side in ("chosen", "rejected"):
            for name, weights in pair[side]["masks"].items():
                mean, zeros = sum(weights) / len(weights), sum(w == 0 for w in weights) / len(weights)
                tokens = " | ".join(f"{t.strip()} {w:.2g}" for t, w in zip(pair[side]["tokens"], weights, strict=True))
                rows.append([step, pair["prompt"], side, name, mean, zeros, tokens])
    return columns, rows


def mask_figure(content: dict):
    """The first tokens of every completion as coloured cells, a row per completion and mask; a matplotlib figure."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from align.evaluation.plots import GOLD_COLOUR

    lines = [
        (f"{number} {side} {name}", pair[side]["tokens"], weights, content["masks"][name]["max"] or 1.0)
        for number, pair in enumerate(content["pairs"], start=1)
        for side in ("chosen", "rejected")
        for name, weights in pair[side]["masks"].items()
    ]
    width = min(max(len(tokens) for _, tokens, _, _ in lines), FIGURE_TOKENS)
    figure = Figure(figsize=(1.6 + 0.62 * width, 0.6 + 0.3 * len(lines)), layout="constrained")
    axis = figure.subplots()
    colours = LinearSegmentedColormap.from_list("mask", ["#ffffff", GOLD_COLOUR])
    for y, (_, tokens, weights, largest) in enumerate(lines):
        for x, (token, weight) in enumerate(zip(tokens[:width], weights, strict=False)):
            share = weight / largest
            axis.add_patch(_cell(x, y, colours(share)))
            text = token.strip()[:9].replace("$", r"\$")
            colour = "#aaaaaa" if weight == 0 else "white" if share > 0.6 else "black"
            axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6, color=colour)
    axis.set(xlim=(0, width), ylim=(len(lines), 0), xticks=[])
    axis.set_yticks([y + 0.5 for y in range(len(lines))], [label for label, *_ in lines], fontsize=7)
    largest = ", ".join(f"{name} {figures['max']:.2g}" for name, figures in content["masks"].items())
    axis.set_title(f"white: 0, dark: largest ({largest})", fontsize=8)
    return figure


def _cell(x: int, y: int, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 0.9, facecolor=colour, edgecolor="#dddddd", linewidth=0.5)
