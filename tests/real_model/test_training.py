"""One or two steps of each kind of trainer on a pretrained chat model, in float32 and in bfloat16 autocast."""

import math

import pytest
from datasets import Dataset
from peft import LoraConfig

from align import DPOConfig, DPOTrainer, ReMaxConfig, ReMaxTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

QUIET = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
QUIET |= {"max_steps": 1, "lr_scheduler_type": "constant"}
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


@pytest.fixture(scope="module")
def short_pairs(chat_pairs, precision):
    """The two shortest pairs; in bfloat16, slow on a CPU without instructions for it, a pair of a few words."""
    if precision["bf16"]:
        said = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
        prompt = said("system", "Be kind.") + said("user", "Hi")
        pair = {"prompt": prompt, "chosen": said("assistant", "Hello there!"), "rejected": said("assistant", "No.")}
        return Dataset.from_list([pair])
    size = [len(str([row["prompt"], row["chosen"], row["rejected"]])) for row in chat_pairs]
    return chat_pairs.select(sorted(range(len(size)), key=size.__getitem__)[:2])


@pytest.fixture(scope="module", params=["float32", "bf16"])
def precision(request) -> dict:
    bf16 = request.param == "bf16"
    return {"bf16": bf16, "per_device_train_batch_size": 1 if bf16 else 2}


def finished(trainer) -> dict[str, float]:
    """The log of the first step, every number of it finite."""
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(math.isfinite(value) for value in log.values() if isinstance(value, float)), log
    assert 0 < log["grad_norm"]
    return log


@pytest.fixture(scope="module")
def mean_nll(real_model, short_pairs, real_tokenizer) -> float:
    """Mean over the tokens of the chosen answers and their <|im_end|>, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    total, tokens = 0.0, 0
    for row in short_pairs:
        render = real_tokenizer.apply_chat_template
        prompt = render(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = render(row["prompt"] + row["chosen"], return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt and whole[-2] == real_tokenizer.eos_token_id
        ids = torch.tensor([whole[:-1]])  # without the line break after <|im_end|>
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, tokens = total - logps.sum().item(), tokens + len(logps)
    return total / tokens


def test_sft_starts_from_the_loss_of_the_pretrained_model(real_model, short_pairs, tmp_path, precision, mean_nll):
    args = SFTConfig(str(tmp_path), max_length=512, learning_rate=1e-5, **QUIET, **precision)
    log = finished(SFTTrainer(real_model, args, short_pairs))
    assert log["loss"] == pytest.approx(mean_nll, rel=2e-2 if precision["bf16"] else 1e-4)


def test_implicit_rewards_start_at_0(real_model, short_pairs, tmp_path, precision, mean_nll):
    """And rise: with one row to learn from, its answer is likelier after a step."""
    beta, options = 0.01, {**QUIET, "max_steps": 2}
    args = SFTConfig(
        str(tmp_path), max_length=512, learning_rate=1e-3, implicit_reward_beta=beta, **options, **precision
    )
    trainer = SFTTrainer(real_model, args, short_pairs, peft_config=LORA)
    log, after = finished(trainer), trainer.state.log_history[1]
    assert trainer.implicit.reference.held.adapter_off
    assert log["implicit/token_loss"] == pytest.approx(mean_nll, rel=2e-2 if precision["bf16"] else 1e-4)
    assert log["implicit/rewards"] == pytest.approx(0, abs=1e-2 if precision["bf16"] else 1e-5)
    assert log["loss"] == pytest.approx(0.25, abs=1e-2 if precision["bf16"] else 1e-5)
    moved = beta * (after["implicit/logps"] - log["implicit/logps"])
    assert after["implicit/rewards"] - log["implicit/rewards"] == pytest.approx(moved, abs=1e-5)
    assert after["implicit/rewards"] > 0 and after["loss"] < log["loss"]


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_dpo_starts_at_ln_2(real_model, short_pairs, tmp_path, precision, peft):
    args = DPOConfig(str(tmp_path), max_length=512, learning_rate=1e-5, **QUIET, **precision)
    log = finished(DPOTrainer(real_model, args, short_pairs, peft_config=peft))
    assert log["loss"] == pytest.approx(math.log(2), abs=2e-2 if precision["bf16"] else 1e-5)


def test_reward_model(real_model, short_pairs, tmp_path, precision):
    args = RewardConfig(str(tmp_path), max_length=512, learning_rate=1e-5, **QUIET, **precision)
    log = finished(RewardTrainer(real_model, args, short_pairs, short_pairs))
    assert 0.3 < log["loss"] < 3


def test_remax(real_model, short_pairs, tmp_path, precision, real_tokenizer):
    ended = []

    def shorter_is_better(completions, completion_ids):
        ended.extend(ids[-1] == real_tokenizer.eos_token_id for ids in completion_ids)
        return [-float(len(messages[0]["content"])) for messages in completions]

    args = ReMaxConfig(
        str(tmp_path), max_prompt_length=64, max_completion_length=8, rollout="transformers", beta=0.05,
        learning_rate=1e-6, **QUIET, **precision,
    )  # fmt: skip
    trainer = ReMaxTrainer(real_model, shorter_is_better, args, short_pairs)
    log = finished(trainer)
    trainer.close()
    # as many sampled completions as prompts, then the greedy ones; counted as cut where they did not end
    prompts = len(short_pairs)
    assert len(ended) == 2 * prompts and log["completions/clipped_ratio"] == 1 - sum(ended[:prompts]) / prompts
