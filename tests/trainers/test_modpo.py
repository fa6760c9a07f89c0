"""MODPOTrainer: the closed-form optimum, margins, agreement, LoRA, export."""

import math
from itertools import combinations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.data.collate import right_pad
from align.errors import ConfigError
from align.modeling.load import load_policy
from align.modeling.logprobs import token_logps
from align.trainers.modpo import MODPOConfig, MODPOTrainer
from tests.trainers.tiny_runs import QUIET, logged

PROMPTS = ("tell me about the garden : ", "describe the ocean : ")
WORDS = ("rose", "thanks", "well", "ugly")
STRENGTHS = {PROMPTS[0]: (1, 2, 3, 4), PROMPTS[1]: (4, 1, 3, 2)}  # exp(reward) of the words
LETTERS = {word: 0.7 * len(word) for word in WORDS}
VOWELS = {word: 0.9 * sum(letter in "aeiou" for letter in word) for word in WORDS}


def letters(completions, **_):
    return [LETTERS[word] for word in completions]


def vowels(completions, **_):
    return [VOWELS[word] for word in completions]


def exact_pairs() -> Dataset:
    """Bradley-Terry in log(strength), exactly: of s + t comparisons of two words, the one of strength s wins s."""
    rows = []
    for prompt, strengths in STRENGTHS.items():
        for (a, s), (b, t) in combinations(zip(WORDS, strengths, strict=True), 2):
            rows += [{"prompt": prompt, "chosen": a, "rejected": b}] * s
            rows += [{"prompt": prompt, "chosen": b, "rejected": a}] * t
    return Dataset.from_list(rows)


def config(folder, **options) -> MODPOConfig:
    defaults = {
        **QUIET,
        "output_dir": str(folder),
        "per_device_train_batch_size": 60,
        "max_length": 32,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "beta": 0.5,
        "objective": "strength",
        "weights": {"strength": 0.5, "letters": 0.5},
    }
    return MODPOConfig(**{**defaults, **options})


def distribution(model, tokenizer, prompt: str) -> torch.Tensor:
    """log p of every word (and the end after it) as an answer to the prompt, given that it is one of them."""
    start = tokenizer(prompt)["input_ids"]
    sequences = [[*start, *tokenizer(word)["input_ids"], tokenizer.eos_token_id] for word in WORDS]
    ids, attention = right_pad(sequences, tokenizer.pad_token_id)
    with torch.no_grad():
        return token_logps(model.eval(), ids, attention)[:, len(start) - 1 :].sum(-1).log_softmax(0)


def optimum(reference: torch.Tensor, prompt: str, weights: dict[str, float], beta: float) -> torch.Tensor:
    """log of ref * exp(w . r / beta), normalised over the words."""
    rewards = {
        "strength": [math.log(s) for s in STRENGTHS[prompt]],
        "letters": list(LETTERS.values()),
        "vowels": list(VOWELS.values()),
    }
    total = sum(weight * torch.tensor(rewards[name]) for name, weight in weights.items())
    return (reference + total / beta).log_softmax(0)


@pytest.mark.parametrize(
    ("weights", "beta", "lora"),
    [
        ({"strength": 0.2, "letters": 0.3, "vowels": 0.5}, 0.25, None),
        ({"strength": 1.0, "letters": -0.5}, 0.5, LoraConfig(r=8, target_modules="all-linear", lora_alpha=16)),
    ],
)
def test_the_trained_policy_is_the_closed_form_optimum(policy, tokenizer, tmp_path, weights, beta, lora):
    """ref * exp(w . r / beta) among the words, in total variation, from pairs that are exactly Bradley-Terry."""
    trainer = MODPOTrainer(
        policy,
        [{"letters": letters, "vowels": vowels}[name] for name in weights if name != "strength"],
        config(
            tmp_path, weights=weights, beta=beta, max_steps=100, learning_rate=5e-3, lr_scheduler_type="cosine",
            logging_steps=50, precompute_ref_log_probs=True,
        ),
        exact_pairs(),
        peft_config=lora,
    )  # fmt: skip
    start = load_policy(policy)
    before = {prompt: distribution(start, tokenizer, prompt) for prompt in PROMPTS}
    trainer.train()
    for prompt in PROMPTS:
        expected = optimum(before[prompt], prompt, weights, beta)
        found = distribution(trainer.model, tokenizer, prompt)
        distance = (found.exp() - expected.exp()).abs().sum() / 2
        moved = (before[prompt].exp() - expected.exp()).abs().sum() / 2
        assert distance < 1e-3 and moved > 0.1


def test_one_step_is_trl_with_a_shifted_reference(policy, tokenizer, tmp_path):
    """MODPO is DPO at beta / w_k against log ref + w_-k . r_-k / beta: TRL's own trainer takes the same step."""
    import trl

    weights, beta = {"strength": 0.4, "letters": 0.6}, 0.2
    pairs = exact_pairs().select(range(0, 60, 3))
    shared = {"per_device_train_batch_size": 20, "max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.0}
    ours = MODPOTrainer(policy, letters, config(tmp_path, weights=weights, beta=beta, **shared), pairs)
    ours.train()
    args = trl.DPOConfig(
        **{**QUIET, "bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True, **shared},
        output_dir=str(tmp_path / "trl"), beta=beta / weights["strength"], max_length=32,
    )  # fmt: skip
    theirs = trl.DPOTrainer(load_policy(policy), args=args, train_dataset=pairs, processing_class=tokenizer)

    def shift(row):
        """The reference's log-probs of TRL's tokenised row, plus the margin."""
        return {
            f"ref_{side}_logps": row[f"ref_{side}_logps"] + weights["letters"] * LETTERS[word] / beta
            for side in ("chosen", "rejected")
            for word in [tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True).strip()]
        }

    theirs.train_dataset = theirs.train_dataset.map(shift)
    theirs.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss")[:3], abs=2e-4)


def test_metrics(policy, tokenizer, tmp_path):
    """At step 0 the policy prefers nothing; its estimate of r_k is then the margins alone, -w_-k . r_-k / w_k."""
    pairs = exact_pairs().select(range(10))
    trainer = MODPOTrainer(policy, letters, config(tmp_path, max_steps=1, per_device_train_batch_size=10), pairs)
    trainer.train()
    chosen = [LETTERS[word] for word in pairs["chosen"]]
    rejected = [LETTERS[word] for word in pairs["rejected"]]
    mean = sum(b - a for a, b in zip(chosen, rejected, strict=True)) / 10
    assert logged(trainer, "rewards/margins") == pytest.approx([mean], abs=1e-4)
    assert logged(trainer, "rewards/chosen") == pytest.approx([-sum(chosen) / 10], abs=1e-4)
    assert logged(trainer, "agreement/strength") == logged(trainer, "agreement/letters") == [0.5]


def test_a_weight_below_0_is_pointed_out_and_asks_for_less(policy, tokenizer, tmp_path, caplog):
    """`agreement` is then with the completion of the lower score."""
    pairs = exact_pairs().filter(lambda row: "thanks" in (row["chosen"], row["rejected"]))  # no two of one score
    found = {}
    for sign in (1, -1):
        args = config(tmp_path, weights={"strength": 1e-3, "letters": sign}, learning_rate=1e-2)
        trainer = MODPOTrainer(policy, letters, args, pairs)
        found[sign] = "weights below 0 ask for less of letters" in caplog.text
        trainer.train()
        assert logged(trainer, "agreement/letters")[1] > 0.9
    assert found == {1: False, -1: True}


def test_a_saved_policy_is_the_trained_one(policy, tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    args = config(tmp_path, max_steps=5, learning_rate=1e-2)
    trainer = MODPOTrainer(policy, letters, args, exact_pairs(), peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "| margin rewards | letters |" in (tmp_path / "saved" / "README.md").read_text()
    loaded = load_policy(tmp_path / "saved")
    for prompt in PROMPTS:
        torch.testing.assert_close(
            distribution(loaded, tokenizer, prompt), distribution(trainer.model, tokenizer, prompt), rtol=0, atol=1e-5
        )
    assert (
        distribution(loaded, tokenizer, PROMPTS[0]) - distribution(load_policy(policy), tokenizer, PROMPTS[0])
    ).norm() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"strength": 0.0, "letters": 1.0}}, "'strength' has weight 0.0.*as a margin reward"),
        ({"weights": {"strength": 1.0, "length": 1.0}}, r"objectives are \['strength', 'letters'\].*'length'"),
        ({"weights": "sweep"}, "one weight per objective"),
        ({"weights": "all"}, "mapping from objective to weight, or `sweep`"),
        ({"sweep_points": 5}, "only for `weights: sweep`"),
        ({"objective": "letters"}, "name of the pairs' own objective and of another"),
        ({"loss_type": "ipo"}, "loss_type cannot be 'ipo'; valid: sigmoid, hinge"),
        ({"weights": {"strength": math.nan, "letters": 1.0}}, "must be finite"),
        ({"weights": {"strong": 0.5, "letters": 0.5}}, "the pairs' own objective is 'strength'"),
        ({"weights": "sweep", "sweep_min_weight": 1.0}, "sweep_min_weight must be from 0 to below 1"),
    ],
)
def test_what_is_refused(policy, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        MODPOTrainer(policy, letters, config(tmp_path, **options), exact_pairs())
