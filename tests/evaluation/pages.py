"""Every page of the library, made of small examples."""

import json
import random
import re
import shutil
from pathlib import Path

from datasets import Dataset

from align.cli.main import main
from align.data import toy
from align.evaluation import data_report, front_page, masks, runs_report
from align.evaluation.metrics_file import MetricsWriter
from align.evaluation.report import page_text
from align.evaluation.watch import snapshot
from tests.evaluation.synthetic import write_run

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("overopt", "bon", "reward_eval", "reward_bon", "compare", "data", "masks", "runs", "watch", "front")
WORDS = [*toy.POLITE, *toy.FILLER, *toy.TOPIC_OF]


def write_pages(folder: Path) -> list[str]:
    """Write NAME.html of all `NAMES` into a folder; returns their file names."""
    made = folder / "made"
    rewards = [f"{EXAMPLES / 'pair_rewards.py'}:{name}" for name in ("length", "right_sum")]
    runs = [str(EXAMPLES / "evaluations" / name) for name in ("single", "ensemble")]
    scores = str(EXAMPLES / "bon_scores.csv")
    commands = {
        "overopt/report": ["overoptimization", *runs, "--names", "a<img src=x onerror=x()>", "b"],
        "bon/report": ["bon", scores, "--proxy", "rm0", "--proxy", "rm1", "--ensemble", "wco"],
        "reward_eval/reward_eval": ["reward-eval", *rewards, "--data", str(EXAMPLES / "pairs.jsonl")],
        "reward_bon/reward_eval": [
            "reward-eval", f"{EXAMPLES / 'bon_rewards.py'}:word_count", "--completions", scores,
        ],
        "compare/compare": ["compare", *_answers(folder), "--rewards", *rewards],
    }  # fmt: skip
    for name, command in commands.items():
        out = made / name.split("/")[0]
        assert main([*command, "--output_dir", str(out)]) == 0
        shutil.copy(made / f"{name}.html", folder / f"{name.split('/')[0]}.html")
    data_report.write_page(folder / "data.html", data_report.data_report(
        _pairs(60), toy.tokenizer(), use="pairs", limits=[8, 16, 32]) | {"source": "pairs.jsonl"})  # fmt: skip
    masks.write_page(folder / "masks.html", _masks(), title="Token masks", intro="What a token counts.")
    one, two = _run(made / "one", "ReMax", 1), _run(made / "two", "RLOO", 2)
    runs_report.write_runs_report(folder / "runs.html", {"one": one, "two": two})
    (folder / "watch.html").write_text(page_text("watch.html.j2", name="one"))
    state = snapshot(one)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "samples.json").write_text(json.dumps(next(iter(state["samples"].values()))))
    front_page.write_page(folder / "front.html", _front())
    return [f"{name}.html" for name in NAMES]


def figures_of(page: Path) -> list[dict]:
    """What a page's script draws."""
    found = re.findall(r'<script type="application/json" data-curves="[^"]+">(.*?)</script>', page.read_text())
    return [json.loads(figure) for figure in found]


def _answers(folder: Path) -> list[str]:
    rng, files = random.Random(0), []
    for name in ("a", "b"):
        lines = [
            {"row": i, "sample": 0, "prompt": f"question {i}", "completion": " ".join(rng.choices(WORDS, k=40))}
            for i in range(24)
        ]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(file) for file in files]


def _pairs(count: int) -> Dataset:
    rng = random.Random(0)
    rows = [{key: " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for key in ("prompt", "chosen", "rejected")}
            for _ in range(count)]  # fmt: skip
    return Dataset.from_list(rows)


def _masks() -> dict:
    def side(*weights):
        return {"tokens": [f" {word}" for word in WORDS[: len(weights)]], "masks": {"m": list(weights)}}

    pair = {"prompt": "tell me about the garden", "chosen": side(0.0, 0.5, 2.0, 1.0), "rejected": side(1.5, 0.0, 0.2)}
    return {"masks": {"m": {"max": 2.0, "mean": 0.7, "sparsity": 0.25}}, "pairs": [pair, pair]}


def _run(folder: Path, method: str, seed: int) -> Path:
    write_run(folder, method.lower(), steps=12, seed=seed, alpha=1.0 + 0.2 * seed)
    header = {"method": method, "max_steps": 120, "processes": 1, "versions": "torch 2", "settings": {"seed": seed}}
    writer, rng = MetricsWriter(folder, header, None), random.Random(seed)
    for step in range(1, 121):
        held = {f"constraints/polite_at_least/{key}": rng.random() for key in ("value", "multiplier")}
        times = {"time/generate": 3.0, "time/train": 1.0}
        more = {"loss": 2 / step + 0.1 * rng.random(), "reward": step / 50 + rng.random(), "entropy": 3 - step / 60}
        writer.write({"step": step, "at": 1.8e9 + step, **more, **held, **times})
    return folder


def _front() -> dict:
    def value(mean):
        return {"mean": mean, "low": mean - 0.08, "high": mean + 0.08}

    def point(run, share, kind):
        scores = {"helpful": value(share + 0.1 * run), "harmless": value(1 - share**2 + 0.1 * run)}
        return {"name": f"w{share:.2f}", "weights": {"helpful": share}, "kind": kind, "scores": scores,
                "kl": value(3 + 4 * share), "non_dominated": share != 0.25}  # fmt: skip

    runs = {
        name: {"points": [point(run, share, "soup" if share == 0.5 else "trained") for share in (0, 0.25, 0.5, 1)],
               "hypervolume": value(0.8 + run / 5)}
        for run, name in enumerate(("soups of two", "trained apart"))
    }  # fmt: skip
    reference = {"scores": {"helpful": value(0.1), "harmless": value(0.2)}, "kl": value(0.0)}
    return {"objectives": ["helpful", "harmless"], "prompts": 64, "reference": reference, "runs": runs,
            "reference_point": [0.0, 0.0], "reference_point_is": "given", "setup": {"seed": 0}}  # fmt: skip
