"""The two layouts of a micro-batch of samples mean the same, and the shared one holds no padding."""

import pytest
import torch
from torch import nn

from align.errors import ConfigError, RolloutError
from align.modeling.completions import completion_logps
from align.modeling.logprobs import token_logps
from align.modeling.prefix_support import enable_shared_prefix, enable_trunk
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.batches import BatchPlanner, balance, collate, padding_share, split_by_length
from align.trainers.on_policy.critic import make_critic
from align.trainers.on_policy.samples import Sample
from tests.trainers.tiny_runs import logged, on_policy, prompts, tiny_model, wanted_words


def sample(prompt: list[int], length: int, number: int = 0) -> Sample:
    ids = torch.randint(4, 40, (length,), generator=torch.Generator().manual_seed(100 * length + number)).tolist()
    made = Sample({"prompt_ids": prompt}, ids, "", [-1.0] * length, False, 0)
    made.advantages = torch.randn(length, 1, generator=torch.Generator().manual_seed(length))
    return made


FIRST, SECOND, THIRD = [5, 6, 7, 8, 9], [10], [11, 12, 13]
# of three prompts, side by side or not; a completion of one token; the same one twice
SAMPLES = [
    *(sample(FIRST, length) for length in (4, 1, 9)),
    *(sample(SECOND, length) for length in (1, 1, 6)),
    *(sample(THIRD, length) for length in (3,)),
    sample(FIRST, 2),
]


def test_the_layouts_give_the_same_logps_and_gradients(tokenizer):
    model = tiny_model(tokenizer).double()
    assert enable_shared_prefix(model, 64) is None
    found = []
    for shared in (False, True):
        batch = collate(SAMPLES, 0, shared_prefix=shared)
        model.zero_grad()
        logps, entropy = completion_logps(model, batch, temperature=0.7, return_entropy=True)
        (logps * batch["advantages"][..., 0]).sum().backward()
        found.append((logps, entropy, *(p.grad.clone() for p in model.parameters())))
    for padded, shared in zip(*found, strict=True):  # the norms and rotations of a Llama are float32
        torch.testing.assert_close(shared, padded, rtol=0, atol=5e-6)
    for i, one in enumerate(SAMPLES):  # and both are the log-probs of each sample by itself
        ids = torch.tensor([one.prompt["prompt_ids"] + one.completion_ids])
        alone = token_logps(model, ids, torch.ones_like(ids), temperature=0.7)[0, -one.length :]
        torch.testing.assert_close(found[1][0][i, : one.length], alone, rtol=0, atol=5e-6)
        assert not found[1][0][i, one.length :].any() and not found[1][1][i, one.length :].any()


def test_the_critic_takes_both_layouts(tokenizer, tmp_path):
    model = tiny_model(tokenizer).double()
    enable_shared_prefix(model, 64)
    _, args = on_policy("ppo", tmp_path, gradient_checkpointing=False)
    critic = make_critic(model, args, heads=2).double()
    assert enable_trunk(critic.backbone, model, 64) is None
    nn.init.normal_(critic.head.weight)
    padded, shared = (critic(collate(SAMPLES, 0, shared_prefix=shared)) for shared in (False, True))
    for i, one in enumerate(SAMPLES):
        torch.testing.assert_close(shared[i, : one.length], padded[i, : one.length], rtol=0, atol=1e-6)
    other = nn.Linear(1, 1)
    assert "Linear" in enable_trunk(other, model, 64)


def test_nothing_is_padded_in_shared_rows():
    batch = collate(SAMPLES, 0, shared_prefix=True)
    # three prompts, and every completion but its last token
    assert batch["input_ids"].shape == (1, 5 + 1 + 3 + sum(one.length - 1 for one in SAMPLES))
    assert padding_share(batch) == 0
    batch = collate(SAMPLES[:2], 0)
    assert batch["input_ids"].shape == (2, 9) and padding_share(batch) == pytest.approx(3 / 18)


def test_prompts_are_balanced_and_whole():
    groups = [[sample([4] * (1 + i), 10 * (1 + i % 4), j) for j in range(2)] for i in range(12)]
    parts = balance([one for group in groups for one in group], 3, 2)
    assert sorted(map(id, sum(parts, []))) == sorted(id(one) for group in groups for one in group)
    for batch in parts:
        assert all(batch[i].prompt == batch[i + 1].prompt for i in range(0, len(batch), 2))
    tokens = [collate(batch, 0, shared_prefix=True)["input_ids"].numel() for batch in parts]
    assert max(tokens) < 1.1 * min(tokens)
    with pytest.raises(RolloutError, match="12 prompts cannot fill 13"):
        balance(sum(groups, []), 13, 2)
    with pytest.raises(RolloutError, match="24 samples cannot fill 25"):
        split_by_length(sum(groups, []), 25)


@pytest.mark.parametrize("method", ["remax", "rloo", "ppo"])
def test_a_run_is_the_same_in_both_layouts(method, policy, tmp_path):
    """With a seed whose draws are not so near to a boundary that rounding decides on a token."""
    found = []
    several = {"num_mini_batches": 2, "num_iterations": 2} if method != "remax" else {"seed": 1}
    for batching in ("padded", "shared_prefix"):
        trainer_class, args = on_policy(method, tmp_path, max_steps=4, beta=0.1, batching=batching, **several)
        trainer = trainer_class(policy, wanted_words, args, prompts(64), prompts(6, seed=1))
        trainer.train()
        trainer.close()
        keys = ("loss", "grad_norm", "reward", "kl", *(("critic/loss",) if method == "ppo" else ()))
        found.append({key: torch.tensor(logged(trainer, key)) for key in keys})
        assert (max(logged(trainer, "padding")) > 0) == (batching == "padded")
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=2e-3, atol=1e-4, msg=key)


def test_a_model_that_cannot_share_is_padded_or_refused(tokenizer, tmp_path):
    model = tiny_model(tokenizer, attn_implementation="eager")
    trainer_class, args = on_policy("rloo", tmp_path, max_steps=1)
    trainer = trainer_class(model, wanted_words, args, prompts(64), processing_class=tokenizer)
    assert not trainer.planner.shared_prefix
    trainer.train()
    assert logged(trainer, "padding")[0] > 0
    args.batching = "shared_prefix"
    with pytest.raises(ConfigError, match="shared_prefix cannot be used with this model: its attention is eager"):
        trainer_class(
            tiny_model(tokenizer, attn_implementation="eager"),
            wanted_words,
            args,
            prompts(64),
            processing_class=tokenizer,
        )


# ---- budgets of tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("budget", [24, 60, 10_000])
def test_micro_batches_keep_their_budget(shared, budget):
    """Whatever the lengths and the number of samples; a prompt's samples may lie in several of them."""
    generator = torch.Generator().manual_seed(budget)
    lengths = torch.randint(1, 20, (40,), generator=generator).tolist()
    prompts = [[5 + i] * (1 + i % 4) for i in range(5)]
    samples = [sample(prompts[i // 8], length, i) for i, length in enumerate(lengths)]  # eight of each prompt
    planner = BatchPlanner(0, num_generations=8, shared_prefix=shared, tokens=budget, forward_tokens=2 * budget)
    for plan, limit in ((planner.plan(samples, 5), budget), (planner.plan_forward(samples, 8), 2 * budget)):
        assert sorted(id(one) for part in plan for one in part) == sorted(map(id, samples))
        sizes = [planner.collate(part)["input_ids"].numel() for part in plan]
        assert max(sizes) <= limit
        total = sum(len(p) for p in prompts) + sum(lengths)
        assert len(plan) <= (1 if budget == 10_000 else 2 * total * (2 if not shared else 1) / limit + 8)


def test_processes_make_as_many_micro_batches(monkeypatch):
    """The one whose samples are short cuts them into as many as the other needs."""
    ranks = Ranks()
    monkeypatch.setattr(ranks, "gather", lambda values: torch.cat([values, torch.tensor([5])]))
    planner = BatchPlanner(0, num_generations=2, shared_prefix=True, tokens=1000, forward_tokens=1000, ranks=ranks)
    plan = planner.plan(SAMPLES, 2)
    assert len(plan) == 5 and sorted(id(one) for part in plan for one in part) == sorted(map(id, SAMPLES))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {"num_generations": 8, "batching": "shared_prefix"}),
        ("ppo", {"num_generations": 4, "batching": "padded", "num_mini_batches": 2, "num_iterations": 2}),
    ],
)
def test_a_budget_changes_nothing_but_memory(method, options, policy, tmp_path):
    """Loss, gradient norm, KL and evaluation of a run, to rounding; more micro-batches than transformers counts, and
    fewer. Nothing larger than the budget goes through the model."""
    found = []
    for budget in (None, 24, 2000):
        several = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_num_generations": 3}
        trainer_class, args = on_policy(
            method, tmp_path, max_steps=3, beta=0.1, tokens_per_batch=budget, forward_tokens_per_batch=budget and 40,
            **several, **options,
        )  # fmt: skip
        trainer = trainer_class(policy, wanted_words, args, prompts(64), prompts(6, seed=1))
        sizes, collated = [], trainer.planner.collate
        trainer.planner.collate = lambda part, collated=collated, sizes=sizes: sized(collated(part), sizes)
        trainer.train()
        trainer.close()
        assert max(sizes) <= (40 if budget == 24 else 2000)
        keys = ("loss", "grad_norm", "reward", "kl", "eval_kl", *(("critic/grad_norm",) if method == "ppo" else ()))
        found.append({key: torch.tensor(logged(trainer, key)) for key in keys})
    for key in found[0]:
        for other in found[1:]:
            torch.testing.assert_close(other[key], found[0][key], rtol=2e-3, atol=1e-4, msg=key)


def sized(batch, sizes):
    sizes.append(batch["input_ids"].numel())
    return batch


def test_a_budget_that_one_completion_exceeds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="may have 22 tokens .*set tokens_per_batch to at least 22"):
        on_policy("rloo", tmp_path, tokens_per_batch=21)
    assert on_policy("rloo", tmp_path, tokens_per_batch=22)[1].forward_tokens_per_batch == 88


@pytest.mark.parametrize(("method", "needed"), [("rloo", 64), ("online_dpo", 128)])
def test_budgets_are_of_the_prompts_that_fit_the_model(method, needed, tokenizer, tmp_path):
    """The default of 512 tokens is lowered to the 58 that 64 positions leave."""
    options = {"num_generations": 2, "max_prompt_length": 512, "forward_tokens_per_batch": 4 * needed}
    trainer_class, args = on_policy(method, tmp_path, tokens_per_batch=needed, **options)
    made = {"model": tiny_model(tokenizer), "reward": wanted_words, "processing_class": tokenizer}
    trainer_class(**made, args=args, train_dataset=prompts(8)).close()
    assert args.max_prompt_length == 58
    _, args = on_policy(method, tmp_path, tokens_per_batch=needed - 1, **options)
    with pytest.raises(ConfigError, match=f"set tokens_per_batch to at least {needed}"):
        trainer_class(**made, args=args, train_dataset=prompts(8))
