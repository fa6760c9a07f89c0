import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.errors import ConfigError
from align.rollout.transformers_engine import TransformersEngine
from align.trainers.on_policy.batches import collate
from align.trainers.remax import ReMaxTrainer
from tests.trainers.on_policy.enumerable import flat, rolled_out
from tests.trainers.tiny_runs import logged, needs_vllm, prompts, remax_config, tiny_model, wanted_words

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    "backend, lora",
    [
        ("transformers", False),
        ("transformers", True),
        pytest.param("vllm", False, marks=[needs_vllm, pytest.mark.vllm]),
    ],
)
def test_the_reward_rises(backend, lora, policy, tmp_path):
    args = remax_config(
        tmp_path,
        max_steps=15,
        per_device_train_batch_size=32,
        learning_rate=2e-2 if lora else 5e-3,
        beta=0.01,
        rollout=backend,
        gradient_checkpointing=lora,
    )
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(64), peft_config=LoraConfig(**LORA) if lora else None)
    trainer.train()
    trainer.close()
    reward, kl = logged(trainer, "reward"), logged(trainer, "kl")
    assert sum(reward[:2]) / 2 < 0.2 and sum(reward[-2:]) / 2 > (0.35 if lora else 0.7), reward
    assert kl[0] == 0 and kl[-1] > 1
    assert logged(trainer, "entropy")[-1] < logged(trainer, "entropy")[0]
    assert max(logged(trainer, "rollout/mean_abs_logp_diff")) < 1e-5


def test_the_baseline_is_greedy_decoding(policy, tmp_path):
    """Two calls and plain argmax decoding give the same completion; the samples differ from it."""
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path), prompts(8))
    first, second = rolled_out(trainer), rolled_out(trainer)
    for (greedy,), (again,), sample in zip(first[1], second[1], first[0], strict=True):
        ids = list(greedy.prompt["prompt_ids"])
        for token in greedy.completion_ids:
            best = trainer.model(torch.tensor([ids])).logits[0, -1].argmax().item()
            assert token == best
            ids.append(best)
        assert greedy.completion_ids == again.completion_ids
        assert greedy.score == pytest.approx(wanted_words([greedy.completion])[0])
        assert sample.completion_ids != greedy.completion_ids
        torch.testing.assert_close(sample.advantages, baseline_removed(sample, greedy))


class CountingEngine(TransformersEngine):
    """A real engine that notes what it is asked for."""

    def generate(self, prompts, params, **options):
        self.requests.append([p.temperature for p in params])
        return super().generate(prompts, params, **options)


def test_one_engine_call_per_step(tokenizer, policy, tmp_path):
    """Sampled and greedy requests of all micro-batches together; an engine that is given is used and left open."""
    model = tiny_model(tokenizer)
    engine = CountingEngine(tiny_model(tokenizer, seed=9), tokenizer, max_model_len=22)  # other weights: must be pushed
    engine.requests = []
    args = remax_config(tmp_path, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = ReMaxTrainer(model, wanted_words, args, prompts(16), processing_class=tokenizer, engine=engine)
    trainer.train()
    trainer.close()
    assert engine.requests == [[1.0, 0] * 8] * 3
    assert not engine.closed and engine.weight_version == 2  # the weights that made the third step's rollouts


@pytest.mark.parametrize(
    "options", [{}, {"kl_mode": "one_step", "gamma": 0.9, "reward_clip": 0.1}, {"kl_mode": "none", "beta": 0.0}]
)
@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean"])
def test_the_loss_is_the_formula(options, aggregation, tokenizer, policy, tmp_path):
    """Sequence by sequence, token by token, in plain Python."""
    args = remax_config(tmp_path, num_generations=2, loss_aggregation=aggregation, **{"beta": 0.3, **options})
    other = tiny_model(tokenizer, seed=1)
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(8), ref_model=other)
    samples, extra = rolled_out(trainer)
    total, surrogate, tokens = 0.0, 0.0, 0
    for i, sample in enumerate(samples):
        advantage = sample.score - extra[i // 2][0].score
        if args.reward_clip is not None:
            advantage = max(-args.reward_clip, min(args.reward_clip, advantage))
        ids = torch.tensor([sample.prompt["prompt_ids"] + sample.completion_ids])
        start, length = len(sample.prompt["prompt_ids"]), sample.length
        own, ref_logps = (
            m(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :, 0]
            for m in (trainer.model, other)
        )
        logps, ref_logps = own.tolist(), ref_logps.tolist()
        for t in range(length):
            weight = advantage * args.gamma ** (length - t)
            if args.kl_mode == "one_step":
                weight -= args.beta * (logps[t] - ref_logps[t])
            elif args.kl_mode == "to_go":
                weight -= args.beta * (sum(logps[t:]) - sum(ref_logps[t:]))
            total = total - weight * own[t]
            surrogate -= weight  # at a probability ratio of 1
        tokens += length
    count = len(samples) if aggregation == "sequence_sum" else tokens
    loss = trainer.compute_loss(trainer.model, collate(samples, 0), num_items_in_batch=torch.tensor(count))
    assert loss.item() == pytest.approx(surrogate / count, rel=1e-4)
    parameters = list(trainer.model.parameters())
    wanted = flat(torch.autograd.grad(total / count, parameters, allow_unused=True), trainer)
    found = flat(torch.autograd.grad(loss, parameters, allow_unused=True), trainer)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def baseline_removed(sample, greedy) -> torch.Tensor:
    """The advantages of a sample of the first policy, whose KL is 0, [L, 1]."""
    return torch.full((sample.length, 1), sample.score - greedy.score)


def test_several_samples_share_their_prompts_baseline(policy, tmp_path):
    trainer = ReMaxTrainer(policy, wanted_words, remax_config(tmp_path, num_generations=3), prompts(8))
    samples, extra = rolled_out(trainer)
    assert len(samples) == 12 and len(extra) == 4
    for i, sample in enumerate(samples):
        assert sample.prompt["prompt"] == trainer.train_dataset[i // 3]["prompt"]
        torch.testing.assert_close(sample.advantages, baseline_removed(sample, extra[i // 3][0]))
    assert len({tuple(sample.completion_ids) for sample in samples[:3]}) > 1


def test_gradient_checkpointing_changes_nothing(policy, tmp_path):
    found = []
    for checkpointing in (False, True):
        args = remax_config(tmp_path, gradient_checkpointing=checkpointing)
        trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16))
        trainer.train()
        found.append(logged(trainer, "loss") + logged(trainer, "grad_norm"))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_mixed_precision(policy, tmp_path):
    """bfloat16 autocast: policy and reference still agree at step 0, and the engine within rounding."""
    args = remax_config(tmp_path, bf16=True, eval_strategy="steps", eval_steps=2)
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(8, seed=1))
    trainer.train()
    assert logged(trainer, "eval_kl")[0] == 0 and logged(trainer, "kl")[0] == 0
    assert 1e-5 < max(logged(trainer, "rollout/mean_abs_logp_diff")) < 0.05
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_conversations(tokenizer, tmp_path):
    """Rewards see messages, and the table of completions is readable."""
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}: {% endif %}"
    )
    seen = []

    def reward(prompts, completions, topic):
        seen.extend(zip(prompts, completions, topic, strict=True))
        return [float(len(turns[0]["content"])) for turns in completions]

    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"].removesuffix(" : ")}], "topic": row["topic"]}
        for row in prompts(8)
    ]
    trainer = ReMaxTrainer(
        tiny_model(tokenizer),
        reward,
        remax_config(tmp_path, max_steps=1),
        Dataset.from_list(rows),
        processing_class=talking,
    )
    trainer.train()
    prompt, completion, topic = seen[0]
    assert [turn["role"] for turn in prompt] == ["user"] and topic in prompt[0]["content"]
    assert [turn["role"] for turn in completion] == ["assistant"] and "<eos>" not in completion[0]["content"]


def test_a_tokenizer_without_padding_token(tokenizer, tmp_path):
    losses = []
    for pad_token in ("<pad>", None):
        own = copy.deepcopy(tokenizer)
        own.pad_token = pad_token
        trainer = ReMaxTrainer(
            tiny_model(tokenizer), wanted_words, remax_config(tmp_path), prompts(16), processing_class=own
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_options_are_checked(tmp_path):
    for wrong, message in (
        ({"kl_mode": "both"}, "kl_mode must be"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"loss_aggregation": "mean"}, "loss_aggregation must be"),
        ({"temperature": 0.0}, "temperature must be at least 0.01"),
        ({"num_generations": 0}, "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            remax_config(tmp_path, **wrong)
