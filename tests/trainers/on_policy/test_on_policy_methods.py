"""PPO, RLOO, GRPO and REINFORCE++ on the one loop: several updates per rollout, resume inside a rollout."""

import pytest
import torch
from peft import LoraConfig

from align.errors import ConfigError, TrainingError
from tests.trainers.tiny_runs import assert_same, logged, needs_vllm, on_policy, parameters, prompts, wanted_words

METHODS = ("ppo", "rloo", "grpo", "reinforce_pp")
SEVERAL = {"num_mini_batches": 2, "num_iterations": 2}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def make(method, policy, folder, rows=64, reward=wanted_words, peft_config=None, **options):
    trainer_class, args = on_policy(method, folder, **options)
    return trainer_class(policy, reward, args, prompts(rows), prompts(6, seed=1), peft_config=peft_config)


WITH_VLLM = pytest.param("ppo", "vllm", marks=[needs_vllm, pytest.mark.vllm])


@pytest.mark.parametrize(("method", "backend"), [*((method, "transformers") for method in METHODS), WITH_VLLM])
def test_the_reward_rises(method, backend, policy, tmp_path):
    sizes = {"per_device_train_batch_size": 16, "num_generations": 2, "learning_rate": 5e-3, "beta": 0.01}
    trainer = make(method, policy, tmp_path, max_steps=24, rollout=backend, **SEVERAL, **sizes)
    trainer.train()
    trainer.close()
    reward, kl = logged(trainer, "reward"), logged(trainer, "kl")
    assert reward[0] < 0.2 and sum(reward[-2:]) / 2 > 0.3, reward
    assert len(reward) == 6 and len(kl) == 24  # a rollout every four steps
    assert kl[0] == 0 and logged(trainer, "clip_ratio")[0] == 0 and logged(trainer, "policy/ratio")[0] == 1
    assert max(logged(trainer, "clip_ratio")) > 0 and max(logged(trainer, "rollout/mean_abs_logp_diff")) < 1e-5


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_batch_may_be_cut_in_any_way(method, policy, tmp_path):
    """16 prompts per rollout as 8 x 1 or 2 x 4: same losses and gradient norms, the critic's too."""
    keys = ["loss", "grad_norm", "reward", "kl", *(["critic/loss", "critic/grad_norm"] if method == "ppo" else [])]
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make(method, policy, tmp_path / str(batch), max_steps=8, beta=0.1, **SEVERAL, **sizes)
        trainer.train()
        found.append({key: torch.tensor(logged(trainer, key)) for key in keys})
    for key in keys:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=2e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(("method", "step"), [("ppo", 3), ("ppo", 4), ("rloo", 6), ("reinforce_pp", 1)])
def test_resuming_inside_a_rollout_is_exact(method, step, policy, tmp_path):
    """24 prompts in blocks of 8: three rollouts of four steps are an epoch; the run crosses into the second one."""
    sizes = {"per_device_train_batch_size": 4, "beta": 0.1, "save_strategy": "steps", "save_steps": step}
    changing = {"kl_target": 1.0, "kl_horizon": 50, "eval_strategy": "steps", "eval_steps": 3}

    def run(resume):
        trainer = make(method, policy, tmp_path, rows=24, max_steps=14, **SEVERAL, **sizes, **changing)
        trainer.train(resume_from_checkpoint=resume)
        lines = (tmp_path / "overoptimization.jsonl").read_text().splitlines()[1:]
        critic = parameters(trainer.critic.model) if method == "ppo" else {}
        return parameters(trainer.model), critic, logged(trainer, "loss"), logged(trainer, "reward"), lines

    whole = run(None)
    resumed = run(str(tmp_path / f"checkpoint-{step}"))
    assert_same(whole[0], resumed[0])
    assert_same(whole[1], resumed[1])
    assert whole[2:4] == resumed[2:4]
    assert [line.split('"time"')[0] for line in whole[4]] == [line.split('"time"')[0] for line in resumed[4]]


def test_a_rollout_is_not_resumed_in_other_steps(policy, tmp_path):
    sizes = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    make("rloo", policy, tmp_path, max_steps=4, **SEVERAL, **sizes).train()
    changes = ["num_mini_batches", "num_iterations"]
    for allowed, refusal in (([], "num_mini_batches: 2 before, 3 now"), (changes, f"other {' or '.join(changes)}")):
        other = make("rloo", policy, tmp_path, max_steps=8, num_mini_batches=3, resume_changes=allowed, **sizes)
        with pytest.raises(TrainingError, match=refusal):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_prompts_are_each_seen_once_per_epoch(policy, tmp_path):
    seen = []

    def reward(completions, prompts, **columns):
        seen.append(sorted(set(prompts)))
        return wanted_words(completions)

    trainer = make(
        "rloo", policy, tmp_path, rows=18, reward=reward, max_steps=16, per_device_train_batch_size=4, **SEVERAL
    )
    trainer.args.eval_on_start = False
    trainer.train()
    assert [len(part) for part in seen] == [8] * 4  # two rollouts per epoch: 2 of 18 prompts wait
    assert not set(seen[0]) & set(seen[1]) and not set(seen[2]) & set(seen[3])
    assert set(seen[0] + seen[1]) != set(seen[2] + seen[3]) or seen[0] != seen[2]


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_lora(method, policy, tmp_path):
    options = {"critic_model_name_or_path": policy} if method == "ppo" else {}
    trainer = make(method, policy, tmp_path, peft_config=LoraConfig(**LORA), max_steps=4, **SEVERAL, **options)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0 and logged(trainer, "kl")[-1] != 0
    if method == "ppo":
        with pytest.raises(ConfigError, match="needs critic_model_name_or_path"):
            make(method, policy, tmp_path, peft_config=LoraConfig(**LORA))


def test_the_critic_warms_up_alone(policy, tmp_path):
    trainer = make("ppo", policy, tmp_path, max_steps=4, critic_warmup_steps=4, weight_decay=0.1, **SEVERAL)
    before, critic = parameters(trainer.model), parameters(trainer.critic.model)
    trainer.train()
    assert_same(before, parameters(trainer.model))
    assert any(not torch.equal(critic[name], p) for name, p in parameters(trainer.critic.model).items())


def test_a_critic_whose_gradients_are_not_clipped_learns(policy, tmp_path):
    """`max_grad_norm: 0` is no limit to transformers; torch's clipping makes all gradients 0 of it."""
    trainer = make("ppo", policy, tmp_path, max_steps=2, max_grad_norm=0.0, **SEVERAL)
    head = trainer.critic.model.head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.critic.model.head.weight, head)


def test_the_critic_learns_the_return(policy, tmp_path):
    """A reward that the prompt decides: after some rollouts the critic knows it, and the advantages shrink."""

    def of_the_prompt(prompts, **columns):
        return [float("music" in prompt or "ocean" in prompt or "space" in prompt) for prompt in prompts]

    options = {"critic_learning_rate": 5e-3, "critic_warmup_steps": 60, "beta": 0.0, "value_clip": None}
    trainer = make(
        "ppo",
        policy,
        tmp_path,
        reward=of_the_prompt,
        max_steps=60,
        per_device_train_batch_size=16,
        **SEVERAL,
        **options,
    )
    trainer.train()
    explained = logged(trainer, "critic/explained_variance/task")
    assert explained[0] < 0.1 and explained[-1] > 0.8, explained


def test_adaptive_kl_moves_beta_towards_the_target(policy, tmp_path):
    sizes = {"per_device_train_batch_size": 16, "learning_rate": 5e-3}
    trainer = make("rloo", policy, tmp_path, max_steps=20, beta=0.01, kl_target=0.5, kl_horizon=60, **sizes)
    trainer.train()
    beta = logged(trainer, "beta")
    assert beta[1] < beta[0] == 0.01 and beta[-1] > min(beta)  # below the target at first, then above it


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_the_beta_of_the_log_is_what_the_rollout_is_trained_with(where, policy, tmp_path, monkeypatch):
    options = {"max_steps": 3, "beta": 0.1, "kl_target": 0.5, "kl_gain": 0.5, "kl_in": where}
    trainer = make("rloo", policy, tmp_path, **options)
    used = []
    if where == "loss":
        plain = trainer.token_losses
        monkeypatch.setattr(trainer, "token_losses", lambda *args: (used.append(trainer.kl.value), plain(*args))[1])
    else:
        from align.trainers.on_policy import loop

        plain = loop.fill_advantages
        monkeypatch.setattr(loop, "fill_advantages", lambda *args: (used.append(args[-1]), plain(*args))[1])
    trainer.train()
    assert logged(trainer, "beta") == used and len(set(used)) == 3


@pytest.mark.parametrize(("method", "options"), [("grpo", {"kl_in": "loss"}), ("ppo", SEVERAL), ("remax", {})])
def test_without_a_kl_there_is_no_reference(method, options, policy, tmp_path):
    """beta 0: the gradients of a reference that is there and counts nothing, no model and no pass through it."""
    norms = []
    for beta in (0.0, 1e-30):
        trainer_class, args = on_policy(method, tmp_path / str(beta), max_steps=2, beta=beta, **options)
        trainer = trainer_class(policy, wanted_words, args, prompts(64))
        trainer.train()
        norms.append(logged(trainer, "grad_norm"))
        assert (trainer.reference is None) == (beta == 0) == (not logged(trainer, "kl"))
        assert any("time/reference" in entry for entry in trainer.state.log_history) == (beta != 0)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_evaluation_needs_the_reference_whatever_beta_is(policy, tmp_path):
    trainer = make("rloo", policy, tmp_path / "with", beta=0.0, max_steps=2, learning_rate=1e-2)
    trainer.train()
    assert trainer.evaluate()["eval_kl"] != 0 and not logged(trainer, "kl")
    trainer_class, args = on_policy("rloo", tmp_path / "without", beta=0.0)
    alone = trainer_class(policy, wanted_words, args, prompts(16))
    with pytest.raises(ConfigError, match="holds no reference, which an evaluation measures the KL to"):
        alone.evaluate(prompts(4))


def test_correction_and_clip_options_reach_the_loss(policy, tmp_path):
    """bfloat16: the engine rounds differently, so the weights differ from 1, and the loss with them."""
    losses = {}
    for correction in ("none", "token_truncate", "sequence_mask"):
        options = {} if correction == "none" else {"rollout_correction": correction, "rollout_correction_high": 1.0}
        trainer = make("grpo", policy, tmp_path / correction, max_steps=1, bf16=True, **options)
        trainer.train()
        losses[correction] = logged(trainer, "grad_norm")[0]
        assert 0 < logged(trainer, "rollout/effective_sample_size")[0] <= 1
        weight, dropped = (logged(trainer, f"rollout/correction_{name}") for name in ("weight", "dropped"))
        if correction == "none":
            assert not weight and not dropped
        elif correction == "token_truncate":
            assert 0.98 < weight[0] < 1 and dropped == [0.0]
        else:  # what is above 1 is dropped: about half of the sequences
            assert 0.2 < dropped[0] < 0.8 and weight[0] == pytest.approx(1 - dropped[0], abs=0.05)
    assert len(set(losses.values())) == 3, losses


def test_a_group_without_variance_is_counted(policy, tmp_path):
    trainer = make(
        "grpo", policy, tmp_path, reward=lambda completions, **columns: [1.0] * len(completions), max_steps=1
    )
    trainer.train()
    assert logged(trainer, "groups/task_without_variance") == [1.0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rloo", {"num_generations": 1}, "needs at least 2"),
        ("grpo", {"scale_rewards": "std"}, "scale_rewards must be"),
        ("grpo", {"kl_estimator": "k1"}, "gradient of k1 is zero"),
        ("ppo", {"lam": 1.5}, "lam must be"),
        ("ppo", {"value_clip": 0.0}, "value_clip must be above 0"),
        ("ppo", {"kl_target": 1.0, "beta": 0.0}, "kl_target needs"),
        ("reinforce_pp", {"group_baseline": True}, "needs at least 2"),
        ("rloo", {"importance_sampling_level": "sequence_sum"}, "set loss_aggregation: sequence_mean"),
        ("rloo", {"multipliers": {"form": "tanh"}}, "there are no constraints"),
        # what would do nothing
        ("rloo", {"rollout_correction_high": 2.0}, "only with rollout_correction"),
        ("ppo", {"rollout_correction_low": 0.5}, "only with rollout_correction"),
        ("ppo", {"rollout_correction": "token_mask", "rollout_correction_high": 0.5}, "rollout_correction_high is 0.5"),
        ("grpo", {"rollout_correction": "token_mask", "rollout_correction_low": 2.0}, "rollout_correction_low is 2"),
        ("grpo", {"off_policy_mask_threshold": 0.5}, "the policy is the one that drew"),
        ("ppo", {"kl_horizon": 50.0}, "only with kl_target"),
        ("grpo", {"kl_estimator": "k2", "kl_in": "reward"}, "only with kl_in: loss"),
        ("rloo", {"kl_estimator": "k3"}, "only with kl_in: loss"),
        ("grpo", {"use_bias_correction_kl": True, "beta": 0.0}, "only with a beta above 0"),
        ("rloo", {"sync_ref_model": True, "beta": 0.0}, "nothing is trained towards the reference"),
        ("grpo", {"loss_type": "sapo", "epsilon": 0.1}, "sapo has no clip"),
        ("rloo", {"loss_type": "vespo", "epsilon_high": 0.3}, "vespo has no clip"),
        ("grpo", {"loss_type": "cispo", "epsilon": 0.1}, "cispo has no clip below 1"),
        ("remax", {"kl_mode": "one_step", "kl_in": "loss"}, "is of the KL in the reward"),
        ("remax", {"kl_mode": "one_step", "beta": 0.0}, "is of the KL in the reward"),
        ("remax", {"kl_mode": "none", "beta": 0.2}, "beta is 0.2, which would do nothing"),
    ],
)
def test_options_are_checked(method, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        on_policy(method, tmp_path, **options)


@pytest.mark.parametrize("options", [{"environment_timeout": 5.0}, {"environment_on_error": "mask"}])
def test_options_of_an_environment_need_one(options, policy, tmp_path):
    with pytest.raises(ConfigError, match="only with an environment or tools"):
        make("rloo", policy, tmp_path, **options)
