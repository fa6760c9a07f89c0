"""docs/on_policy.md: its commands resolve, its programs run, its table names the metrics that there are."""

import re
import shlex
from pathlib import Path

import pytest

from align.config import configs_dir
from align.config.resolve import resolve
from align.trainers.on_policy.estimators import ESTIMATORS
from tests.trainers.tiny_runs import logged, on_policy, prompts, wanted_words, what_programs_name

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "on_policy.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.strip().splitlines()]
SHARED = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def metrics(text: str) -> set[str]:
    return set(re.findall(r"`([\w/<>]+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_resolve(command):
    align, method, *tokens = shlex.split(command)
    tokens.remove("--dry-run")
    file = tokens[tokens.index("--config") + 1]
    run = resolve(method, str(configs_dir() / Path(file).name), [t for t in tokens if t not in ("--config", file)])
    assert align == "align" and run.training.output_dir == f"runs/{method}"


def test_programs_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what_programs_name(tokenizer)
    first, second = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    first = first.replace("max_steps=3", "max_steps=3, report_to='none', max_completion_length=8, use_cpu=True")
    variables = {}
    exec(compile(first, "docs/on_policy.md", "exec"), variables)
    assert variables["trainer"].state.global_step == 3
    exec(compile(second, "docs/on_policy.md", "exec"), variables)
    try:
        assert variables["args"].estimator == "pass_at_k"
        Path("my_estimator.py").write_text(second.replace('@register_estimator("pass_at_k")\n', ""))
        for name in ("pass_at_k", "my_estimator.py:PassAtK"):
            trainer_class, args = on_policy("rloo", tmp_path / "own", num_generations=3, estimator=name)
            trainer = trainer_class("my_policy", wanted_words, args, prompts(16))
            trainer.train()
            assert type(trainer.estimator).__name__ == "PassAtK" and len(logged(trainer, "loss")) == 2
    finally:
        ESTIMATORS.pop("pass_at_k")


def test_the_tables_have_every_metric(policy, tmp_path):
    named = set()
    for method in ("ppo", "grpo"):
        cut = {"truncated": "mask", "overlong_buffer": 2}
        trainer_class, args = on_policy(method, tmp_path, num_mini_batches=2, kl_target=1.0, max_steps=4, **cut)
        trainer = trainer_class(policy, wanted_words, args, prompts(16))
        trainer.train()
        named |= {key for entry in trainer.state.log_history for key in entry}
    ours = {key for key in named if not key.startswith(("train_", "time/"))} - {"epoch", "step", "total_flos"}
    ours = {re.sub("^rewards/.*", "rewards/<name>", re.sub("/task", "/<stream>", key)) for key in ours}
    ours.discard("learning_rate")
    table = metrics(DOCS.split("## Further metrics")[1])
    assert table <= {key.replace("task_", "<stream>_") for key in ours}
    assert {key.replace("task_", "<stream>_") for key in ours} <= table | metrics(SHARED)
