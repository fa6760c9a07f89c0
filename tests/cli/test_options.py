"""Options as records: current, and enough for help, mistakes and editors without torch."""

import json
import subprocess
import sys

import pytest

from align.cli.main import main
from align.config.options import FILE, json_schema, make, options_of
from align.methods import METHODS


def test_the_file_is_current():
    """After a change of options: python -m align.config.options"""
    assert json.loads(FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(make()))


@pytest.mark.parametrize(
    ("tokens", "status"),
    [
        (["remax", "--help"], 0),
        (["dpo", "--help", "all"], 0),
        (["ppo", "--sed", "1"], 2),
        (["schema", "ppo"], 0),
    ],
)
def test_help_and_mistakes_import_no_torch(tokens, status):
    code = (
        "import sys; from align.cli.main import main; "
        f"status = main({tokens!r}); heavy = {{'torch', 'transformers', 'trl'}} & set(sys.modules); "
        f"sys.exit(f'{{status}} {{heavy}}' if heavy or status != {status} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_short_help_has_the_own_options_and_says_how_to_see_all(capsys):
    assert main(["dpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--loss_type " in shown and "--output_dir " in shown and "`align dpo --help all` lists the" in shown
    assert "--weight_decay " not in shown and "--rewards " not in shown
    assert main(["ppo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in ("form squared {", "kl_in_constraints", "ensemble {aggregation"))


@pytest.mark.parametrize("method", METHODS)
def test_the_schema_has_every_option(method):
    schema = json_schema(method)
    assert set(schema["properties"]) == {"method", "extends", *options_of(method)}
    assert schema["properties"]["learning_rate"]["type"] == ["number"] and not schema["additionalProperties"]
    json.dumps(schema)
