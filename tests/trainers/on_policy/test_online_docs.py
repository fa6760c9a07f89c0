"""docs/online.md: its program runs, and its table has the metrics that the method adds."""

import re
from pathlib import Path

from tests.trainers.tiny_runs import what_programs_name

DOCS = (Path(__file__).parents[3] / "docs" / "online.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.search(rf"^## {title}.*?(?=^## |\Z)", DOCS, re.DOTALL | re.MULTILINE)[0]


D2PO, METAAPO = section("D2PO"), section("MetaAPO")


def metrics_of(page: str) -> set[str]:
    """What the tables of metrics name."""
    return set(re.findall(r"`(\w+/\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))


def test_the_program_runs_and_logs_what_the_table_names(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what_programs_name(tokenizer)
    programs = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    quiet = "report_to='none', max_completion_length=8, use_cpu=True, logging_steps=1, "
    quiet += "rollout='transformers'"
    variables = {}
    kept = []
    for program, steps in zip(programs, ("max_steps=3", "max_steps=2"), strict=True):
        exec(compile(program.replace(steps, f"{steps}, {quiet}"), "docs/online.md", "exec"), variables)
        kept.append(variables["trainer"].state)
        assert f"max_steps={kept[-1].global_step}" == steps
    history = kept[0].log_history
    assert {"rewards/shorter/ties", "rewards/shorter/consistent"} <= {
        key for entry in kept[1].log_history for key in entry
    }
    named = metrics_of(DOCS.replace(D2PO, "").replace(METAAPO, ""))
    own = {key for entry in history for key in entry if key.startswith(("pairs/", "logps/", "rewards/"))}
    reward = {"rewards/short_answers", "rewards/short_answers/mean", "rewards/short_answers/std"}
    assert own - named == {*reward, "rewards/chosen", "rewards/rejected", "logps/mean"}
    assert named <= own
