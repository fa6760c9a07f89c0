"""docs/online.md: its program runs, and its table has the metrics that the method adds."""

import re
from pathlib import Path

from tests.trainers.tiny_runs import what_programs_name

DOCS = (Path(__file__).parents[3] / "docs" / "online.md").read_text(encoding="utf-8")


def test_the_program_runs_and_logs_what_the_table_names(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what_programs_name(tokenizer)
    (program,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    quiet = "max_steps=3, report_to='none', max_completion_length=8, use_cpu=True, logging_steps=1, "
    quiet += "rollout='transformers'"
    variables = {}
    exec(compile(program.replace("max_steps=3", quiet), "docs/online.md", "exec"), variables)
    history = variables["trainer"].state.log_history
    assert variables["trainer"].state.global_step == 3
    named = set(re.findall(r"`(\w+/\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", DOCS, re.MULTILINE))))
    own = {key for entry in history for key in entry if key.startswith(("pairs/", "logps/", "rewards/"))}
    reward = {"rewards/short_answers", "rewards/short_answers/mean", "rewards/short_answers/std"}
    assert own - named == {*reward, "rewards/chosen", "rewards/rejected", "logps/mean"}
    assert named <= own
