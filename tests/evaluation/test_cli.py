"""`align bon` and `align overoptimization`, as a user calls them."""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from align.cli import bon, overoptimization
from align.cli.main import main
from align.errors import AlignError, ConfigError, DataError, RewardError
from align.evaluation.records import FILE_NAME
from align.evaluation.strict_json import write_json
from align.evaluation.summary import read_summary
from tests.evaluation.synthetic import scored_answers, write_run

ROOT = Path(__file__).parents[2]
OUTPUTS = {"report.html", "summary.json", "figures"}


def call(module, *argv):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(item) for item in argv]))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    proxy, gold = scored_answers(30, 32, trap=1.3)
    other, _ = scored_answers(30, 32, seed=9)
    prompts = np.repeat([f"question {i}" for i in range(30)], 32)
    texts = [f"answer {i}" for i in range(30 * 32)]
    frame = pd.DataFrame(
        {
            "prompt": prompts,
            "completion": texts,
            "rm0": proxy.ravel(),
            "rm1": proxy.ravel() + other.ravel(),
            "truth": gold.ravel(),
        }
    )
    path = tmp_path_factory.mktemp("table") / "scores.csv"
    frame.sample(frac=1, random_state=0).to_csv(path, index=False)
    return path


def test_bon_on_a_table(table, tmp_path, capsys):
    argv = ["--proxy", "rm0", "--proxy", "rm1", "--gold", "truth", "--ensemble", "uwo:0.5"]
    assert call(bon, table, *argv, "--output_dir", tmp_path, "--n", 20, "--title", "Mine") == 0
    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS
    summary = read_summary(tmp_path)
    assert list(summary["best_of_n"]) == ["rm0", "rm1", "uwo:0.5"]
    frame = pd.read_csv(table)
    for name in ("rm0", "rm1"):
        entry = summary["best_of_n"][name]
        assert entry["n"] == [1, 2, 4, 8, 16, 20] and entry["prompts"] == 30 and entry["answers"] == [32, 32]
        assert entry["gold"][0] == pytest.approx(frame["truth"].mean())
        assert entry["proxy"][0] == pytest.approx(frame[name].mean())
        assert np.all(np.diff(entry["proxy"]) > 0)
    standard = (frame[["rm0", "rm1"]] - frame[["rm0", "rm1"]].mean()) / frame[["rm0", "rm1"]].std(ddof=0)
    uwo = standard.mean(axis=1) - 0.5 * standard.var(axis=1, ddof=0)
    assert summary["best_of_n"]["uwo:0.5"]["proxy"][0] == pytest.approx(uwo.mean())
    assert summary["fits"]["best_of_n"]["rm0"]["bon"]["alpha"] > 0
    assert set(summary["phases"]) == {"read", "curves and fits"}
    out = capsys.readouterr().out
    assert "uwo:0.5" in out and str(tmp_path / "report.html") in out
    assert "<h1>Mine</h1>" in (tmp_path / "report.html").read_text()


def test_n_is_the_largest_n_also_beside_a_power_of_two(table, tmp_path):
    columns = ["--proxy", "rm0", "--gold", "truth", "--output_dir", tmp_path]
    assert call(bon, table, *columns, "--n", 17) == 0
    assert read_summary(tmp_path)["best_of_n"]["rm0"]["n"] == [1, 2, 4, 8, 16, 17]


def test_overoptimization_of_runs(tmp_path, capsys):
    dollars = "costs $x^{ or $2 and is not cut in two"  # no mathematics of a figure's
    for name, beta in (("single", 0.7), ("uwo", 0.2)):
        write_run(tmp_path / name, "run", beta=beta, seed=3)
    runs = [tmp_path / "single", tmp_path / "uwo" / FILE_NAME]
    with pytest.raises(DataError, match="both named 'run'"):
        call(overoptimization, *runs, "--output_dir", tmp_path / "out")
    assert call(overoptimization, *runs, "--names", "single", dollars, "--output_dir", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS
    summary = read_summary(tmp_path / "out")
    assert summary["runs"]["single"]["step"] == list(range(0, 201, 10))
    assert summary["runs"]["single"]["peak"]["verdict"] == "over-optimised"
    assert summary["runs"]["single"]["gold"][-1] < summary["runs"][dollars]["gold"][-1]
    out = capsys.readouterr().out
    assert "over-optimised" in out and str(tmp_path / "out" / "report.html") in out
    assert dollars in out


def test_token_masks_of_a_run_are_in_its_report(tmp_path):
    run = write_run(tmp_path / "run", "run")
    mask = {"tokens": ["rose", " soil"], "masks": {"m": [0.0, 1.5]}}
    content = {
        "masks": {"m": {"max": 1.5, "mean": 0.75, "sparsity": 0.5}},
        "pairs": [{"prompt": "p", "chosen": mask, "rejected": mask}],
    }
    write_json(tmp_path / "run" / "masks.json", content)
    assert call(overoptimization, run, "--output_dir", tmp_path / "out") == 0
    assert list(read_summary(tmp_path / "out")["masks"].values()) == [content]
    assert "<h2>Token masks</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_overoptimization_mistakes(tmp_path):
    with pytest.raises(DataError, match="does not exist: give a run's folder"):
        call(overoptimization, tmp_path / "nowhere", "--output_dir", tmp_path)
    with pytest.raises(ConfigError, match="2 names for 1 runs"):
        call(overoptimization, tmp_path, "--names", "a", "b")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["T"], "give the proxy score's column"),
        ([], "either a table of completions, or --model"),
        (["T", "--model", "m"], "either a table of completions, or --model"),
        (["--model", "m", "--prompts", "p"], "--model needs --rewards, --gold_reward too"),
        (["T", "--proxy", "rm0", "--gold_reward", "x"], "--gold_reward needs --rewards"),
        (["T", "--proxy", "rm0", "--gold", "truth", "--n", "1"], "--n must be at least 2"),
        (["T", "--proxy", "rm0", "--gold", "truth", "--n", "64"], "n=64 needs as many answers"),
        (["T", "--proxy", "rm0"], "no column 'gold'"),
        (["T", "--proxy", "rm0", "--temperature", "0.5", "--split", "test"], "--split, --temperature says how"),
        (
            ["--model", "m", "--prompts", "p", "--rewards", "r", "--gold_reward", "g", "--id_column", "i"],
            "--id_column nam",
        ),
        (["T", "--proxy", "rm0", "--proxy", "rm0", "--gold", "truth", "--ensemble", "mean"], "rm0 is given twice"),
        (
            ["T", "--proxy", "rm0", "--gold", "truth", "--completion_column", "text"],
            "no column 'text' for the completion",
        ),
        (
            ["T", "--proxy", "rm0", "--proxy", "rm1", "--gold", "truth", "--ensemble", "uwo:inf"],
            "must be >= 0 and finite",
        ),
        (["T", "--proxy", "rm0", "--gold", "truth", "--ensemble", "wco"], "needs at least two proxies"),
        (["T", "--proxy", "rm0", "--proxy", "rm1", "--gold", "truth", "--ensemble", "uwo"], "uwo needs lambda"),
        (["T", "--proxy", "rm0", "--proxy", "rm1", "--gold", "truth", "--ensemble", "uwo:x"], "'x' is not a number"),
        (["T", "--proxy", "rm0", "--proxy", "rm1", "--gold", "truth", "--ensemble", "best"], "unknown aggregation"),
        (["T", "--rewards", "{type: rule", "--gold", "truth"], "is not a YAML mapping"),
    ],
)
def test_bon_mistakes_are_errors_with_a_remedy(table, tmp_path, argv, message):
    argv = [str(table) if item == "T" else item for item in argv]
    with pytest.raises(AlignError, match=message):
        call(bon, *argv, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ensemble_takes_no_proxys_place(table, tmp_path):
    """A column named mean was replaced by the mean of all, under its name."""
    path = tmp_path / "t.csv"
    pd.read_csv(table).rename(columns={"rm0": "mean"}).to_csv(path, index=False)
    argv = ["--proxy", "mean", "--proxy", "rm1", "--gold", "truth", "--output_dir", tmp_path / "out"]
    with pytest.raises(ConfigError, match="two curves would be named 'mean'"):
        call(bon, path, *argv, "--ensemble", "mean")
    with pytest.raises(ConfigError, match="two curves would be named 'wco'"):
        call(bon, path, *argv, "--ensemble", "wco", "--ensemble", "wco")


def test_bon_knows_its_ensembles_before_it_draws_and_scores():
    """A rule that does not exist ended a run of hours after everything was scored."""
    rewards = ["--rewards", "no_such_folder", "other.py:function", "--gold_reward", "gold.py:function"]
    with pytest.raises(RewardError, match=r"unknown aggregation 'worst': one of mean, wco \(the worst case\), uwo"):
        call(bon, "--model", "no_such_model", "--prompts", "none.jsonl", *rewards, "--ensemble", "worst")


@pytest.mark.parametrize("command", ["bon", "overoptimization", "proxy-points", "reward-eval", "compare", "front"])
def test_a_seed_counts_from_0(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "a", "b", "--seed", "-1"])
    assert "--seed: needs a whole number of 0 or more, not '-1'" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_a_sentence(table, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(["bon", str(table), "--proxy", "rm0", "--gold", "truth", "--output_dir", str(folder)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"align: error: {tmp_path}/file") and "cannot be written" in said


RULES = """
def length(completions, **_):
    return [float(len(text)) for text in completions]

def waves(prompts, completions, weight, **_):
    return [w * text.count("wave") - 0.1 * len(text) + len(p) for p, text, w in zip(prompts, completions, weight)]
"""


def test_bon_scores_a_table_first(table, tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    reward = f"{tmp_path}/rules.py:length"
    out = tmp_path / "out"
    assert call(bon, table, "--rewards", reward, "--gold", "truth", "--output_dir", out) == 0
    scores = pd.read_parquet(out / "scores.parquet")
    assert scores["length"].tolist() == [len(text) for text in scores["completion"]]
    pd.testing.assert_frame_equal(scores.drop(columns="length"), pd.read_csv(table))
    assert list(read_summary(out)["best_of_n"]) == ["length"]
    with pytest.raises(ConfigError, match="already has a column 'rm0'"):
        spec = f"{{type: rule, function: '{reward}', name: rm0}}"
        call(bon, table, "--rewards", spec, "--gold", "truth", "--output_dir", out)


def test_bon_draws_from_a_model(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "sea", "hill", "wave", "stone", "tree"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rules.py").write_text(RULES)
    pd.DataFrame({"prompt": ["sea", "hill", "sea wave"], "weight": [1.0, 2.0, 3.0]}).to_json(
        tmp_path / "prompts.jsonl", orient="records", lines=True
    )
    argv = [
        "--model", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl", "--backend", "transformers",
        "--rewards", f"{tmp_path}/rules.py:length", "--gold_reward", f"{tmp_path}/rules.py:waves",
        "--n", 8, "--max_completion_length", 6, "--num_prompts", 2, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    assert call(bon, *argv) == 0
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert scores["prompt_id"].tolist() == [0] * 8 + [1] * 8
    assert scores["completion_id"].tolist() == [*range(8), *range(8)]
    assert scores["completion"].nunique() > 3
    assert scores["length"].tolist() == [len(text) for text in scores["completion"]]
    weight = scores["prompt_id"].map({0: 1.0, 1: 2.0})
    gold = weight * scores["completion"].str.count("wave") - 0.1 * scores["length"] + scores["prompt"].str.len()
    np.testing.assert_allclose(scores["gold"], gold, rtol=1e-5)
    entry = read_summary(tmp_path / "out")["best_of_n"]["length"]
    assert entry["n"] == [1, 2, 4, 8] and entry["gold"][0] == pytest.approx(scores["gold"].mean())


def test_best_of_n_of_real_answers(tmp_path):
    """600 instructions x 32 models' answers with a judge's score; the proxy is the length of the answer."""
    folder = Path(os.environ.get("ALIGN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    source = folder / "instruction_responses.parquet"
    if not source.exists():
        pytest.skip(f"{source} is missing (set ALIGN_SHARED_DATA to its folder)")
    frame = pd.read_parquet(source)
    frame["length"] = frame["completion"].str.len().astype(float)
    frame.to_parquet(tmp_path / "scores.parquet")
    argv = [tmp_path / "scores.parquet", "--proxy", "length", "--min_answers", 32, "--output_dir", tmp_path / "out"]
    assert call(bon, *argv) == 0
    entry = read_summary(tmp_path / "out")["best_of_n"]["length"]
    assert entry["n"] == [1, 2, 4, 8, 16, 32] and entry["prompts"] == 597
    full = frame.groupby("prompt").filter(lambda rows: len(rows) == 32)
    assert entry["gold"][0] == pytest.approx(full["gold"].mean())
    longest = full.groupby("prompt").apply(lambda rows: rows.loc[rows["length"] == rows["length"].max(), "gold"].mean())
    assert entry["gold"][-1] == pytest.approx(longest.mean())
    assert entry["gold_low"][0] < entry["gold"][0] < entry["gold_high"][0] < entry["gold_low"][-1]
    assert any("3 of 600 prompts left out" in note for note in entry["notes"])


def test_every_rule_of_an_ensemble():
    members = [np.array([1.0, 2.0, 6.0]), np.array([3.0, 1.0, 2.0])]
    standard = np.stack([(m - m.mean()) / m.std() for m in members])
    expected = {
        "wco": standard.min(0),
        "uwo:0.5": standard.mean(0) - 0.5 * standard.var(0),
        "lcb:2": standard.mean(0) - 2 * standard.std(0),
        "quantile:0.25": np.quantile(standard, 0.25, axis=0),
    }
    for rule, scores in expected.items():
        np.testing.assert_allclose(bon.ensemble_scores(members, rule), scores, rtol=1e-12)
