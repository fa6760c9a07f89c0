"""docs/own_model_and_data.md: its commands run as written, one after the other, with a tiny model for the hub's."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from align.cli.main import main
from align.data import toy

PAGE = (Path(__file__).parents[2] / "docs/own_model_and_data.md").read_text()
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.S | re.M)


def test_commands(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    shown = json.loads(blocks("json")[0])  # a pair as the page shows it, and others that differ
    texts = [row["prompt"] for row in toy.split_prompts(0, 56)[0]]
    for number, text in enumerate(texts):
        row = shown | {"prompt": [{"role": "user", "content": f"{text} {number}?"}]}
        with Path("pairs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    Path("prompts.txt").write_text("".join(f"{text}?\n" for text in texts[:6]))
    (program,) = blocks("python")
    Path("my_rewards.py").write_text(program)
    monkeypatch.setattr("align.rollout.make.choose_backend", lambda backend: "transformers")  # vLLM takes a minute
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands[0] == "pip install align-rlhf" and len(commands) == 10
    for command in commands[1:]:
        monkeypatch.setattr("sys.stdin", io.StringIO("boil an egg\n"))
        small = command.replace(HUB, "chat").replace("--max_steps 60 --eval_steps 20", "--max_steps 2 --eval_steps 1")
        assert main(shlex.split(small)[1:]) == 0, command
    assert Path("served/model.safetensors").exists() and Path("outputs/report.html").exists()
    assert texts[0] in Path("outputs/compare/compare.html").read_text()
