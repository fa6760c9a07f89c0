"""docs/environments.md and its example: commands resolve, what they name is there and works."""

import re
from pathlib import Path

import pytest

from align.config import configs_dir
from align.config.resolve import resolve
from align.lazy import imported
from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.tools import Tools

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")


def test_the_commands_and_the_class_of_the_page():
    bash, python = re.search(r"```bash\n(.*?)```.*?```python\n(.*?)```", DOCS, re.DOTALL).groups()
    for line in bash.strip().splitlines():
        _, method, _, config, *further = line.removesuffix(" --dry-run").split()
        run = resolve(method, str(configs_dir() / Path(config).name), further)
        places = [*(run.training.tools or []), *([run.training.environment] if run.training.environment else [])]
        assert places and all(callable(imported(str(ROOT / place), "example")) for place in places)
        assert run.rewards is None or method == "rloo"
    variables: dict = {}
    exec(compile(python, "docs/environments.md", "exec"), variables)
    session = Environments(variables["GuessingGame"], [], 5).kinds[None].start()
    session.reset({"environment_seed": 6})
    assert [session.reply(answer).done for answer in ("6", "7")] == [False, True] and session.finish() == 1.0


def test_several_environments_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the environments are looked for when the file is read
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_env.py").write_text("class OtherGame: ...\n")
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    text = (configs_dir() / "environment.yaml").read_text()
    text = re.sub(r"^environment: .*$", "", text, flags=re.MULTILINE)
    text = text.replace("extends: base/prompts", f"extends: {configs_dir() / 'base' / 'prompts.yaml'}")
    (tmp_path / "several.yaml").write_text(text + block)
    run = resolve("grpo", str(tmp_path / "several.yaml"), [])
    assert run.training.environment == {
        "game": "examples/environments.py:GuessingGame",
        "other": "my_env.py:OtherGame",
    }
    assert run.rewards is None  # theirs alone


def test_the_example():
    game = Environments(imported(f"{ROOT}/examples/environments.py:GuessingGame", "example"), [], 5).kinds[None].start()
    game.reset({"environment_seed": 0})
    low, high = 1, 20
    turns = 0
    while turns < 6:
        turns += 1
        reply = game.reply(f"{(low + high) // 2}")
        if reply.done:
            break
        middle = (low + high) // 2
        low, high = (middle + 1, high) if reply.messages[0]["content"] == "Higher." else (low, middle - 1)
    assert game.finish() == pytest.approx(1.1 - 0.1 * turns)
    tools = Tools([imported(f"{ROOT}/examples/environments.py:calculator", "example")], 5)
    said = [tools.answer({"name": "calculator", "arguments": {"expression": e}})["content"] for e in ("3*(2+5)", "x()")]
    assert said[0] == "21" and "only numbers" in said[1] and tools.schemas[0]["function"]["name"] == "calculator"
