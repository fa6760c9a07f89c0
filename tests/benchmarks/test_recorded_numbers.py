"""Tables of the README and of pages are those of the records in benchmarks/results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.architectures import STAGES, outcome, read
from benchmarks.quickstart_seeds import table

ROOT = Path(__file__).parents[2]


def record(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_readme_has_the_quickstarts_seeds():
    assert table(record("quickstart_seeds")["seeds"]) in (ROOT / "README.md").read_text()


def test_the_ensembles_of_the_toy_world():
    page, found = (ROOT / "docs" / "ensembles.md").read_text(), record("ensemble_bon_toy")
    n = found["seeds"]["0"]["n"]
    rules = {
        "mean": "mean",
        "`wco`": "worst case",
        "`uwo`, lambda 0.5": "uncertainty-weighted, lambda 0.5",
        "`lcb`, lambda 1": "lower confidence bound, lambda 1",
    }
    for shown, name in rules.items():
        of = found["at_largest_n"][name]
        wanted = [of["gold_by_n"][n.index(16)]]
        for i in (n.index(128), n.index(1024)):
            wanted += [of["gold_by_n"][i], *of["over_seeds_by_n"][i]]
        wanted += [of["difference"], *of["difference_over_seeds"]]
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {shown} |") and "[" in line)
        numbers = [float(x) for x in re.findall(r"[+-]?\d\.\d\d", row)]
        assert numbers == pytest.approx(wanted, abs=0.0051), shown  # the record's four digits, rounded once more


@pytest.mark.parametrize(("name", "reference"), [("dpo_vs_trl", "live"), ("dpo_vs_trl_cached", "cached")])
def test_the_speed_of_dpo(name, reference):
    found = record(name)[reference]
    cells = []
    for side in ("best", "plain"):
        times = found[f"times_faster_than_trl_{side}_wall"]
        cells.append(f"{times['median']:.1f} ({min(times['each']):.1f}-{max(times['each']):.1f})")
    row = f"| 8 pairs per step, {reference} reference | {' | '.join(cells)} |"
    assert row in (ROOT / "docs" / "preference.md").read_text()


def test_what_an_on_policy_step_costs():
    page = (ROOT / "docs" / "on_policy.md").read_text()
    for case, peak in record("rollout_memory")["peak_mib"].items():
        assert f"| {case} | {peak['budget']:.0f} | {peak['whole']:,.0f} |" in page
    shares = record("rloo_shares")["fixed"]["ours, transformers"]
    products, attention = shares["products"], shares["attention"]
    ratio = record("rloo_vs_trl")["fixed"]["same_engine_processor"]["median"]
    words = " ".join(page.split())
    assert f"are {100 * products:.0f} % of the time of such a step of ours" in words
    assert f"attention is {100 * attention:.0f} %" in words
    assert f"it would be {ratio / (products + attention):.1f} times as fast as TRL's" in words
    phases = record("remax_phases")["medians"]
    for name in ("before", "now"):
        of = phases[name]
        cells = [of[f"time/{phase}"] for phase in ("sync", "generate", "reference", "train")]
        row = " | ".join(f"{value:.1f}" for value in [*cells, of["processor_seconds"]])
        assert f"| {name} | {row} |" in page


def test_what_scores_that_begin_early_gain():
    page, found = " ".join((ROOT / "docs" / "rewards.md").read_text().split()), record("early_scores")
    early, whole = (found[kind]["rollout"]["median"] for kind in ("early", "at_the_end"))
    ratio = found["ratio"]
    low, high = ratio["lower_quartile"], ratio["upper_quartile"]
    assert f"takes {early:.2f} seconds instead of {whole:.2f}" in page
    assert f"**{ratio['median']:.2f}** (quartiles {low:.2f} and {high:.2f})" in page
    assert f"where {found['least']:.2f} is the least that any order could reach" in page


def test_what_bfloat16_costs_under_fsdp2():
    page, runs = (ROOT / "docs" / "launching.md").read_text(), record("fsdp2_precision")["runs"]
    rows = {
        "weights": "float32, weights not rounded",
        "one process, autocast": "one process, autocast",
        "one process, autocast, padded": "the same, padded",
        "one process, weights in bfloat16": "one process, weights in bfloat16",
        "fsdp2": "`fsdp2`",
        "fsdp2, 4 micro-batches": "`fsdp2`, 4 micro-batches",
    }
    for name, shown in rows.items():
        of = runs[name]
        assert f"| {shown} | {of['margins']:.3f} | {of['logps']:.2f} | {100 * of['gradient']:.1f} % |" in page
    assert f"margins of rewards are {runs['float32']['margins']:.2f} there" in page
    assert f"differ by {runs['fsdp2 from one process, weights in bfloat16']['logps']:.4f} nats" in page


def test_the_architectures_that_train():
    """By the record: how many types could be made, and of how many each stage ended well."""
    found = read(ROOT / "benchmarks" / "results" / "architectures.jsonl")
    page = (ROOT / "docs" / "training.md").read_text().replace("\n", " ")

    def counts(kinds: list[str]) -> dict[str, int]:
        made = [kind for kind in kinds if outcome(found[kind], "model") == "ok"]
        ended = {stage: [kind for kind in made if outcome(found[kind], stage) == "ok"] for stage in STAGES}
        offline = {*made}.intersection(*(ended[stage] for stage in ("sft", "dpo", "dpo lora", "dpo bf16")))
        trained = [kind for kind in offline if outcome(found[kind], "dpo padded") in ("ok", "not tried")]
        return {"types": len(kinds), "made": len(made), "trained": len(trained), **{s: len(ended[s]) for s in STAGES}}

    causal, seeing = ([kind for kind in found if found[kind]["causal"] == wanted] for wanted in (True, False))
    c, s = counts(causal), counts(seeing)
    assert f"of {c['types']} causal ones {c['made']} could be made small, {c['trained']} of these train" in page
    assert f"{c['rloo']} draw, and {c['reward']} train a reward model" in page
    assert f"of {s['types']} types of text and images {s['made']} could be made, and {s['trained']} train on" in page
