"""Options as records: current, and enough for help, mistakes and editors without torch."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest

from align.cli.main import main
from align.config import options
from align.config.options import FILE, MADE_WITH, json_schema, make, options_of
from align.config.source import read_file, ready_configs
from align.methods import METHODS
from align.rollout import rollout_options

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

TESTED = all(f"{name}=={version(name)}\n" in CONSTRAINTS.read_text() for name in MADE_WITH)


@pytest.fixture(scope="module", autouse=True)
def cache_of_their_own(tmp_path_factory):
    """Where the versions are not the tested ones, help is quick from the second time on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        options_of.cache_clear()
        options_of("dpo")
        yield
    options_of.cache_clear()


@pytest.mark.skipif(not TESTED, reason="needs transformers and trl as pinned in constraints.txt, of which the file is")
def test_the_file_is_current():
    """After a change of options: python -m align.config.options. A class of the user's is an option of their files
    alone, whatever this process has read before."""
    rollout_options({"backend": "tests.trainers.on_policy.elsewhere:Elsewhere"})
    assert json.loads(FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(make()))


@pytest.mark.parametrize(
    ("tokens", "status"),
    [
        (["remax", "--help"], 0),
        (["dpo", "--help", "all"], 0),
        (["ppo", "--sed", "1"], 2),
        (["schema", "ppo"], 0),
        (["ppo", "--rollout.bakend", "vllm"], 2),
        (["ppo", "--rollout", "{backend: vllm, gpu_memory_utilization: 2}"], 2),
        (["ppo", "--constraints.0.treshold", "1"], 2),
        (["ppo", "--rewards.0", "{type: remote, url: x, tiemout: 1}"], 2),
        (["ppo", "--dynamic_weights.type", "gradiant"], 2),
        (["ppo", "--environment", "align.objectives.kl.py:k1"], 2),
        (["ppo", "--tools", "align.no_such:name", "--resume_changes", "sed"], 2),
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


@pytest.fixture
def forgotten():
    yield
    options_of.cache_clear()


def test_other_versions_are_looked_at_once(tmp_path, monkeypatch, forgotten):
    made = []

    def counted():
        made.append(1)
        return {"made with": {"transformers": "6.0"}, "methods": {name: {} for name in METHODS}, "options": []}

    def ask(home) -> int:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        options_of.cache_clear()
        assert options_of("dpo") == {}
        return len(made)

    monkeypatch.setattr(options, "make", counted)
    monkeypatch.setattr(options, "installed", lambda: {"transformers": "6.0"})
    assert [ask(tmp_path), ask(tmp_path)] == [1, 1]
    (file,) = (tmp_path / "align").iterdir()
    for damage in ("{", "[]", "{}", '{"made with": {"transformers": "5.0"}}'):
        before = len(made)
        file.write_text(damage)
        assert [ask(tmp_path), ask(tmp_path)] == [before + 1, before + 1]
    (tmp_path / "a_file").write_text("")
    before = len(made)
    assert [ask(tmp_path / "a_file"), ask(tmp_path / "a_file")] == [before + 1, before + 2]  # nowhere to keep it


def test_short_help_has_the_own_options_and_says_how_to_see_all(capsys):
    assert main(["dpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--loss_type " in shown and "--output_dir " in shown and "`align dpo --help all` lists the" in shown
    assert "--weight_decay " not in shown and "--rewards " not in shown
    assert main(["ppo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--vllm_mode" not in shown and "--vllm_mode" in (main(["ppo", "--help", "all"]), capsys.readouterr().out)[1]
    assert all(key in shown for key in ("form squared {", "kl_in_constraints", "ensemble {aggregation"))


@pytest.mark.parametrize("method", METHODS)
def test_the_schema_has_every_option(method):
    schema = json_schema(method)
    assert set(schema["properties"]) == {"method", "extends", *options_of(method)}
    assert schema["properties"]["learning_rate"]["type"] == ["number"] and not schema["additionalProperties"]
    json.dumps(schema)


READY = {name: {key: entry.value for key, entry in read_file(path).items()} for name, path in ready_configs().items()}


@pytest.mark.parametrize("name", [name for name in READY if not name.startswith("base/")])
def test_every_ready_config_is_valid_by_the_schema(name):
    assert list(jsonschema.Draft202012Validator(json_schema(READY[name]["method"])).iter_errors(READY[name])) == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"rollout": {"bakend": "vllm"}}, {"rollout": {"backend": "vllm", "kv_cache_gib": 2}}),
        ({"rollout": {"backend": "transformers", "kv_cache_gib": 2}}, {"rollout": "transformers"}),
        (
            {"rollout": {"backend": "server", "urls": 8000}},
            {"rollout": {"backend": "server", "urls": "http://[::1]:8"}},
        ),
        ({"rollout": {"backend": "mine"}}, {"rollout": {"backend": "mine.py:Engine", "beams": 2}}),
        ({"rollout": {"backend": "vllm", "gpu_memory_utilization": 2}}, {"rollout": {"max_num_seqs": 8}}),
        ({"constraints": [{"reward": "a", "direction": "up", "threshold": 0}]}, {"constraints": None}),
        ({"multipliers": {"form": "squared", "momentum": 0.1}}, {"multipliers": {"momentum": 0.1, "pid": {"kp": 2}}}),
        ({"multipliers": {"pid": {"kq": 2}}}, {"multipliers": {"form": "squared", "coefficients": [1, 2]}}),
        ({"dynamic_weights": {"type": "gradiant"}}, {"dynamic_weights": {"type": "mine.py:Weighting", "any": 1}}),
        ({"threshold_search": {"start": {"a": 0}}}, {"dynamic_weights": {"type": "gradient", "mu": 1e-5}}),
        (
            {"rewards": [{"type": "remote", "tiemout": 3}]},
            {"rewards": ["json:dumps", {"type": "classifier", "path": "x"}]},
        ),
        (
            {"rewards": {"type": "ensemble", "aggregation": "mean", "members": [{"type": "clasifier", "path": "x"}]}},
            {
                "gold_reward": {
                    "type": "ensemble",
                    "aggregation": "mean",
                    "members": ["runs/a", {"type": "classifier", "path": "x"}],
                }
            },
        ),
    ],
)
def test_the_schema_knows_the_nested_sections(wrong, right):
    validator = jsonschema.Draft202012Validator(json_schema("ppo"))
    assert validator.is_valid(right) and not validator.is_valid(wrong)
