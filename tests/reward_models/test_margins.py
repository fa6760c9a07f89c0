"""Margin rewards: scored on what trains, kept on disk, and never confused with those of other data or rewards."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from align.data import tokenize_pairs, toy
from align.errors import ConfigError, RewardError
from align.modeling.fingerprint import fingerprint
from align.modeling.load import load_policy
from align.reward_models.base import Reward, RewardOutput
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import RewardEnsemble
from align.reward_models.implicit import ImplicitReward
from align.reward_models.margins import COLUMNS, MarginRewards
from align.reward_models.normalizer import Normalizer
from tests.modeling.tiny import causal, classifier

TOKENIZER = toy.tokenizer()


class Counting(Reward):
    """Words per completion times `scale`; counts how many completions it was asked for."""

    calls = 0

    def __init__(self, name="words", scale=1.0):
        self.name, self.scale = name, scale

    def _score(self, batch):
        type(self).calls += len(batch)
        return RewardOutput(self.scale * torch.tensor([float(len(text.split())) for text in batch.completions]))


@pytest.fixture(autouse=True)
def start_counting():
    Counting.calls = 0


def pairs(count=6, max_length=32, **columns) -> Dataset:
    rows = toy.reference_text(toy.split_prompts(0, count)[0], 2, 0)
    rows = [
        {"prompt": a["prompt"], "topic": a["topic"], "chosen": a["completion"] + " well", "rejected": b["completion"]}
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    return tokenize_pairs(Dataset.from_list([{**row, **columns} for row in rows]), TOKENIZER, max_length=max_length)


def margins(dataset, reward, folder):
    return MarginRewards(reward, TOKENIZER, folder).add_to(dataset)


def test_scores_of_every_reward_stand_beside_their_pair(tmp_path):
    found = margins(pairs(), [Counting(), Counting("twice", 2.0), toy.gold_helpfulness], tmp_path)
    for side in ("chosen", "rejected"):
        for row in found:
            words = len(row[side].split())
            helpful = toy.helpfulness(row["topic"], row[side])
            assert row[f"{side}_margin_rewards"] == [words, 2 * words, helpful]
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "usual").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_scored_once_per_dataset(tmp_path):
    first = margins(pairs(), Counting(), tmp_path)
    assert Counting.calls == 12
    second = margins(pairs(), Counting(), tmp_path)
    assert Counting.calls == 12 and first[COLUMNS[0]] == second[COLUMNS[0]]
    margins(pairs(), [Counting(), Counting("twice", 2.0)], tmp_path)  # a further objective: only it is scored
    assert Counting.calls == 24
    margins(pairs(), Counting(), None)  # no folder: nothing is kept or read
    assert Counting.calls == 36


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.select(range(5)),
        lambda rows: rows.select([1, 0, 2, 3, 4, 5]),
        lambda rows: rows.add_column("weather", ["fine"] * 6),
        lambda rows: pairs(max_length=14),
    ],
    ids=["fewer rows", "other order", "a column more", "cut shorter"],
)
def test_changed_rows_are_noticed(tmp_path, change):
    margins(pairs(), Counting(), tmp_path)
    before = Counting.calls
    found = margins(change(pairs()), Counting(), tmp_path)
    assert Counting.calls == before + 2 * len(found)


def test_a_changed_reward_is_noticed(tmp_path):
    margins(pairs(), Counting(), tmp_path)
    found = margins(pairs(), Counting(scale=3.0), tmp_path)
    assert Counting.calls == 24 and found[0][COLUMNS[0]] == [3.0 * len(found[0]["chosen"].split())]


def test_a_cut_completion_is_shown_as_what_is_left_of_it(tmp_path):
    whole, cut = (pairs(max_length=length) for length in (32, 10))
    found = margins(cut, Counting(), None)
    lengths = [len(ids) for ids in cut["chosen_ids"]]
    assert any(a < len(b) for a, b in zip(lengths, whole["chosen_ids"], strict=True))
    for row, ids in zip(found, cut["chosen_ids"], strict=True):
        ended = ids[-1] == TOKENIZER.eos_token_id
        assert row[COLUMNS[0]] == [len(ids) - ended]  # one token per word


def test_chat_completions_keep_their_form(tmp_path):
    """A cut answer of a conversation is a message with what is left of its text."""
    rows = pairs()
    rows = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "chosen_ids": row["chosen_ids"][:2],
        },
        load_from_cache_file=False,
    )

    def words(completions, **_):
        assert all(len(messages) == 1 and messages[0]["role"] == "assistant" for messages in completions)
        return [len(messages[0]["content"].split()) for messages in completions]

    found = margins(rows, words, None)
    assert found[COLUMNS[0]] == [[2.0]] * 6
    assert found[COLUMNS[1]] == [[len(row["rejected"][0]["content"].split())] for row in rows]


def adapter(tmp_path, seed: int):
    base = tmp_path / "base"
    model = causal(dtype=torch.float32, vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    model.save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_policy(base), lora).save_pretrained(tmp_path / f"adapter-{seed}")
    TOKENIZER.save_pretrained(tmp_path / f"adapter-{seed}")
    return {"type": "implicit", "path": str(tmp_path / f"adapter-{seed}"), "beta": 0.2, "name": "implicit"}


def test_an_implicit_margin_is_the_log_ratio_of_the_adapter(tmp_path):
    from align.data.collate import PairCollator
    from align.modeling.pairs import pair_tokens

    spec = adapter(tmp_path, 1)
    rows = pairs()
    found = margins(rows, spec, tmp_path / "margins")
    batch = PairCollator(TOKENIZER.pad_token_id)(list(rows))
    with torch.no_grad():
        new, old = (pair_tokens(load_policy(tmp_path / name).eval(), batch) for name in ("adapter-1", "base"))
    expected = 0.2 * (new.logps - old.logps).sum(-1)
    values = [value for column in COLUMNS for (value,) in found[column]]
    assert values == pytest.approx(expected.tolist(), abs=1e-4)


def test_fingerprints_of_models_follow_their_weights(tmp_path):
    first, second = (ImplicitReward(adapter(tmp_path, seed)["path"]) for seed in (1, 2))
    again = ImplicitReward(adapter(tmp_path, 1)["path"], batch_tokens=64)  # in other portions, the same scores
    first.name = second.name = again.name = "same"
    assert fingerprint(first) == fingerprint(again) != fingerprint(second)
    again.model.get_base_model().lm_head.weight.data[0, 0] += 1e-3
    assert fingerprint(first) != fingerprint(again)
    first.beta = 0.3
    assert fingerprint(first) != fingerprint(ImplicitReward(tmp_path / "adapter-1", name="same"))


def test_fingerprints_of_functions_follow_their_file(tmp_path):
    """In processes of their own, as two runs are."""
    script = textwrap.dedent("""
        from align.modeling.fingerprint import fingerprint
        from align.reward_models.rules import RuleReward
        scale = 2
        def bound(factor):
            return lambda completions: [factor for _ in completions]
        for rule in ("rules.py:words", bound(scale), bound(3)):
            print(fingerprint(RuleReward(rule, name="words")))
    """)

    def run(text: str) -> list[str]:
        (tmp_path / "rules.py").write_text(text)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        out = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return out.stdout.split()

    text = "def words(completions): return [WEIGHT * len(c) for c in completions]\nWEIGHT = 1\n"
    first, again, changed = run(text), run(text), run(text.replace("= 1", "= 2"))
    assert first == again and len(set(first)) == 3
    assert changed[0] != first[0] and changed[1:] == first[1:]


def test_fingerprints_tell_functions_of_one_name_in_one_file(tmp_path):
    """A run whose lambda was another one of the same script was resumed in silence."""
    text, found = "a, b = (lambda completions: [1.0]), (lambda completions: [2.0])\nc = lambda completions: [1.0]", {}
    (tmp_path / "two.py").write_text(text)
    exec(compile(text, tmp_path / "two.py", "exec"), found)
    marks = [fingerprint(found[name]) for name in "abc"]
    assert len(set(marks)) == 3 and marks[0] == fingerprint(found["a"])


def test_a_reward_that_cannot_be_recognised_is_scored_every_time(tmp_path, caplog):
    reward = Counting()
    reward.connection = (number for number in range(3))  # a generator: nothing tells what it will give
    for calls in (12, 24):
        margins(pairs(), reward, tmp_path)
        assert Counting.calls == calls
    assert "not kept on disk" in caplog.text and not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="two rewards have the same name"):
        MarginRewards([Counting(), Counting()], TOKENIZER, tmp_path)
    found = margins(pairs(), Counting(), tmp_path)
    with pytest.raises(ConfigError, match="column 'chosen_margin_rewards' already"):
        margins(found, Counting(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"cut off")
    with pytest.raises(RewardError, match="cannot be read.*delete it"):
        margins(pairs(), Counting(), tmp_path)
    save_file({"scores": torch.zeros(len(pairs()), 2)}, file)
    with pytest.raises(RewardError, match="no checksum .an older version"):
        margins(pairs(), Counting(), tmp_path)
    freed = MarginRewards(Counting(), TOKENIZER, tmp_path)
    freed.free()
    with pytest.raises(RewardError, match="has not scored these pairs"):
        freed.add_to(pairs(3))


def test_a_normalised_classifier_is_pointed_out(tmp_path, caplog):
    reward = Counting()
    reward.normalized = True
    MarginRewards(reward, TOKENIZER, tmp_path)
    assert "margin reward words is normalised: " in caplog.text and "normalize: false" in caplog.text


def test_normalised_classifiers_in_an_ensemble_are_pointed_out(tmp_path, caplog):
    options = {"tokenizer": TOKENIZER, "normalizer": Normalizer(0.0, 2.0, 8, "answers")}
    members = [ClassifierReward(classifier(), name=name, **options) for name in ("a", "b")]
    MarginRewards(RewardEnsemble(members, "mean", name="both"), TOKENIZER, tmp_path)
    assert "margin reward both is normalised (a, b): " in caplog.text
