"""The model card names what a reader asks: base, data, method and paper, rewards, the curve's verdict, versions."""

import json

import numpy as np
import torch
import transformers

from align.cli.main import main
from align.data import load_rows, toy
from align.evaluation.completions_file import read_completions
from align.evaluation.peak import analyse_peak
from align.evaluation.records import read_run
from align.lazy import load
from align.methods import METHODS
from align.trainers.dpo import DPOTrainer
from align.trainers.remax import ReMaxTrainer
from tests.trainers import sparse_runs
from tests.trainers.core.test_saved import lora
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import prompts, remax_config, tiny_model, wanted_words


def saved_policy(folder) -> str:
    tiny_model(toy.tokenizer()).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


def rows_of(folder) -> dict[str, str]:
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")][1:]
    return {name: value for name, value in (line.strip("| ").split(" | ", 1) for line in lines if " | " in line)}


def test_every_method_has_its_own_paper_and_tag():
    trainers = {name: load(method.trainer) for name, method in METHODS.items()}
    tags = {name: trainer._tag_names[-1] for name, trainer in trainers.items()}
    assert tags == {name: name for name in METHODS} | {"reward": "reward-trainer"}  # TRL's
    papers = {name: trainer.paper for name, trainer in trainers.items()}
    assert papers.pop("sft") is None
    assert all(papers.values()) and len({*papers.values()}) == len(papers)


def test_an_on_policy_run(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts(16)))
    rows = load_rows(tmp_path / "train.jsonl")
    policy = saved_policy(tmp_path / "policy")
    args = remax_config(tmp_path / "run", eval_strategy="steps", eval_steps=1, reward_weights=[0.5])
    trainer = ReMaxTrainer(policy, wanted_words, args, rows, prompts(8, seed=1), gold_reward="align.data.toy:gold")
    trainer.train()
    trainer.save_model()
    card = rows_of(tmp_path / "run")
    assert card["base model"] == policy
    assert card["method"] == "ReMax (Li et al. 2023, arXiv 2310.10505)"
    assert card["data"] == f"{tmp_path / 'train.jsonl'}, 16 rows" and card["evaluation data"] == "8 rows"
    assert card["rewards"] == "wanted_words (weight 0.5)" and card["gold reward"] == "gold, which judges only"
    run = read_run(tmp_path / "run")
    peak = analyse_peak(run.per_prompt["proxy"], run.per_prompt["gold"], seed=run.seed)
    assert card["proxy and gold"].startswith(f"{peak.verdict}, on 8 prompts: gold {np.mean(run.gold[0]):.4g} at step 0")
    ends = f"; proxy {run.proxy[0]:.4g}, at that peak {run.proxy[peak.peak]:.4g}, at the end {run.proxy[peak.end]:.4g}"
    assert card["proxy and gold"].endswith(ends)
    assert card["steps"] == "2" and "`max_completion_length: 6`" in card["settings"]
    assert "accelerator_config" not in card["settings"] and "do_eval" not in card["settings"]  # nobody sets them
    assert f"transformers {transformers.__version__}, " in card["versions"]
    assert f"torch {torch.__version__}" in card["versions"] and "align-rlhf " in card["versions"]


def test_another_run_keeps_results_of_the_one_before_under_other_names(tmp_path):
    """Curve, completions and pictures of masks, which DPO does not write; a run that is resumed keeps its own."""
    names = ["overoptimization.jsonl", "completions.jsonl", "masks.json", "masks.html", "threshold_search.json"]
    policy, folder = saved_policy(tmp_path / "policy"), tmp_path / "run"
    sparse_runs.trainer(policy, folder, max_steps=1).train()
    assert {"masks.json", "masks.html"} <= {path.name for path in folder.iterdir()}
    for name in names:
        (folder / name).write_text("earlier")
    options = {"num_logged_completions": 1, "max_new_tokens": 2, "eval_strategy": "steps", "eval_steps": 1}

    def train(resume, **options):
        args = dpo_config(folder, save_strategy="steps", save_steps=1, **options)
        trainer = DPOTrainer(policy, args, toy_pairs(16), toy_pairs(4, seed=1))
        trainer.train(resume)
        trainer.save_model()

    train(None, max_steps=1, **options)
    old = {name: folder / f"{name.partition('.')[0]}.1.old.{name.partition('.')[2]}" for name in names}
    assert all(path.read_text() == "earlier" for path in old.values())
    assert [name for name in names if (folder / name).exists()] == ["completions.jsonl"]
    train(True, max_steps=2, **options)
    assert [record["step"] for record in read_completions(folder)] == [1, 2]
    assert not (folder / "completions.2.old.jsonl").exists()


def test_an_adapter_and_its_export(tmp_path):
    policy = saved_policy(tmp_path / "policy")
    args = dpo_config(tmp_path / "run", max_steps=1, loss_type="ipo")
    trainer = DPOTrainer(policy, args, toy_pairs(16), peft_config=lora())
    trainer.train()
    trainer.save_model()
    card = rows_of(tmp_path / "run")
    assert card["method"] == "DPO, loss ipo (Rafailov et al. 2023, arXiv 2305.18290)" and "rewards" not in card
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert card["adapter"] == f"LoRA, r 4, alpha 16, on {layers}, beside float32 weights"
    assert "tags: [align, trl, dpo]" in (tmp_path / "run" / "README.md").read_text().splitlines()
    assert trainer.model.model_tags == ["align", "trl", "dpo"]  # with which push_to_hub tags it
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    exported = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in exported and "library_name: peft" not in exported
    assert rows_of(tmp_path / "out")["exported"].startswith("its adapter merged, in float32; log-probs differ by ")
