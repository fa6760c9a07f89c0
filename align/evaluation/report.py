"""The report: one HTML file that holds everything it shows, readable offline. Its numbers are those of
`summary.json`."""

import logging
import math
import os
from pathlib import Path

from align.evaluation import interactive
from align.evaluation.masks import LABELS as MASK_LABELS
from align.evaluation.peak import MIN_PROMPTS
from align.evaluation.summary import write_summary

logger = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"
PLACES = {"start": "Before training", "peak": "At the gold peak", "end": "At the end"}
BADGES = {
    "over-optimised": "bad",
    "collapsed": "bad",
    "never helped": "bad",
    "not over-optimised": "good",
    "unclear": "unknown",
    "not optimised": "unknown",
    "too few prompts": "unknown",
    "too little data": "unknown",
}
GLOSSARY = (
    ("Proxy score", "the reward that is optimised, usually a learned model: right only near its data."),
    ("Gold score", "the reward that counts, never shown to the training; here it only judges."),
    ("KL", "how far a policy has moved from the initial policy, in nats per completion (sum over its tokens)."),
    ("d", "the square root of KL, in which scores bend smoothly."),
    (
        "Best-of-n",
        "draw n completions, keep the one with the highest proxy score. Its KL is ln n − (n−1)/n; where completions "
        "repeat or tie, the true KL is smaller. Scores are the unbiased estimate over all subsets of the drawn ones.",
    ),
    ("Ensemble", "several reward models as one: their mean, the worst of them, or mean − λ · variance."),
    ("SD of the initial policy", "one standard deviation of a score over the initial policy's completions: a unit that "
     "makes proxy and gold comparable."),
    ("Gold peak", "the evaluation with the highest mean gold score. Gain: from the start to the peak. Drop: from the "
     "peak to the end, also as a share of the gain."),
    ("Interval", "95 % bootstrap over prompts. Chance between training seeds is not in it."),
    ("α, β", "the two coefficients of a fitted form (Gao et al. 2022): the slope at the start, and how fast "
     "optimisation eats it. Their unit is SD of the initial gold score."),
    ("Best-of-n and training", "do not compare their KL: the two spend it very differently."),
)  # fmt: skip


def write_outputs(folder: str | Path, summary: dict, *, title: str, intro: str | list[str]) -> list[Path]:
    """Write `summary.json`, the figures (PNG and SVG) and `report.html` into one folder; returns report and summary."""
    folder = Path(folder)
    path = write_summary(folder, summary)
    return [write_report(folder / "report.html", title=title, intro=intro, summary=summary), path]


def write_report(path: str | Path, *, title: str, intro: str | list[str], summary: dict) -> Path:
    """Write the report of a summary (see `align.evaluation.summary.build_summary`), and its figures into `figures/`.

    intro: one or several paragraphs of plain text. Everything else that is shown is in the summary. Returns the path.
    """
    path = Path(path)
    save_figures(summary, path.parent / "figures")
    return render_page(
        path,
        TEMPLATE,
        title=title,
        intro=[intro] if isinstance(intro, str) else intro,
        s=summary,
        kinds={"runs": "step", "best_of_n": "n"},
        drawn={kind: _interactive(summary, kind) for kind in ("runs", "best_of_n")},
        own_form={"runs": "rl", "best_of_n": "bon"},
        form_names={"rl": "d(α − β ln d)", "bon": "d(α − β d)"},
        sentences={kind: {n: sentence(e, kind) for n, e in summary[kind].items()} for kind in ("runs", "best_of_n")},
        comparisons={kind: comparison(summary, kind) for kind in ("runs", "best_of_n")},
        notes={kind: _notes(summary[kind]) for kind in ("runs", "best_of_n")},
        samples={name: sample_grid(entry) for name, entry in summary["runs"].items()},
        bon_sizes=_bon_sizes(summary["best_of_n"]),
        model_columns=list(dict.fromkeys(key for model in summary["reward_models"] for key in model)),
        mask_labels=MASK_LABELS,
        badges=BADGES,
        places=PLACES,
        glossary=GLOSSARY,
    )


def page_text(template: str, **context) -> str:
    """A page as HTML; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("align.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=number, pct=percent, tenths=tenths, span=span, pct_span=percent_span, seconds=seconds, cell=cell, text=text
    )
    return environment.get_template(template).render(**context)


def render_page(path: Path, template: str, **context) -> Path:
    """Write one page that holds everything it shows."""
    html = page_text(template, **context)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    logger.info("report: %s", path)
    return path


def draw(figures: dict, folder: str | Path) -> None:
    """Save matplotlib figures by name as PNG and SVG."""
    from align.evaluation import plots

    for name, figure in figures.items():
        plots.save_figure(figure, Path(folder) / name)


def save_figures(summary: dict, folder: str | Path) -> None:
    """Draw the figures that the summary has curves for, and save each as PNG and SVG."""
    from align.evaluation import plots

    figures = {}
    for kind in ("runs", "best_of_n"):
        entries = {name: entry for name, entry in summary[kind].items() if len(entry["kl"]) > 1}
        if not entries:
            continue
        figures[f"{kind}_proxy_and_gold"] = plots.plot_proxy_and_gold(entries, kind)
        if kind == "runs":
            figures["runs_steps"] = plots.plot_steps(entries)
        with_gold = plots.with_gold(entries)
        if with_gold:
            figures[f"{kind}_gold"] = plots.plot_gold(with_gold, kind)
        fitted = {name: e for name, e in with_gold.items() if any(_fit(summary, kind, name, f) for f in ("bon", "rl"))}
        if fitted:
            figures[f"{kind}_fits"] = plots.plot_fits(fitted, summary["fits"][kind], kind)
    draw(figures, folder)


def _interactive(summary: dict, kind: str) -> dict[str, list[dict]]:
    """The figures of the page, by place."""
    entries = {name: entry for name, entry in summary[kind].items() if len(entry["kl"]) > 1}
    if not entries:
        return {"pairs": [], "gold": [], "steps": [], "fits": []}
    gold = interactive.all_gold(entries)
    return {
        "pairs": interactive.proxy_and_gold(entries),
        "gold": [gold] if len(gold["curves"]) > 1 else [],
        "steps": interactive.by_step(entries) if kind == "runs" else [],
        "fits": interactive.fits(entries, summary["fits"].get(kind, {})),
    }


def _fit(summary: dict, kind: str, name: str, form: str) -> dict | None:
    return summary["fits"].get(kind, {}).get(name, {}).get(form)


def sentence(entry: dict, kind: str) -> str:
    """What happened on one curve, in words."""
    peak = entry["peak"]
    if peak is None:
        return "No gold reward was scored, so over-optimisation cannot be seen."
    return f"{_happened(peak, kind)}{_trust(peak, kind)}"


def _place(point: dict, kind: str) -> str:
    return f"n = {point['n']}" if kind == "best_of_n" else f"step {point['step']}, KL {number(point['kl'])}"


def _happened(peak: dict, kind: str) -> str:
    start, top, end = peak["start"], peak["peak"], peak["end"]
    if top["index"] == end["index"]:
        return (
            f"The gold score rose from {number(start['gold'])} to {number(end['gold'])}, its highest value, at the end."
        )
    if peak["drop_share"] is None and peak["drop"] == 0:
        return f"The gold score is {number(end['gold'])} at the start and at the end, and was never higher."
    if peak["drop_share"] is None:
        return f"The gold score fell from the start, from {number(start['gold'])} to {number(end['gold'])}."
    change = peak["proxy_change"]
    return (
        f"The gold score rose from {number(start['gold'])} to its peak of {number(top['gold'])} ({_place(top, kind)}) "
        f"and ended at {number(end['gold'])}: {percent(peak['drop_share'])} of the gain lost. After the peak the proxy "
        f"score {'rose' if change >= 0 else 'fell'} by {number(abs(change))}."
    )


def _trust(peak: dict, kind: str) -> str:
    """Up to where the proxy can be trusted, or why that is not said."""
    verdict, trusted = peak["verdict"], peak.get("trusted")
    if verdict == "too few prompts":
        return f" Fewer than {MIN_PROMPTS} prompts: this says nothing; evaluate on more."
    if verdict == "not optimised":
        return " The proxy score did not rise by more than chance: nothing was optimised that could be judged."
    if verdict == "never helped":
        return " The proxy never helped: it cannot be trusted anywhere on this curve."
    if trusted is None or trusted["index"] == 0:
        return ""
    return (
        f" The proxy can be trusted up to {_place(trusted, kind)}{'' if verdict == 'over-optimised' else ' at least'}."
    )


def comparison(summary: dict, kind: str) -> list[str]:
    """The gold score at the end, against the first curve."""
    found = summary.get("comparisons", {}).get(kind) or {}
    lines = []
    for name, difference in found.get("end_gold_minus_base", {}).items():
        low, high, value = difference["low"], difference["high"], difference["value"]
        sure = low > 0 or high < 0
        lines.append(
            f"At the end, the gold score of {name} is {number(abs(value))} {'above' if value >= 0 else 'below'} that "
            f"of {found['base']} (difference {span(low, high)}{'' if sure else ': not told apart from 0'})."
        )
    for name, why in found.get("not_compared", {}).items():
        lines.append(f"The gold score of {name} is not compared with that of {found['base']}: {why}.")
    return lines


def sample_grid(entry: dict) -> dict:
    """The samples of a run by prompt: `places` (columns) and `rows` of {"prompt", "samples" (one per place, or
    None)}."""
    peak = entry["peak"]
    places = ["start", "end"] if peak is None or peak["peak"]["index"] == peak["end"]["index"] else list(PLACES)
    rows: dict[tuple, list] = {}
    for column, place in enumerate(places):
        seen: dict[str, int] = {}
        for sample in entry["samples"][place]:
            prompt = text(sample["prompt"])
            seen[prompt] = seen.get(prompt, 0) + 1
            rows.setdefault((prompt, seen[prompt]), [None] * len(places))[column] = sample
    return {"places": places, "rows": [{"prompt": prompt, "samples": row} for (prompt, _), row in rows.items()]}


def _notes(entries: dict[str, dict]) -> dict[str, list[str]]:
    """Each note once, with the curves that it is about."""
    notes: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for note in entry["notes"]:
            notes.setdefault(note, []).append(name)
    return notes


def _bon_sizes(entries: dict[str, dict]) -> dict[str, list[str]]:
    """How many prompts and answers, with the curves made of them."""
    sizes: dict[str, list[str]] = {}
    for name, entry in entries.items():
        answers = " to ".join(dict.fromkeys(number(count) for count in entry["answers"]))
        sizes.setdefault(f"{number(entry['prompts'])} prompts, {answers} answers each", []).append(name)
    return sizes


def number(value) -> str:
    """Three significant digits; integers as they are; a dash for a number that does not exist."""
    if value is None:
        return "–"
    if isinstance(value, int) or float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("-", "−")
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(value) -> str:
    return "–" if value is None else f"{100 * value:.0f} %".replace("-", "−")


def tenths(share: float | None) -> str:
    """A share in percent with one decimal."""
    return "–" if share is None else f"{100 * share:.1f} %".replace("-", "−")


def span(low, high) -> str:
    """An interval; an end that does not exist is unbounded; empty when there is none."""
    if low is None and high is None:
        return ""
    return f"{'−∞' if low is None else number(low)} … {'∞' if high is None else number(high)}"


def percent_span(low, high) -> str:
    if low is None and high is None:
        return ""
    return f"{'−∞' if low is None else percent(low)} … {'∞' if high is None else percent(high)}"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def text(value: str | list[dict]) -> str:
    """A prompt or a completion: text as it is, a single message's content, or "role: content" lines."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


def cell(value) -> str:
    """A value of a configuration or a table, as text."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
    return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
