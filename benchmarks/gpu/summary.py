"""The lines of gpu/check.py as a table for people."""


def table(lines: list[dict]) -> str:
    """Markdown: a row per stage, then a row per number of every part."""
    card = next((line["card"] for line in lines if line["card"] != "unknown"), "unknown")
    small = " (--small: its numbers say nothing about speed)" if lines[0]["small"] else ""
    rows = [f"# {card}{small}", "", "| stage | status | seconds | limit |", "|---|---|---|---|"]
    rows += [f"| {line['stage']} | {line['status']} | {line['seconds']} | {line['limit']} |" for line in lines]
    rows += ["", "| stage | part | number | value |", "|---|---|---|---|"]
    for line in lines:
        for part, found in line["result"].items():
            for name, value in flat(found):
                rows.append(f"| {line['stage']} | {part} | {name} | {cell(value)} |")
    return "\n".join(rows) + "\n"


def flat(found, under: str = ""):
    """(name, value) of every number, dictionaries opened; a comparison is one value: its median and range."""
    if not isinstance(found, dict):
        yield under, found
    elif {"median", "min", "max"} <= found.keys():
        yield under, f"{found['median']:g} ({found['min']:g} to {found['max']:g}, {len(found['each'])} measured)"
    else:
        for name, value in found.items():
            yield from flat(value, f"{under} {name}".strip())


def cell(value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())[:300].replace("|", "\\|")
