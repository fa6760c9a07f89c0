"""docs/serving.md: its `align` commands and Python run as written; the page names the others as not run."""

import re
import shlex
from pathlib import Path

from transformers import GenerationConfig

from align.cli.main import main
from align.modeling.export import is_reward_model
from tests.modeling.test_export import adapter, base
from tests.reward_models.worlds import reward_folder

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text()
OTHERS = ("vllm serve", "python llama.cpp/", "llama.cpp/", "ollama ")


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(base(tmp_path / "base"), "runs/dpo", target_modules=["q_proj"])
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained("runs/dpo")
    reward_folder("runs/reward")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    ours = [command for command in commands if command.startswith("align ")]
    assert len(ours) == 2 and all(command.startswith(("align ", *OTHERS)) for command in commands)
    for command in ours:
        assert main(shlex.split(command)[1:]) == 0
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec(block, names)
    assert names["model"].generation_config.eos_token_id == [1, 2]
    assert not is_reward_model("served") and is_reward_model("reward-served")
