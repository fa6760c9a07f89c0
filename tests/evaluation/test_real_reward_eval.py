"""`align reward-eval` on human preference pairs, for a rule and for an ensemble trained on some of them."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from align.cli.main import main
from tests.evaluation.pages import figures_of
from tests.evaluation.test_real_best_of_n import tiny_classifier_base

ROOT = Path(__file__).parents[2]
PAIRS = Path(os.environ.get("ALIGN_SHARED_DATA", ROOT.parent / "shared" / "data")) / "hh_harmless_pairs.parquet"


@pytest.mark.skipif(not PAIRS.exists(), reason=f"needs {PAIRS} (set ALIGN_SHARED_DATA to its folder)")
def test_an_ensemble_and_a_rule_on_human_preferences(tmp_path, capsys):
    rows = pd.read_parquet(PAIRS)
    rows = rows[rows.chosen.str.strip() != ""]
    length = rows.prompt.str.len() + rows[["chosen", "rejected"]].map(len).max(axis=1)
    short = rows[length < 700]
    train, held_out = tmp_path / "train.parquet", tmp_path / "test.parquet"
    short[:48].to_parquet(train)
    rows[-120:].to_parquet(held_out)
    tiny_classifier_base(tmp_path / "base", list(short.chosen[:300]))
    options = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": train,
        "output_dir": tmp_path / "rm",
        "max_length": 512,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "normalizer_pairs": 32,
        "ensemble": 2,
        "save_strategy": "no",
        "report_to": "none",
    }
    assert main(["reward", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]) == 0
    (tmp_path / "rules.py").write_text("def length(completions):\n    return [float(len(t)) for t in completions]\n")

    argv = ["--data", held_out, "--rewrites", "first_letter_case", "closing", "--rewrite_pairs", 20]
    ensemble = f"{{type: ensemble, name: rm, path: {tmp_path}/rm, aggregation: mean}}"
    member = f"{{type: classifier, path: {tmp_path}/rm/member_0}}"
    rule = f"{tmp_path}/rules.py:length"
    out = tmp_path / "out"
    assert main(["reward-eval", *(str(word) for word in (ensemble, member, rule, *argv, "--output_dir", out))]) == 0

    result = json.loads((out / "reward_eval.json").read_text())
    assert list(result["rewards"]) == ["rm", "member_0", "length"]
    accuracy = (rows.chosen.str.len() > rows.rejected.str.len())[-120:].mean()
    assert result["rewards"]["length"]["strict_accuracy"]["value"] == pytest.approx(accuracy)
    assert result["rewards"]["length"]["length"]["prefers_longer"] == 1
    normalizer = json.loads((tmp_path / "rm" / "member_0" / "reward_normalizer.json").read_text())
    calibration = result["rewards"]["member_0"]["calibration"]
    assert f"times {normalizer['std']:.4g}" in calibration["unit"] and 0 <= calibration["ece"] < 0.6
    members = result["agreement"]["members of rm"]
    assert members["names"] == ["member 0", "member 1"] and 0.3 < members["same_ranking"][0][1] < 1
    assert members["accuracy"][0] == pytest.approx(result["rewards"]["member_0"]["accuracy"]["value"])
    assert result["rewards"]["rm"]["rewrites"]["closing"]["score_shift"]["value"] > 0
    drawn = figures_of(out / "reward_eval.html")
    assert len(drawn) == 10 and all(figure["curves"] for figure in drawn)
    assert "120 pairs" in capsys.readouterr().out
