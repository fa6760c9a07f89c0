"""`--dry-run`: what it prints, that it needs no network for local files, and what it refuses."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from datasets import Dataset

from align.cli import build
from align.cli.dry_run import longest, longest_revised, steps_text, tokenize
from align.cli.main import main
from align.config.resolve import resolve
from align.lazy import load


def sections(text: str) -> dict[str, str]:
    parts = text.split("\n### ")[1:]
    return {part.partition("\n")[0].split(",")[0].split(" (")[0]: part.partition("\n")[2] for part in parts}


def run(capsys, *arguments) -> dict[str, str]:
    assert main([*map(str, arguments), "--dry-run"]) == 0
    return sections(capsys.readouterr().out)


def test_sft(tiny_model, demonstrations, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"method: sft\nmodel_name_or_path: {tiny_model}\nmax_length: 64\nnum_train_epochs: 2\n")
    tokens = ["--dataset_name", demonstrations, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3]
    shown = run(capsys, "sft", "--config", config, *tokens)
    assert list(shown) == ["align sft: dry run", "one step", "data", "first example", "steps", "memory"]
    lines = shown["align sft: dry run"].splitlines()
    assert lines[0].split("#")[0].strip() == "method: sft"
    (line,) = [line for line in lines if line.startswith("max_length: 64")]
    assert line.endswith(f"# {config}, line 3")
    (line,) = [line for line in lines if line.startswith("gradient_accumulation_steps: 3")]
    assert line.endswith("# command line")
    assert shown["one step"] == (
        "2 sequences per device x 3 accumulated x 1 process = 6 sequences -> 1 optimiser step\n"
    )
    assert "12 of 12 rows can be" in shown["data"]
    assert "context | What is 0 plus 0?" in shown["first example"]
    assert "trained |  It is 0.<eos>" in shown["first example"]
    assert shown["steps"] == "12 sequences -> 2 steps per epoch -> 4 optimiser steps in 2 epochs\n"
    memory = {line.split("  ")[1].strip(): line for line in shown["memory"].splitlines()}
    assert {"weights", "gradients", "optimiser states", "logits", "total"} <= set(memory)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_what_is_trained_is_held_in_float32_whatever_it_is_loaded_in(method, tiny_model, pairs, demonstrations, capsys):
    data = demonstrations if method == "sft" else pairs
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--max_length", 64]
    adapter = ("--use_peft", "--lora_target_modules", "q_proj")
    widths = {}
    for name, given in {"full": (), "16": ("--dtype", "bfloat16"), "lora": ("--dtype", "bfloat16", *adapter)}.items():
        memory = run(capsys, method, *tokens, *given)["memory"]
        widths[name] = re.findall(r"(?:parameters|trained) x ([0-9]) bytes", memory)
    assert widths["16"] == widths["full"] == ["4", "4"] and widths["lora"][0] == "2"


def test_a_target_that_the_model_has_not(tiny_model, pairs, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--use_peft", "--dry-run"]
    assert main(["dpo", *map(str, tokens), "--lora_target_modules", "query_key_value"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "LoRA cannot be added to Qwen2ForCausalLM: Target modules" in error and "query_key_value" in error
    layers = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert f"Its linear layers are {layers}" in error and error.endswith("q_proj v_proj, or all-linear)")
    assert main(["dpo", *map(str, tokens), "--lora_task_type", "CAUSAL"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "command line: lora_task_type: PEFT takes no such adapter: Invalid task type: 'CAUSAL'" in error


def test_rows_to_evaluate_on_are_read_too(tiny_model, pairs, demonstrations, tmp_path, capsys):
    tokens = [
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        pairs,
        "--max_length",
        64,
        "--eval_strategy",
        "steps",
    ]
    assert main(["dpo", *map(str, tokens), "--dry-run"]) == 2
    assert "has no split 'test'; it has: train. A file is one split: evaluate on" in capsys.readouterr().err
    held = tmp_path / f"valid{Path(pairs).suffix}"  # all of a file that is named, whatever it is called
    shutil.copy(pairs, held)
    assert f"evaluation: {held}: " in run(capsys, "dpo", *tokens, "--eval_dataset_name", held)["data"]
    assert main(["dpo", *map(str, tokens), "--eval_dataset_name", str(demonstrations), "--dry-run"]) == 2
    assert str(demonstrations) in capsys.readouterr().err


def test_a_mixture_is_told_once(tiny_model, pairs, capsys):
    parts = f"[{{path: {pairs}}}, {{path: {pairs}, weight: 0.5}}]"
    assert main(["dpo", "--model_name_or_path", str(tiny_model), "--datasets", parts, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("rows per epoch: ") == 1 and "rows per epoch" not in shown.err


def test_reward_with_lora(tiny_model, pairs, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--max_length", 64]
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    shown = run(capsys, "reward", *tokens, *lora, "--per_device_train_batch_size", 4, "--max_steps", 5)
    assert shown["one step"] == (
        "4 pairs per device x 1 accumulated x 1 process = 4 pairs -> 8 sequences -> 1 optimiser step\n"
    )
    assert "trained |  It is 1.<eos>" in shown["first example"]
    assert shown["steps"] == "12 pairs -> 3 steps per epoch -> 5 optimiser steps in 1.667 epochs\n"
    counts = {line.split()[0]: line for line in shown["memory"].splitlines()}
    # rank 16 on two 32x32 matrices of two layers, and the trained head of 32 weights
    assert f"{2 * 2 * 16 * 64 + 32:,} trained" in counts["gradients"]


def test_remax_counts_for_several_processes(tiny_model, prompts, rule, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", prompts, "--max_completion_length", 8]
    shape = ["--per_device_train_batch_size", 1, "--num_generations", 4, "--num_train_epochs", 1, "--processes", 5]
    shown = run(capsys, "remax", *tokens, "--rewards.0", rule, *shape)
    assert shown["one step"] == (
        "1 prompts per device x 1 accumulated x 5 processes = 5 prompts x 4 samples -> 20 sequences "
        "-> 1 optimiser step\n"
    )
    assert shown["steps"] == (
        "12 prompts -> 3 steps per epoch -> 3 optimiser steps in 1 epoch; the last step of an epoch has 2 prompts\n"
    )
    assert "the rollouts start here" in shown["first example"]
    assert "reference model" in shown["memory"]
    assert "split over 5" in shown["memory"].splitlines()[-1]


def test_a_run_on_gpus_is_planned_without_one(tiny_model, demonstrations, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", demonstrations, "--bf16", "true"]
    shown = run(capsys, "sft", *tokens, "--per_device_train_batch_size", 1)
    assert "16-bit copies" in shown["memory"] and "split over" not in shown["memory"]
    assert "use_cpu" not in shown[next(iter(shown))]


def test_members_of_one_pass_are_counted_together(tiny_model, pairs, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--use_peft", "--lora_target_modules"]
    tokens += ["all-linear", "--ensemble", 3, "--ensemble_kind", "lora"]
    shown = run(capsys, "reward", *tokens)
    trained = 3 * (2 * 16 * (4 * 64 + 3 * 96) + 32)  # as below: rank 16 in two layers, and the head
    assert f"{trained:,} trained x 4 bytes" in shown["memory"]
    assert "tokens x 6 layers" in shown["memory"]  # two of each member
    half = run(capsys, "reward", *tokens, "--dtype", "bfloat16")
    assert f"parameters x 2 bytes, {trained:,} parameters x 4 bytes" in half["memory"]
    assert main(["reward", *map(str, tokens), "--load_in_4bit", "--dry-run"]) == 2
    assert "load_in_4bit and load_in_8bit with ensemble > 1 are for ensemble_kind separate" in capsys.readouterr().err
    shown = run(capsys, "reward", *tokens, "--load_in_4bit", "--ensemble_kind", "separate")
    assert "20,480 parameters in 4 bits" in shown["memory"]


def test_a_reward_model_counts_on_its_ranks(tiny_model, prompts, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", prompts, "--max_completion_length", 8]
    tokens += ["--per_device_train_batch_size", 1, "--processes", 2, "--rewards.0"]
    shown = run(capsys, "remax", *tokens, f"{{type: classifier, path: {tiny_model}, ranks: [1]}}")["memory"]
    assert re.search(r"reward model .*, on rank 1 alone\n", shown)
    assert re.search(r"total on rank 1 .* with the reward models there\n", shown)
    beyond = f"{{type: classifier, path: {tiny_model}, ranks: [0, 2]}}"
    assert main(["remax", *map(str, tokens), beyond, "--dry-run"]) == 2
    assert "ranks places its model on rank 2, and 2 processes have the ranks 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [None, 16])
def test_a_discriminator_is_trained_and_the_gold_reward_is_not(tiny_model, prompts, rank, tmp_path, capsys):
    gold = shutil.copytree(tiny_model, tmp_path / "gold")
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", prompts, "--max_completion_length", 8]
    tokens += ["--rewards.0", f"{{type: classifier, path: {tiny_model}}}"]
    tokens += ["--gold_reward", f"{{type: classifier, path: {gold}}}"]
    tokens += ["--discriminator_lora_r", rank] if rank else []
    lines = run(capsys, "d2po", *tokens)["memory"].splitlines()
    first = next(i for i, line in enumerate(lines) if f" {tiny_model}: " in line)
    # rank 16 on four 32x32 matrices and three 32x64 ones of two layers, and the head
    trained = 2 * 16 * (4 * 64 + 3 * 96) + 32 if rank else int(lines[first].split()[-5].replace(",", ""))
    assert f"{trained:,} trained x gradient and AdamW's two states" in lines[first + 1]
    assert sum("its training" in line for line in lines) == 1


def test_rows_of_pairs_for_srpo_and_metaapo(tiny_model, pairs, rule, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--per_device_train_batch_size", 2]
    shown = run(capsys, "metaapo", *tokens, "--rewards.0", rule, "--num_generations", 4, "--max_completion_length", 8)
    assert "2 prompts x 4 samples -> 8 sequences" in shown["one step"]
    assert "chosen" in shown["first example"] and "rejected" in shown["first example"]
    found = {method: run(capsys, method, *tokens, "--batching", "padded")["memory"] for method in ("dpo", "srpo")}
    counted = {m: int(re.search(r"([\d,]+) tokens x", text)[1].replace(",", "")) for m, text in found.items()}
    # prompts of 19 tokens and answers of up to 11: two sequences of a pair; six, padded to those that show an answer
    assert counted == {"dpo": 2 * 2 * (19 + 11), "srpo": 2 * 6 * (19 + 11 + 11)}


def test_every_reward_model_of_a_spec_is_found(tmp_path):
    from align.reward_models.build import model_paths

    members = [{"type": "classifier", "path": "a"}, "b", {"type": "rule", "function": "x:y"}]
    ensemble = {"type": "ensemble", "aggregation": "mean", "members": members}
    implicit = {"type": "implicit", "path": "c", "reference": "d"}
    composite = {"type": "composite", "rewards": [ensemble, "x.py:fn", {"type": "classifier", "path": "a"}, implicit]}
    assert model_paths(composite) == {"a": True, "b": True, "c": False, "d": False}
    assert model_paths({"type": "remote", "url": "http://x"}) == {}
    for name in ("member_0", "member_1"):
        (tmp_path / name).mkdir()
    load("align.reward_models.ensemble:save_ensemble")(tmp_path, ["member_0", "member_1"])
    saved = {"type": "ensemble", "path": str(tmp_path), "aggregation": "mean"}
    assert model_paths(saved) == {str(tmp_path / "member_0"): True, str(tmp_path / "member_1"): True}
    load("align.reward_models.ensemble:save_ensemble")(tmp_path, ["member_0", "member_1"], kind="lora")
    assert model_paths(saved) == {str(tmp_path / "member_0"): True}


def test_rewards_are_checked_and_no_server_is_asked(tiny_model, prompts, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        remote = f"{{type: remote, url: 'http://127.0.0.1:{server.getsockname()[1]}/score', name: judge}}"
        config.write_text(f"method: remax\nmodel_name_or_path: {tiny_model}\nrewards:\n  - {remote}\n")
        tokens = ["--dataset_name", prompts, "--max_completion_length", 8, "--gradient_accumulation_steps", 1]
        run(capsys, "remax", "--config", config, *tokens)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    for wrong, message in (
        ("tiemout: 3", "line 4: unknown key rewards.0.tiemout of a remote reward; nearest valid: timeout"),
        ("timeout: 0", "line 4: rewards.0.timeout: input should be greater than 0, not 0"),
    ):
        config.write_text(
            f"method: remax\nmodel_name_or_path: {tiny_model}\nrewards:\n  - {remote}\n".replace("name: judge", wrong)
        )
        assert main(["remax", "--config", str(config), *map(str, tokens), "--dry-run"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"align: error: {config}, {message}"


def test_a_bad_row_is_named(tiny_model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a", "completion": ""}\n')
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", rows, "--per_device_train_batch_size", 1]
    assert main(["sft", *map(str, tokens), "--dry-run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("align: error: ") and "1 of 2 rows" in error and "row 1" in error
    shown = run(capsys, "sft", *tokens, "--max_bad_share", 0.5)
    assert "1 of 2 rows can be" in shown["data"]


def test_rows_that_do_not_fill_a_step_are_refused(tiny_model, prompts, rule, capsys):
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", prompts, "--rewards.0", rule]
    assert main(["remax", *map(str, tokens), "--gradient_accumulation_steps", "4", "--dry-run"]) == 2
    assert "12 prompts do not fill one step of 32: lower per_device_train_batch_size (8)" in capsys.readouterr().err


def test_without_the_hub_the_config_is_shown_and_the_rest_is_one_line(prompts, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for half a minute
    tokens = ["--model_name_or_path", "Qwen/Qwen2.5-0.5B-Instruct", "--dataset_name", prompts]
    assert main(["sft", *tokens, "--learning_rate", "5e-7", "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert list(sections(shown.out)) == ["align sft: dry run", "one step"]
    assert "learning_rate: 5.0e-07" in shown.out
    assert shown.err.splitlines()[-1].startswith("align: error: cannot load the tokenizer 'Qwen/Qwen2.5-0.5B-Instruct'")


def test_processes_goes_with_dry_run(capsys):
    assert main(["sft", "--processes", "2"]) == 2
    assert "goes with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "processes", "expected"),
    [
        (100, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 3", 1, (13, 39)),
        (100, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 0.5", 2, (7, 4)),
        (100, "--per_device_train_batch_size 8 --dataloader_drop_last --num_train_epochs 1", 1, (12, 12)),
        (96, "--per_device_train_batch_size 8 --max_steps 7", 3, (4, 7)),
    ],
)
def test_steps_of_a_run(rows, options, processes, expected, tiny_model, demonstrations):
    base = ["--model_name_or_path", str(tiny_model), "--dataset_name", demonstrations]
    config = resolve("sft", None, [*base, *options.split()])
    text = steps_text(config, rows, processes)
    per_epoch, total = expected
    assert f"-> {per_epoch} steps per epoch -> {total} optimiser steps" in text


def test_longest():
    rows = {"prompt_ids": [[1, 2], [1]], "chosen_ids": [[1], [1, 2, 3]], "rejected_ids": [[1], [1]]}
    rows = Dataset.from_dict(rows)
    assert longest(rows, "prompts") == 2
    assert longest(rows, "pairs") == 8
    assert longest(rows, "pairs", shared=True) == 5
    assert longest(Dataset.from_dict({"input_ids": [[1], [1, 2, 3]]}), "completions") == 3
    answers = Dataset.from_dict({"prompt_ids": [[1, 2], [1]], "completion_ids": [[1], [1, 2, 3]]})
    assert longest(answers, "unpaired") == 4
    lists = Dataset.from_dict({"prompt_ids": [[1, 2], [1]], "lengths": [[1, 2], [1, 1, 1]]})
    assert longest(lists, "ranked") == 8 and longest(lists, "ranked", shared=True) == 5
    assert longest_revised(rows.select([1]), True) == 3 + 16 and longest_revised(rows.select([1]), False) == 6 * 7


@pytest.mark.parametrize("method", ["sft", "reward", "remax"])
def test_the_rows_are_those_of_the_trainer(method, tiny_model, demonstrations, pairs, prompts, rule, tmp_path):
    rows = {"sft": demonstrations, "reward": pairs, "remax": prompts}[method]
    tokens = ["--model_name_or_path", str(tiny_model), "--dataset_name", rows, "--output_dir", str(tmp_path / "run")]
    # so short that some sequences are cut
    tokens += ["--max_prompt_length", "32", "--rewards.0", rule] if method == "remax" else ["--max_length", "28"]
    config = resolve(method, None, tokens)
    shown, _ = tokenize(config, build.train_rows(config), build.tokenizer(config))
    trained = build.trainer(config).train_dataset
    assert len(shown) == len(trained) == 12
    for ours, theirs in zip(shown, trained, strict=True):
        if method == "sft":
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours["completion_mask"] == [int(label != -100) for label in theirs["labels"]]
        else:
            names = ["prompt_ids"] if method == "remax" else ["prompt_ids", "chosen_ids", "rejected_ids"]
            assert [ours[name] for name in names] == [theirs[name] for name in names]


@pytest.fixture
def short_model(tiny_model, tmp_path):
    """The same model with 64 positions."""
    folder = shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    return folder


@pytest.mark.parametrize("judged", [False, True])
def test_prompts_are_as_long_as_the_trainer_takes_them_and_the_server_as_the_engine(
    judged, short_model, prompts, rule, tmp_path
):
    (tmp_path / "question.txt").write_text("{prompt}{first}{second}")
    judge = f"{{type: self_judge, template: {tmp_path / 'question.txt'}, max_tokens: 3}}"
    method, reward = ("online_dpo", judge) if judged else ("remax", rule)
    tokens = ["--model_name_or_path", str(short_model), "--dataset_name", prompts, "--max_completion_length", "8"]
    tokens += ["--rewards.0", reward, "--output_dir", str(tmp_path / "run"), "--rollout", "transformers"]
    tokens += ["--max_prompt_length", "20"] if judged else []
    told, run = resolve(method, None, tokens), resolve(method, None, tokens)
    longest = build.longest_sequence(told, build.empty_model(told))
    trainer = build.trainer(run)
    assert told.training.max_prompt_length == trainer.args.max_prompt_length == (20 if judged else 56)
    engine = trainer.engine.make(trainer.model)
    assert longest == engine.max_model_len == 64


def test_a_server_has_the_embeddings_of_an_adapter_to_which_tokens_were_added(tiny_model, prompts, rule, tmp_path):
    from peft import LoraConfig, get_peft_model

    from align.cli.serve import skeleton
    from align.modeling.load import load_policy, load_tokenizer
    from align.rollout.weights import checkpoint_shapes

    tokenizer, model = load_tokenizer(tiny_model), load_policy(tiny_model)
    tokenizer.add_tokens(["<answer>", "</answer>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    tokens = ["--model_name_or_path", str(tmp_path / "a"), "--dataset_name", prompts, "--rewards.0", rule]
    served = skeleton(resolve("remax", None, [*tokens, "--rollout", "transformers"]))
    trained = checkpoint_shapes(load_policy(tmp_path / "a"), merged=True)
    assert checkpoint_shapes(served, merged=True) == trained


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_rows_that_the_model_cannot_take_are_refused_as_by_the_trainer(method, short_model, rule, tmp_path, capsys):
    rows = [{"prompt": f"{i}?" + " x" * 40 * (i == 3), "chosen": " It is.", "rejected": " No."} for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = ["--model_name_or_path", str(short_model), "--dataset_name", str(file)]
    tokens += ["--rewards.0", rule, "--max_completion_length", "8"] if method == "remax" else []
    errors = []
    for more in (["--dry-run"], ["--output_dir", str(tmp_path / "run"), "--report_to", "none"]):
        assert main([method, *tokens, *more]) == 2
        errors.append(capsys.readouterr().err.splitlines()[-1])
    reason = "longer than max_prompt_length=56" if method == "remax" else "longer than the 64 tokens"
    assert reason in errors[0] and errors[0] == errors[1]


def test_memory_of_an_on_policy_run_follows_beta_and_the_budget(tiny_model, prompts, rule, capsys):
    """Without a KL and an evaluation no reference is held; a budget of tokens holds the activations down."""
    tokens = ["--model_name_or_path", tiny_model, "--dataset_name", prompts, "--num_generations", 8, "--max_steps", 1]
    tokens += ["--per_device_train_batch_size", 4, "--max_completion_length", 20, "--max_prompt_length", 40]
    tokens += ["--rewards.0", rule, "--rollout.backend", "transformers", "--eval_dataset_name", prompts]

    def memory(*options, method="rloo"):
        lines = run(capsys, method, *tokens, *options)["memory"].splitlines()
        return {line.split("  ")[1].strip(): line for line in lines}

    plain, free = memory(), memory("--beta", 0.0)
    assert any("reference" in name for name in plain) and not any("reference" in name for name in free)
    assert any("reference" in name for name in memory("--beta", 0.0, "--eval_strategy", "steps", "--eval_steps", 1))
    assert memory("--tokens_per_batch", 60)["logits"] != plain["logits"]
    servers = memory("--rollout.backend", "server", "--rollout.urls", "http://127.0.0.1:8000")
    assert "rollout engine" in plain and "rollout engine" not in servers  # their copy lies elsewhere
    half = memory("--rollout.backend", "vllm", "--rollout.tensor_parallel", 2)["rollout engine"]
    assert "1/2 of a copy of the weights" in half
    assert "critic" not in plain and "AdamW's two states" in memory(method="ppo")["critic"]
