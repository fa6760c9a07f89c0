"""docs/sparsepo.md: its commands run or resolve, its program runs, its tables name what there is."""

import re
import shlex
from pathlib import Path

import pytest

from align.cli.main import main
from align.config import configs_dir
from align.config.resolve import resolve
from align.trainers.masks.options import LEARNED, VARIANTS
from align.trainers.sparsepo import SparsePOConfig
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.sparse_runs import trainer
from tests.trainers.tiny_runs import tiny_model

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "sparsepo.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.strip().splitlines()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("align sparsepo")])
def test_training_commands_resolve(command):
    _, method, *tokens = shlex.split(command)
    tokens = [token for token in tokens if token != "--dry-run"]
    file = tokens[tokens.index("--config") + 1]
    run = resolve(method, str(configs_dir() / Path(file).name), [t for t in tokens if t not in ("--config", file)])
    assert isinstance(run.training, SparsePOConfig)


def test_the_program_and_the_commands_that_look_at_its_masks_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(tokenizer, max_position_embeddings=1024).save_pretrained("my_policy")
    tokenizer.save_pretrained("my_policy")
    toy_pairs(24).to_json("pairs.jsonl")
    (program,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    settings = "max_steps=2, report_to='none', use_cpu=True, disable_tqdm=True"
    exec(
        compile(program.replace("mask_learning_rate=1e-3)", f"mask_learning_rate=1e-3, {settings})"), "docs", "exec"),
        {},
    )
    assert Path("runs/sparsepo/masks.html").exists() and Path("runs/sparsepo/token_masks.safetensors").exists()
    looking = [c for c in COMMANDS if c.startswith("align masks")]
    assert len(looking) == 2 and len(COMMANDS) == 6
    for command in looking:
        assert main(shlex.split(command)[1:]) == 0
    assert Path("outputs/masks.html").exists() and Path("outputs/mapo.html").exists()


def test_the_tables_are_complete(policy, tmp_path):
    cells = re.findall(r"^\| (`.*?) \|", DOCS, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}
    run = trainer(policy, tmp_path, eval_data=toy_pairs(4), variant="independent")
    run.train()
    logged = {key for key in run.state.log_history[0] if "/" in key and not key.startswith("time/")}
    options = {*LEARNED, "mask_on_reward", "mask_on_kl"}
    assert named == {"variant", *VARIANTS, *options, *logged}
    for name, default in LEARNED.items():
        if isinstance(default, float) and default:
            assert re.search(rf"`{name}` .*\b{default:g}\b", DOCS.replace("|", "")), name


def test_the_pictures_are_there():
    for name in re.findall(r"\]\((images/.*?)\)", DOCS):
        assert (ROOT / "docs" / name).exists(), name
