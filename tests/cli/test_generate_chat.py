"""`align generate` and `align chat` as a user calls them, on a tiny model with a chat template."""

import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from align.cli.chat import Speaker
from align.cli.main import main
from align.data.limits import longest_input
from align.errors import ConfigError
from align.evaluation import answers as answers_module
from align.evaluation.answers import Drawing, generate_answers
from align.evaluation.prompt_file import as_chat, read_prompts
from align.modeling.load import load_policy, load_tokenizer
from tests.modeling import tiny
from tests.modeling.test_export import adapter
from tests.reward_models import worlds

REWARD = "def short(prompts, completions, **_):\n    return [-float(len(c[0]['content'])) for c in completions]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny.causal(dtype=torch.float32, seed=3).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_become_answers_with_scores(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw3\nw4 w5\n")
    argv = ["generate", model, "--prompts", "prompts.txt", "--to", "out/answers.jsonl", "--n", "2"]
    argv += ["--max_completion_length", "6", "--backend", "transformers", "--system", "w9"]
    assert main([*argv, "--rewards", "my_rewards.py:short"]) == 0
    found = lines(tmp_path / "out/answers.jsonl")
    assert [(row["row"], row["sample"]) for row in found] == [(r, s) for r in range(3) for s in range(2)]
    asked = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w3"}]
    assert found[2]["prompt"] == found[3]["prompt"] == asked
    assert all(row["short"] == -len(row["completion"]) for row in found)
    assert any(a["completion"] != b["completion"] for a, b in zip(found[::2], found[1::2], strict=True))
    for row in found:
        assert row["finish_reason"] == "stop" or row["tokens"] == 6
        assert "</s>" not in row["completion"] and "<pad>" not in row["completion"]
    mean = sum(row["short"] for row in found) / 6
    assert f"short: mean {mean:.4g} over 6 answers" in capsys.readouterr().out


def test_greedy_answers_are_those_of_transformers(model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w1 w2 ", "topic": 7}) + "\n")
    rows = read_prompts(str(tmp_path / "prompts.jsonl"))
    drawing = Drawing(temperature=0, max_completion_length=5, backend="transformers")
    (row,) = lines(generate_answers(model, rows, tmp_path / "a.jsonl", drawing))
    tokenizer = load_tokenizer(model)
    ids = tokenizer("w1 w2 ", return_tensors="pt")["input_ids"]
    theirs = load_policy(model).generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=1, pad_token_id=0)
    text = tokenizer.decode([token for token in theirs[0, 2:].tolist() if token != 1])
    assert row["completion"] == text and row["topic"] == 7 and row["prompt"] == "w1 w2 "


def test_an_interrupted_file_is_finished_as_it_would_have_been(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(answers_module, "SEQUENCES_AT_ONCE", 4)  # two prompts at once
    (tmp_path / "p.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(5)))
    rows = read_prompts(str(tmp_path / "p.txt"))
    drawing = Drawing(n=2, max_completion_length=5, backend="transformers")
    whole = generate_answers(model, rows, tmp_path / "whole.jsonl", drawing).read_text()
    part = tmp_path / "part.jsonl"
    generate_answers(model, rows, part, drawing)
    text = part.read_text().splitlines(keepends=True)
    part.write_text("".join(text[:5]) + text[5][:20])  # within the third prompt
    logging.getLogger("align").propagate = True
    caplog.set_level(logging.INFO, logger="align")
    assert generate_answers(model, rows, part, drawing).read_text() == whole
    assert "holds the answers to 2 of 5 prompts" in caplog.text
    before = part.stat().st_mtime_ns
    caplog.clear()
    generate_answers(model, rows, part, drawing)
    assert part.stat().st_mtime_ns == before
    assert caplog.messages == [f"{part} holds all 10 answers: nothing is left to draw"]


def test_corrected_columns_reach_the_rewards_of_answers_that_are_there(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("def named(completions, answer):\n    return [float(len(a)) for a in answer]\n")
    argv = ["generate", model, "--prompts", "p.jsonl", "--to", "a.jsonl", "--backend", "transformers", "--no-chat"]
    argv += ["--max_completion_length", "3", "--n", "2", "--rewards", "r.py:named"]
    found = []
    for answer in ("é", "long"):
        rows = [{"prompt": f"w{i}", "answer": answer * i} for i in (1, 2)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(argv) == 0
        found.append(lines(tmp_path / "a.jsonl"))
    assert [row["named"] for of in found for row in of] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [row["completion"] for row in found[0]] == [row["completion"] for row in found[1]]


def test_a_prompt_is_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufefffirst\r\nof\u2028one\fline\n\n third \n".encode())
    assert read_prompts(str(tmp_path / "p.txt"))["prompt"][:] == ["first", "of\u2028one\fline", "third"]


def test_a_run_that_has_saved_no_model_is_named(tmp_path, capsys):
    (tmp_path / "run/checkpoint-9").mkdir(parents=True)
    (tmp_path / "run/checkpoint-10").mkdir()
    assert main(["chat", str(tmp_path / "run")]) == 2
    assert (
        f"the folder holds no model; its newest checkpoint is {tmp_path / 'run/checkpoint-10'}"
        in capsys.readouterr().err
    )


def test_the_identity_says_what_auto_was(model, tmp_path, monkeypatch):
    from align.rollout.make import BACKENDS

    for installed, name in ((True, "vllm"), (False, "transformers")):
        monkeypatch.setitem(BACKENDS, "vllm", replace(BACKENDS["vllm"], package="json" if installed else "nothing"))
        assert answers_module._identity(model, [], Drawing(), "float32")["backend"] == name


def test_a_file_of_another_drawing_is_refused(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1\nw2\n")
    argv = ["generate", model, "--prompts", str(tmp_path / "p.txt"), "--to", str(tmp_path / "a.jsonl")]
    argv += ["--max_completion_length", "3", "--backend", "transformers"]
    assert main(argv) == 0
    other = adapter(model, tmp_path / "run", target_modules=["q_proj"])
    for changed, named in (
        ([*argv, "--seed", "1"], "seed 0, now 1"),
        ([*argv, "--dtype", "bfloat16"], "dtype 'float32', now 'bfloat16'"),
        ([*argv, "--system", "w9"], "prompts '"),
        (["generate", other, *argv[2:]], "weights '"),
    ):
        capsys.readouterr()
        assert main(changed) == 2
        shown = capsys.readouterr().err
        assert f"holds answers of another drawing ({named}" in shown
    (tmp_path / "hh.txt").write_text("Human: w1 Assistant:\n")
    (tmp_path / "hh.jsonl").write_text(json.dumps({"prompt": "\n\nHuman: w1\n\nAssistant:"}) + "\n")
    assert main([*argv[:3], str(tmp_path / "hh.jsonl"), "--to", str(tmp_path / "b.jsonl")]) == 2
    assert "convert them with `align data convert" in capsys.readouterr().err


def test_answers_of_another_adapter_or_another_end_are_not_added_to_a_file(model, tmp_path, capsys):
    """Half of a file was drawn with one `lora_alpha`, or one end token, and half with another, in silence."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    run = Path(adapter(str(base), tmp_path / "run", target_modules=["q_proj"]))
    (tmp_path / "p.txt").write_text("w1\nw2\n")
    argv = ["generate", str(run), "--prompts", str(tmp_path / "p.txt"), "--to", str(tmp_path / "a.jsonl")]
    argv += ["--max_completion_length", "3", "--backend", "transformers"]
    assert main(argv) == main(argv) == 0
    changes = (
        (run / "adapter_config.json", {"lora_alpha": 99}, r"(adapter.lora_alpha "),
        (base / "generation_config.json", {"eos_token_id": [1, 9]}, "(end_tokens [1], now [1, 9])"),
        (base / "config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "(config '"),
    )
    for path, change, named in changes:
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        capsys.readouterr()
        assert main(argv) == 2
        assert f"holds answers of another drawing {named}" in capsys.readouterr().err
        path.write_text(before)
    own = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(own | {"temperature": 0.3, "transformers_version": "9"}))
    assert main(argv) == 0


def test_a_reward_does_not_replace_a_column(model, tmp_path, monkeypatch, capsys):
    """The data's `answer` was replaced by scores, in silence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("def answer(completions, **columns):\n    return [1.0 for _ in completions]\n")
    row = {"prompt": "w1", "answer": 7}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["generate", model, "--prompts", "p.jsonl", "--to", "a.jsonl", "--backend", "transformers", "--no-chat"]
    argv += ["--max_completion_length", "3", "--rewards"]
    for reward, whose in (("r.py:answer", "data"), ("{type: rule, function: r.py:answer, name: tokens}", "answers")):
        name = "answer" if whose == "data" else "tokens"
        assert main([*argv, reward]) == 2
        assert f"the scores of '{name}' have the name of the column '{name}' of the {whose}" in capsys.readouterr().err
        assert not (tmp_path / "a.jsonl").exists()
    assert main([*argv, "{type: rule, function: r.py:answer, name: mine}"]) == 0
    assert main([*argv, "{type: rule, function: r.py:answer, name: mine}"]) == 0  # its scores of before
    (found,) = lines(tmp_path / "a.jsonl")
    assert (found["answer"], found["mine"]) == (7, 1.0)
    (tmp_path / "b.jsonl").write_text(json.dumps(found | {"answer": "seven"}) + "\n")
    with pytest.raises(ConfigError, match="the column 'answer' of the data"):
        answers_module.score_answers(tmp_path / "b.jsonl", {"answer": None})


def test_answers_are_revised(model, tmp_path, capsys):
    """Each is shown to the model, in the data's form, and the next one takes its place; the first ones stay what they
    would have been."""
    (tmp_path / "p.txt").write_text("w1 w2\nw3\n")
    argv = ["generate", model, "--prompts", str(tmp_path / "p.txt"), "--backend", "transformers"]
    argv += ["--max_completion_length", "5"]
    asked = ["--revisions", "2", "--revision_template", "w9"]
    plain, revised, greedy_file = (tmp_path / f"{name}.jsonl" for name in ("plain", "revised", "greedy"))
    assert main([*argv, "--n", "2", "--to", str(plain)]) == 0
    assert main([*argv, "--n", "2", "--to", str(revised), *asked]) == 0
    for first, last in zip(lines(plain), lines(revised), strict=True):
        assert last["earlier"][0] == first["completion"] and len(last["earlier"]) == 2
        assert last["prompt"] == first["prompt"] and "earlier" not in first
    assert main([*argv, "--temperature", "0", "--to", str(greedy_file), *asked]) == 0
    for row in lines(greedy_file):
        answers = [*row["earlier"], row["completion"]]
        for shown, better in zip(answers, answers[1:], strict=False):
            turns = [{"role": "assistant", "content": shown}, {"role": "user", "content": "w9"}]
            assert better.split() == greedy(model, [*row["prompt"], *turns]).split()
    before = revised.read_bytes()
    assert main([*argv, "--n", "2", "--to", str(revised), *asked]) == 0
    assert revised.read_bytes() == before
    capsys.readouterr()
    for options, message in (
        (["--revisions", "1", "--revision_template", "w9"], "revisions 2, now 1"),
        (["--revision_template", "w9"], "--revision_template needs one or more"),
        (["--revisions", "2", "--revision_template", "{answer}"], "w9"),
    ):
        assert main([*argv, "--n", "2", "--to", str(revised), *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*argv, "--to", str(tmp_path / "x.jsonl"), "--revisions", "1", "--revision_template", "{answer}"]) == 2
    assert "would be written as it is" in capsys.readouterr().err


@pytest.fixture
def quiet_model(model, tmp_path):
    """Whose chat template has a variable, as those of models that think have `enable_thinking`."""
    folder = shutil.copytree(model, tmp_path / "quiet")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template += "{% if quiet %}{{ ' w7 w8 w9' }}{% endif %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("where", ["option", "column"])
def test_variables_of_the_chat_template(quiet_model, where, tmp_path, capsys):
    """In the prompts and in those that show an answer."""
    asked, given = [{"role": "user", "content": "w1 w2"}], {"quiet": True}
    row = {"prompt": asked, **({"chat_template_kwargs": given} if where == "column" else {})}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["generate", quiet_model, "--prompts", str(tmp_path / "p.jsonl"), "--to", str(tmp_path / "a.jsonl")]
    argv += ["--backend", "transformers", "--temperature", "0", "--max_completion_length", "5"]
    argv += ["--revisions", "1", "--revision_template", "w9"]
    option = ["--chat_template_kwargs", json.dumps(given)] if where == "option" else []
    assert main([*argv, *option]) == 0
    (found,) = lines(tmp_path / "a.jsonl")
    (first,) = found["earlier"]
    assert first.split() == greedy(quiet_model, asked, **given).split() != greedy(quiet_model, asked).split()
    talk = [*asked, {"role": "assistant", "content": first}, {"role": "user", "content": "w9"}]
    assert found["completion"].split() == greedy(quiet_model, talk, **given).split()
    if where == "option":
        assert main(argv) == 2 and "now None" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([*argv, "--chat_template_kwargs", "quiet"])
        assert "needs names and values as JSON" in capsys.readouterr().err


# ---- chat -----------------------------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, argv, text) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["chat", *argv, "--max_tokens", "5"]) == 0
    return capsys.readouterr().out


def greedy(folder, messages, **variables) -> str:
    """What transformers alone answers."""
    tokenizer, policy = load_tokenizer(folder), load_policy(folder)
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, **variables}
    ids = tokenizer.apply_chat_template(messages, **options)
    output = policy.generate(**ids, do_sample=False, max_new_tokens=5, eos_token_id=1, pad_token_id=0)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_conversation(model, monkeypatch, capsys):
    """Each turn is asked with all before it; /reset forgets them."""
    text = "w1 w2\nw3\n/history\n/reset\nw3\n/exit\nw4\n"
    shown = talk(monkeypatch, capsys, [model, "--temperature", "0"], text).splitlines()
    first = [{"role": "user", "content": "w1 w2"}]
    answer = greedy(model, first)
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "w3"}]
    assert shown.index(f"user: {first[0]['content']}") < shown.index(f"assistant: {greedy(model, second)}")
    alone = greedy(model, [{"role": "user", "content": "w3"}])
    places = [shown.index(line) for line in (answer, greedy(model, second), "the conversation is forgotten")]
    assert places == sorted(places) and alone in shown[places[-1] :]
    assert shown[-1] in (alone, "(cut at 5 tokens)")  # nothing after /exit


def test_a_conversation_draws_as_a_file_of_answers_does(model, tmp_path):
    """The generation config of a chat model holds more than end tokens, which transformers takes in silence."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"repetition_penalty": 1.9, "min_new_tokens": 9, "do_sample": True, "top_k": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    (tmp_path / "p.txt").write_text("w1 w2\n")
    rows = as_chat(read_prompts(str(tmp_path / "p.txt")), system=None, source="p.txt")
    drawing = Drawing(temperature=0, max_completion_length=12, backend="transformers")
    (row,) = lines(generate_answers(str(folder), rows, tmp_path / "a.jsonl", drawing))
    answer, _ = Speaker(str(folder), None).answer(row["prompt"], {"temperature": 0, "top_p": 1.0, "max_tokens": 12})
    assert answer == row["completion"] and row["tokens"] < 9


def test_variables_of_the_chat_template_in_a_conversation(quiet_model, monkeypatch, capsys):
    argv = [quiet_model, "--temperature", "0", "--chat_template_kwargs", '{"quiet": true}']
    said = greedy(quiet_model, [{"role": "user", "content": "w1 w2"}], quiet=True)
    assert said in talk(monkeypatch, capsys, argv, "w1 w2\n").splitlines()


def test_an_adapter_beside_its_base_with_scores(model, tmp_path, monkeypatch, capsys):
    run = adapter(model, tmp_path / "run", target_modules="all-linear")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    argv = [run, "--compare", model, "--temperature", "0", "--system", "w9", "--rewards", "my_rewards.py:short"]
    shown = talk(monkeypatch, capsys, argv, "w5\n")
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w5"}]
    ours, theirs = greedy(run, messages), greedy(model, messages)
    assert ours != theirs
    _, mine, other = shown.replace(f"[{run}]", "\0").replace(f"[{model}]", "\0").split("\0")
    assert ours in mine and f"(short: {-len(ours):.4g})" in mine
    assert theirs in other and f"(short: {-len(theirs):.4g})" in other


def test_commands_and_mistakes(model, monkeypatch, capsys):
    text = "/temperature x\n/temperature 0\n/tokens 2\nw1\n/system w8\n/history\n/nothing\n/tokens 100\nw1\n"
    shown = talk(monkeypatch, capsys, [model], text)
    for line in (
        "/temperature needs a number, not 'x'",
        "temperature: 0\n",
        "(cut at 2 tokens)",
        "system message: w8; the conversation is forgotten\nsystem: w8\n",
        "there is no command /nothing:",
        "tokens, and the model takes 64: /reset it, or lower /tokens)",
    ):
        assert line in shown
    assert main(["chat", model, "--max_tokens", "0"]) == 2
    assert "--max_tokens must be at least 1" in capsys.readouterr().err


def test_a_model_without_positions_talks_too(tmp_path, monkeypatch, capsys):
    """Of states or ALiBi; MPT's ALiBi ends where its table does."""
    folder = tmp_path / "bloom"
    config = transformers.BloomConfig(vocab_size=80, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.3)
    torch.manual_seed(3)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    shown = talk(monkeypatch, capsys, [str(folder), "--temperature", "0"], "w1 w2\n/tokens 100\nw1\n")
    assert greedy(str(folder), [{"role": "user", "content": "w1 w2"}]) in shown and "the model takes" not in shown
    config = transformers.MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=80, expansion_ratio=2)
    mpt = transformers.MptForCausalLM(config)
    assert longest_input(mpt) == 16
    with pytest.raises(RuntimeError):
        mpt(torch.ones(1, 17, dtype=torch.long))
