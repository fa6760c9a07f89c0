"""The loop that all on-policy methods share, by its first user, ReMax."""

import json
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, TrainerCallback

from align.data import tokenize_prompts
from align.errors import ConfigError, DataError, RewardError, TrainingError
from align.evaluation.records import read_run
from align.modeling.load import load_policy
from align.modeling.logprobs import token_logps
from align.trainers.remax import ReMaxConfig, ReMaxTrainer
from tests.trainers.tiny_runs import (
    QUIET,
    logged,
    needs_vllm,
    parameters,
    prompts,
    remax_config,
    tiny_model,
    wanted_words,
)

GOLD = {"type": "rule", "function": "align.data.toy:gold", "name": "gold"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5}


# ---- how a batch is cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean"])
def test_batch_times_accumulation_does_not_matter(aggregation, policy, tmp_path):
    """13 prompts: the second step has 5, which the cuts divide unevenly. The rollouts are the same for every cut."""
    data = prompts(13)

    def steps(batch, accumulation):
        args = remax_config(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            num_generations=2,
            loss_aggregation=aggregation,
        )
        trainer = ReMaxTrainer(policy, wanted_words, args, data)
        trainer.train()
        keys = ("loss", "grad_norm", "kl", "reward", "completions/mean_length", "entropy")
        return torch.tensor([logged(trainer, key) for key in keys])

    expected = steps(8, 1)
    assert (expected[0].abs() > 1e-4).all()
    for cut in ((4, 2), (1, 8)):
        torch.testing.assert_close(steps(*cut), expected, rtol=1e-4, atol=1e-5)


def test_draws_depend_on_the_seed_alone(policy, tmp_path):
    """Same seed, same run, whatever has been drawn before; another seed, another run. New adapters too."""

    def run(seed, noise):
        torch.manual_seed(noise)
        lora = LoraConfig(r=4, target_modules=["q_proj"])
        args = remax_config(tmp_path, seed=seed, learning_rate=1e-2)
        trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), peft_config=lora)
        torch.manual_seed(noise)
        trainer.train()
        return logged(trainer, "loss") + logged(trainer, "grad_norm")

    assert run(1, 5) == run(1, 6) != run(2, 5)


# ---- guards ---------------------------------------------------------------------------------------------------------


def test_fewer_prompts_than_a_step(policy, tmp_path):
    args = remax_config(tmp_path, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="31 prompts are fewer than the 32 of one step"):
        ReMaxTrainer(policy, wanted_words, args, prompts(31)).train()


def test_a_prompt_that_is_too_long(policy, tmp_path):
    args = remax_config(tmp_path, max_prompt_length=5)
    with pytest.raises(DataError, match="prompt is longer than max_prompt_length=5"):
        ReMaxTrainer(policy, wanted_words, args, prompts(8))
    rows = tokenize_prompts(prompts(8), AutoTokenizer.from_pretrained(policy), max_prompt_length=None)
    first = next(row for row, ids in enumerate(rows["prompt_ids"]) if len(ids) > 5)
    with pytest.raises(DataError, match=rf"tokenised prompts are longer than max_prompt_length=5 \(row {first}"):
        ReMaxTrainer(policy, wanted_words, args, rows)


@pytest.mark.parametrize("given, longest", [({}, 58), ({"max_prompt_length": 513}, None)])
def test_the_default_leaves_room_for_a_completion(given, longest, policy, tmp_path, caplog):
    """The model has 64 positions, and a completion 6 tokens; what is given is refused."""
    quiet = {**QUIET, "max_steps": 1, "per_device_train_batch_size": 4}
    args = ReMaxConfig(str(tmp_path), rollout_backend="transformers", max_completion_length=6, **quiet, **given)
    if longest is None:
        with pytest.raises(ConfigError, match="policy takes 64 tokens, and a prompt with its completion may have 519"):
            ReMaxTrainer(policy, wanted_words, args, prompts(4)).train()
        return
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(4))
    assert trainer.args.max_prompt_length == longest and "max_prompt_length: 58 of the 64 positions" in caplog.text
    trainer.train()
    trainer.close()


def test_the_back_end_by_one_option(tmp_path):
    args = ReMaxConfig(str(tmp_path), rollout_backend="transformers", use_cpu=True)
    assert args.rollout == ReMaxConfig(str(tmp_path), rollout="transformers", use_cpu=True).rollout
    with pytest.raises(
        ConfigError, match="rollout_backend: write it in the section rollout instead, as rollout.backend"
    ):
        ReMaxConfig(str(tmp_path), rollout_backend="vllm", rollout={"backend": "transformers"}, use_cpu=True)


def test_a_reward_that_is_not_finite(policy, tmp_path):
    def broken(completions):
        return [math.nan if i == 3 else 0.0 for i in range(len(completions))]

    trainer = ReMaxTrainer(policy, broken, remax_config(tmp_path), prompts(8))
    with pytest.raises(RewardError, match=r"reward 'broken'.* returned nan for rows \[3\]"):
        trainer.train()


def test_reward_weights(policy, tmp_path):
    def long(completions):
        return [float(len(text)) for text in completions]

    args = remax_config(tmp_path, reward_weights=[2.0, -0.5], max_steps=1)
    trainer = ReMaxTrainer(policy, [wanted_words, long], args, prompts(8))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["reward"] == pytest.approx(2 * logs["rewards/wanted_words"] - 0.5 * logs["rewards/long"], rel=1e-5)
    for weights in ([1.0], []):
        with pytest.raises(ConfigError, match=f"{len(weights)} reward_weights for 2 rewards"):
            ReMaxTrainer(policy, [wanted_words, long], remax_config(tmp_path, reward_weights=weights), prompts(8))
    with pytest.raises(ConfigError, match="two rewards have the same name"):
        ReMaxTrainer(policy, [long, long], remax_config(tmp_path), prompts(8))
    with pytest.raises(ConfigError, match="no reward is given"):
        ReMaxTrainer(policy, [], remax_config(tmp_path), prompts(8))


def test_the_reference_is_what_training_starts_from(tokenizer, policy, tmp_path):
    other = tiny_model(tokenizer, seed=1)
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path), prompts(16), ref_model=other)
    trainer.train()  # a reference that is given may differ
    assert logged(trainer, "kl")[0] > 1
    adapter = get_peft_model(load_policy(policy), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    trainer = ReMaxTrainer(adapter, wanted_words, remax_config(tmp_path), prompts(16), processing_class=tokenizer)
    with pytest.raises(TrainingError, match="the policy and its reference differ by .* merge the adapter"):
        trainer.train()


class Meddle(TrainerCallback):
    """Changes the weights between rollout and update."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.lm_head.weight.add_(0.05 * torch.randn(model.lm_head.weight.shape))


def test_the_trained_policy_must_be_the_one_that_sampled(policy, tmp_path):
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path), prompts(16), callbacks=[Meddle()])
    with pytest.raises(TrainingError, match="step 1: the log-probs of the rollouts differ by .* transformers engine"):
        trainer.train()


@pytest.mark.parametrize(
    "backend, lora",
    [("transformers", False), ("transformers", True), pytest.param("vllm", True, marks=[needs_vllm, pytest.mark.vllm])],
)
def test_rollouts_come_from_the_pushed_weights(backend, lora, policy, tmp_path):
    """At temperature 0.7, after steps that move the weights a lot, and with adapters merged on the way."""
    args = remax_config(
        tmp_path, max_steps=4, learning_rate=2e-2, temperature=0.7, rollout=backend, beta=0.0, **EVALUATED
    )
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if lora else None
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(8, seed=1), peft_config=lora)
    trainer.train()
    trainer.close()
    assert logged(trainer, "eval_kl")[-1] > 0.1
    assert 0 < max(logged(trainer, "rollout/mean_abs_logp_diff")) < 1e-5
    assert not lora or min(logged(trainer, "rollout/arrived_share")) > 0.9999


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_what_is_saved_loads_with_the_same_log_probs(lora, policy, tmp_path):
    args = remax_config(tmp_path, learning_rate=2e-2, max_steps=3)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if lora else None
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), peft_config=lora)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").exists() == bool(lora)
    ids = torch.tensor([trainer.train_dataset[i]["prompt_ids"][:5] for i in range(8)])
    start, trained, saved = (
        token_logps(m.eval(), ids, torch.ones_like(ids)).detach()
        for m in (load_policy(policy), trainer.model, load_policy(str(tmp_path)))
    )
    assert (trained - start).abs().max() > 0.05
    assert (trained - saved).abs().max() < (2e-5 if lora else 1e-7)


def test_training_says_what_a_step_is(policy, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="align.trainers")
    args = remax_config(tmp_path, gradient_accumulation_steps=2, num_generations=3, max_steps=1)
    ReMaxTrainer(policy, wanted_words, args, prompts(16)).train()
    assert "each step: 16 prompts x 3 samples -> 48 sequences -> 1 optimiser step" in caplog.text


# ---- evaluation -----------------------------------------------------------------------------------------------------


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "overoptimization.jsonl").read_text().splitlines()[1:]]


def test_the_evaluation_file(policy, tmp_path):
    args = remax_config(
        tmp_path, max_steps=5, run_name="short", num_eval_prompts=12, num_logged_completions=3, **EVALUATED
    )
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(20, seed=1), gold_reward=GOLD)
    trainer.train()
    run = read_run(tmp_path)
    assert (run.name, run.method, run.proxy_name, run.gold_name) == ("short", "remax", "wanted_words", "gold")
    assert run.config["beta"] == 0.05 and run.config["max_steps"] == 5 and run.config["kl_mode"] == "to_go"
    assert run.step.tolist() == [0, 2, 4, 5]
    assert run.kl[0] == 0 and run.kl_k3[0] == 0 and run.kl[1] != 0
    assert run.extras["entropy"][0] == pytest.approx(logged(trainer, "eval_entropy")[0])
    assert run.gold.tolist() == pytest.approx(logged(trainer, "eval_gold"))
    for name in ("kl", "kl_k3", "proxy", "gold", "length", "entropy"):
        assert run.per_prompt[name].shape == (4, 12)
        assert run.per_prompt[name].mean(1) == pytest.approx(logged(trainer, f"eval_{name}"), rel=1e-6, abs=1e-9)
    assert all(len(samples) == 3 for samples in run.samples)
    first = run.samples[0][0]
    assert first["prompt"] == trainer.eval_dataset[0]["prompt"]
    assert first["proxy"] == pytest.approx(run.per_prompt["proxy"][0, 0])


def test_evaluations_after_training(policy, tmp_path):
    """The last step is added to the curve, once; other prompts do not belong to it."""
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path), prompts(16), prompts(8, seed=1))
    trainer.train()
    trainer.evaluate(prompts(4, seed=2), metric_key_prefix="other")
    assert "other_kl" in trainer.state.log_history[-1]
    trainer.evaluate()
    trainer.evaluate()
    assert [record["step"] for record in records(tmp_path)] == [0, 2]


def test_evaluation_does_not_move_training(policy, tmp_path):
    losses = []
    for options in (EVALUATED, {"eval_on_start": False}):
        args = remax_config(tmp_path, max_steps=4, **options)
        trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(8, seed=1))
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_evaluation_before_training_leaves_an_old_file_alone(policy, tmp_path):
    old = tmp_path / "overoptimization.jsonl"
    old.write_text("an old run\n")
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path), prompts(16), prompts(8, seed=1))
    before = trainer.evaluate()
    assert old.read_text() == "an old run\n"
    assert before["eval_kl"] == 0
    assert trainer.evaluate() == before  # the same draws
    trainer.train()
    assert (tmp_path / "overoptimization.1.old.jsonl").read_text() == "an old run\n"


def test_several_samples_per_prompt_are_averaged(policy, tmp_path):
    args = remax_config(tmp_path, eval_num_generations=4, per_device_eval_batch_size=7)
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(9, seed=1), gold_reward=GOLD)
    four = trainer.evaluate()
    args.eval_num_generations = 1
    one = trainer.evaluate()
    assert four["eval_kl"] == one["eval_kl"] == 0
    assert (four["eval_proxy"] * 36) != pytest.approx(one["eval_proxy"] * 36)


def test_the_kl_is_that_of_the_policies(policy, tokenizer, tmp_path):
    """k3 and k1 estimate the same; with many samples both agree with the exact KL of the first token."""
    args = remax_config(tmp_path, max_completion_length=1, eval_num_generations=200, temperature=0.8)
    other = tiny_model(tokenizer, seed=1)
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(4, seed=1), ref_model=other)
    found, exact = trainer.evaluate(), []
    for row in trainer.eval_dataset:
        p, q = (m(torch.tensor([row["prompt_ids"]])).logits[0, -1] / 0.8 for m in (trainer.model, other))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        exact.append((p.exp() * (p - q)).sum().item())
    exact = sum(exact) / len(exact)
    assert found["eval_kl"] == pytest.approx(exact, rel=0.15) and found["eval_kl_k3"] == pytest.approx(exact, rel=0.15)


def test_without_evaluation_prompts(policy, tmp_path):
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path), prompts(16))
    trainer.train()  # although eval_on_start is the default
    assert not (tmp_path / "overoptimization.jsonl").exists()
    with pytest.raises(ConfigError, match="pass eval_dataset"):
        trainer.evaluate()


def test_training_twice_starts_again(policy, tmp_path):
    """A second `train` is a new run: its engine gets the weights, and its curve a new file."""
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path, **EVALUATED), prompts(16), prompts(8, seed=1))
    trainer.train()
    trained = parameters(trainer.model)
    trainer.check_start = False  # the policy has moved on
    trainer.train()
    assert [record["step"] for record in records(tmp_path)] == [0, 2] and records(tmp_path)[0]["kl"] != 0
    assert any(not torch.equal(p, trained[name]) for name, p in trainer.model.named_parameters())


def test_defaults_are_those_of_the_machine():
    args = ReMaxConfig(output_dir="nowhere", **{k: QUIET[k] for k in ("report_to", "use_cpu")})
    assert (args.bf16, args.gradient_checkpointing, args.dataloader_pin_memory) == (False, False, False)
