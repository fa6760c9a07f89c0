"""Reading YAML files and overrides: values, lines, and one-line errors."""

import pytest

from align.config.source import COMMAND_LINE, apply_overrides, parse_value, read_file, read_overrides
from align.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def values(entries):
    return {key: entry.value for key, entry in entries.items()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'5e-7'", "5e-7"),
        ("[q_proj, 1]", ["q_proj", 1]),
        ("{type: rule, lambda: 5e-1}", {"type": "rule", "lambda": 0.5}),
        ("rewards.py:fn", "rewards.py:fn"),
        ("[unclosed", "[unclosed"),
        ("@odd", "@odd"),
        ("runs/try #3", "runs/try #3"),
        ("#3", "#3"),
        ("'runs/try #3'", "runs/try #3"),
        ("[a, b] # c", ["a", "b"]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_entries_know_their_line_and_their_text(tmp_path):
    path = write(tmp_path, "# comment\n\nlearning_rate: 5e-7\nrewards:\n  - path: x\nrun_name: 007\n")
    entries = read_file(path)
    assert [(key, entry.where) for key, entry in entries.items()] == [
        ("learning_rate", f"{path}, line 3"),
        ("rewards", f"{path}, line 4"),
        ("run_name", f"{path}, line 6"),
    ]
    assert entries["run_name"].text == "007"
    assert entries["rewards"].value == [{"path": "x"}]


def test_an_empty_file_is_an_empty_config_and_anchors_work(tmp_path):
    assert read_file(write(tmp_path, "# nothing\n")) == {}
    entries = read_file(write(tmp_path, "a: &x {k: 1, l: 2}\nb:\n  <<: *x\n  k: 3\n"))
    assert entries["b"].value == {"k": 3, "l": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n\na: 2\n", "line 3: key 'a' is already set on line 1"),
        ("rewards:\n  - path: x\n    name: y\n    path: z\n", "line 4: key 'rewards.0.path' is already set on line 2"),
        ("a: [1\nb: 2\n", "line 2: not valid YAML: "),
        ("a: 1\n b: 2\n", "line 2: not valid YAML: "),
        ("a: !python/name:os.system x\n", "line 1: not valid YAML: could not determine a constructor"),
        ("- 1\n", "line 1: expected `key: value` lines"),
    ],
)
def test_broken_files_are_one_line_with_the_line_number(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_file(path)
    assert f"{path}, {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file .*nowhere.yaml"):
        read_file(tmp_path / "nowhere.yaml")


def test_overrides_of_every_form():
    tokens = "--learning-rate 5e-7 --use_peft --lora_target_modules q_proj v_proj --x=-1 --y -1e-5 --rewards.0.path a:b"
    found = read_overrides(tokens.split())
    assert [(key, entry.value) for key, entry in found] == [
        ("learning_rate", 5e-7),
        ("use_peft", True),
        ("lora_target_modules", ["q_proj", "v_proj"]),
        ("x", -1),
        ("y", -1e-5),
        ("rewards.0.path", "a:b"),
    ]
    assert {entry.where for _, entry in found} == {COMMAND_LINE}


def test_an_argument_that_is_no_option_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r"unexpected argument 'configs/sft.yaml'.*did you mean --config configs/s"):
        read_overrides(["configs/sft.yaml"])


def test_overrides_reach_into_nested_values(tmp_path):
    path = write(tmp_path, "rewards:\n  - {type: classifier, path: a}\n  - {type: rule}\nseed: 1\nempty:\n")
    entries = read_file(path)
    tokens = "--rewards.0.path b --rewards.1.options.k 2 --rewards.2.path c --seed 3 --seed 6"
    tokens += " --empty.k 4 --new.k.l 5 --list.0 d"
    apply_overrides(entries, read_overrides(tokens.split()))
    assert values(entries) == {
        "rewards": [{"type": "classifier", "path": "b"}, {"type": "rule", "options": {"k": 2}}, {"path": "c"}],
        "seed": 6,
        "empty": {"k": 4},
        "new": {"k": {"l": 5}},
        "list": ["d"],
    }


@pytest.mark.parametrize("tokens", ["--rewards.3.path b", "--rewards.first.path b", "--seed.x 1"])
def test_overrides_that_reach_nowhere_are_refused(tmp_path, tokens):
    entries = read_file(write(tmp_path, "rewards:\n  - {path: a}\n  - {path: a}\nseed: 1\n"))
    with pytest.raises(ConfigError, match=f"command line: {tokens.split()[0]}: "):
        apply_overrides(entries, read_overrides(tokens.split()))


def test_a_file_extends_another_and_every_value_knows_its_file(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nrewards:\n  - {type: rule, function: a}\nmultipliers: {form: tanh}\n")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nseed: 2\nmultipliers.form: sigmoid\n")
    (tmp_path / "top.yaml").write_text("extends: middle.yaml\nrewards.0.function: b\nrewards.0.name: c\nnew: 3\n")
    entries = read_file(tmp_path / "top.yaml")
    assert values(entries) == {
        "seed": 2,
        "rewards": [{"type": "rule", "function": "b", "name": "c"}],
        "multipliers": {"form": "sigmoid"},
        "new": 3,
    }
    assert entries["seed"].where == f"{tmp_path / 'middle.yaml'}, line 2"
    assert entries["rewards"].place("rewards.0.type") == f"{tmp_path / 'base.yaml'}, line 3"
    assert entries["rewards"].place("rewards.0.function") == f"{tmp_path / 'top.yaml'}, line 2"
    assert entries["multipliers"].place("multipliers.form.x") == f"{tmp_path / 'middle.yaml'}, line 3"
    # of the whole section: all that wrote in it
    changed = f"{tmp_path / 'base.yaml'}, line 4; {tmp_path / 'middle.yaml'}, line 3"
    assert entries["multipliers"].place("multipliers") == changed
    apply_overrides(entries, read_overrides(["--multipliers.learning_rate", "1", "--multipliers.momentum", "0"]))
    assert entries["multipliers"].places == f"{changed}; command line"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["extends: 0.yaml\n"], "0.yaml, line 1: files extend each other in a circle: .*0.yaml -> .*0.yaml"),
        (["extends: 1.yaml\n", "a: 1\nextends: 0.yaml\n"], "1.yaml, line 2: .* circle: .*0.yaml -> .*1.yaml -> .*0.ya"),
        (["extends: nowhere.yaml\n"], "0.yaml, line 1: extends: there is no config file .*nowhere.yaml"),
        (["extends: base/pars\n"], "line 1: extends: there is no ready config 'base/pars'; nearest: base/pairs"),
        (["extends: [a.yaml]\n"], "line 1: extends names one config"),
        (["extends: 1.yaml\n", "a: 1\na: 2\n"], "1.yaml, line 2: key 'a' is already set on line 1"),
        (["extends: 1.yaml\na.b: 1\n", "a: 1\n"], "0.yaml, line 2: a.b: there is nothing below 1 to set 'b' in: give"),
    ],
)
def test_extending_what_cannot_be_extended(tmp_path, texts, message):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_file(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: caf\xe9\n", "line 2: not UTF-8 (byte 0xe9)"),
        (b"a: 1\nb: \x07\n", "line 2: a character that no YAML file may have: 0x7"),
        (b"a: &x\n  - 1\n  - *x\n", "line 1: an anchor that holds itself"),
        (b"a: 1\nb: !!int x\n", "line 2: not valid YAML: 'x' is no int"),
        (b"b: !!float x\n", "line 1: not valid YAML: 'x' is no float"),
        (b"b: !!bool x\n", "line 1: not valid YAML: 'x' is no bool"),
        (b"b: !!timestamp 2020-13-45\n", "line 1: not valid YAML: could not determine a constructor"),
        (b"a: 1\n? |\n  two\n  lines\n: 2\n", "line 2: a key must be one line of text"),
        (b"? [a]\n: 2\n", "line 1: a key must be one line of text"),
        (b"a: " + b"[" * 5000, "line 1: lists or mappings are nested too deeply"),
        (b"a: " + b"9" * 5000, "line 1: not valid YAML: '99999"),
        (b"a: &a [1,2,3,4,5,6,7,8,9]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
        ), "more than 10000 values, counting each use of an anchor"),
    ],
)  # fmt: skip
def test_files_that_are_no_text_or_no_plain_yaml(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_file(path)
    assert str(error.value).startswith(f"{path}, ") and message in str(error.value) and "\n" not in str(error.value)


def test_folders_and_ready_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is a folder, not a config file"):
        read_file(tmp_path)
    with pytest.raises(ConfigError, match="there is no config file dpoo; nearest ready config: dpo"):
        read_file("dpoo")
    (tmp_path / "dpo").mkdir()  # the output of a run does not hide the ready config
    assert read_file("dpo")["method"].value == "dpo"
    (tmp_path / "rloo").write_text("seed: 1\n")
    assert list(read_file("rloo")) == ["seed"]


@pytest.mark.parametrize("text", ["&a [*a]", "{x: &a [1], y: *a}", "*.jsonl"])
def test_a_value_that_refers_to_an_anchor_is_text(text):
    assert parse_value(text) == text
