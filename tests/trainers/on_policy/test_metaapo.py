"""MetaAPO: its loss, which prompts are answered anew, how h learns, exact resumes, and what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from align.errors import ConfigError, DataError, TrainingError
from align.objectives.dpo import sigmoid
from align.objectives.meta_apo import meta_mixture, meta_weight
from align.objectives.pair_logps import pair_logps
from align.trainers.on_policy.meta_learner import FILE, MetaLearner
from align.trainers.on_policy.mixed_pairs import MixedPlanner, mixed_groups, online_rows
from align.trainers.on_policy.pair_batches import in_groups
from align.trainers.on_policy.samples import Sample
from tests.trainers.on_policy import meta_ranks
from tests.trainers.on_policy.test_online_docs import METAAPO, metrics_of
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, tiny_model, wanted_words
from tests.warm import run_ranks


def make(policy, folder, rows=64, reward=wanted_words, eval_rows=None, method="metaapo", data=None, **options):
    given = {name: options.pop(name) for name in ("peft_config", "ref_model", "gold_reward") if name in options}
    trainer_class, args = on_policy(method, folder, **{"num_generations": 3, **options})
    return trainer_class(policy, reward, args, toy_pairs(rows) if data is None else data, eval_rows, **given)


def other(tokenizer):
    return tiny_model(tokenizer, seed=5)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_the_loss_is_that_of_the_paper_on_the_pairs_that_it_made(batching, policy, tokenizer, tmp_path):
    """Loss and gradient against `meta_mixture` of DPO's losses, on sequences that are run one by one."""
    options = {"max_steps": 1, "batching": batching, "beta": 0.3, "ref_model": other(tokenizer)}
    trainer = make(policy, tmp_path, **options)
    start = {name: p.requires_grad_() for name, p in parameters(trainer.model).items()}
    trainer.train()
    groups = [group for group in in_groups(trainer.buffer.samples, 4) if not group[0].left_out]
    assert 3 <= len(groups) <= 7
    for old_w, old_l, new_w, new_l in groups:
        assert (
            old_w.completion_ids == old_w.prompt["chosen_ids"] and old_l.completion_ids == old_l.prompt["rejected_ids"]
        )
        assert new_w.score > new_l.score and new_w.prompt is old_w.prompt

    def logps(model, weights, sample):
        prompt, ids = sample.prompt["prompt_ids"], sample.completion_ids
        logits = torch.func.functional_call(model, weights, (torch.tensor([prompt + ids]),)).logits[
            0, len(prompt) - 1 : -1
        ]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]

    reference, losses = options["ref_model"], []
    for group in groups:
        pairs = []
        for two in (group[:2], group[2:]):
            lengths = [sample.length for sample in two]
            rows = [
                [logps(model, weights, s) for s in two] for model, weights in ((trainer.model, start), (reference, {}))
            ]
            policy_rows, ref_rows = (nn.utils.rnn.pad_sequence(of, batch_first=True) for of in rows)
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            pairs.append(pair_logps(policy_rows, mask, ref_rows.detach()))
        w = meta_weight(pairs[0].delta.detach(), *MetaLearner(learning_rate=0, every=1).parameters.values()).detach()
        losses.append(meta_mixture(*(sigmoid(two, beta=0.3) for two in pairs), w))
    loss = torch.cat(losses).mean()
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, list(start.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm, rel=1e-4)


def test_with_no_weight_on_offline_pairs_it_is_online_dpo(policy, tmp_path):
    common = {"max_steps": 4, "num_mini_batches": 2, "beta": 0.2}
    mixed = make(policy, tmp_path / "mixed", adaptive_sampling=False, **common)
    mixed.meta.weights = torch.zeros_like
    online = make(policy, tmp_path / "online", method="online_dpo", data=mixed.train_dataset, **common)
    mixed.train()
    online.train()
    for key in ("loss", "grad_norm", "reward", "rewards/margins", "kl", "pairs/without_signal", "entropy"):
        assert logged(mixed, key) == pytest.approx(logged(online, key), rel=1e-4, abs=1e-6), key
    for name, weight in parameters(online.model).items():
        torch.testing.assert_close(parameters(mixed.model)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_the_batch_may_be_cut_in_any_way(policy, tokenizer, tmp_path):
    found = []
    for cut in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "batching": "padded"},
        {"tokens_per_batch": 88, "forward_tokens_per_batch": 100},
    ):
        options = {
            "num_mini_batches": 2,
            "num_iterations": 2,
            "max_steps": 4,
            "meta_every": 3,
            "adam_epsilon": 0.1,
            **cut,
        }
        trainer = make(policy, tmp_path, ref_model=other(tokenizer), **options)
        trainer.train()
        keys = ("loss", "grad_norm", "reward", "meta/loss", "meta/weight", "meta/drawn")
        found.append({key: torch.tensor(logged(trainer, key)) for key in keys})
    for one in found[1:]:
        for key, values in one.items():
            torch.testing.assert_close(values, found[0][key], rtol=2e-3, atol=1e-4, msg=key)


def test_ipo_is_mixed_in_the_same_way(policy, tokenizer, tmp_path):
    trainer = make(policy, tmp_path, loss_type="ipo", beta=0.5, max_steps=1, ref_model=other(tokenizer), rows=8)
    weights, mix = [], trainer.meta.weights
    trainer.meta.weights = lambda delta: weights.append(mix(delta)) or weights[-1]
    trainer.train()
    delta, offline, online = trainer.meta.pairs.unbind(-1)
    expected = (weights[-1] * offline + (1 - weights[-1]) * online).mean().item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5) and offline.std() > 0.01
    torch.testing.assert_close(weights[-1], mix(delta))


# ---- which prompts are answered anew --------------------------------------------------------------------------------


def test_badly_ranked_prompts_are_answered_anew(policy, tokenizer, tmp_path):
    """With probability 1 - w each, and the engine is asked for these alone."""
    trainer = make(policy, tmp_path, rows=64, per_device_train_batch_size=64, max_steps=1, ref_model=other(tokenizer))
    asked, weights, generate, mix = [], [], trainer.pipeline.draw, trainer.meta.weights
    trainer.pipeline.draw = lambda prompts, *rest: asked.extend(prompts) or generate(prompts, *rest)
    trainer.meta.weights = lambda delta: weights.append(mix(delta)) or weights[-1]
    trainer.train()
    assert len(asked) == round(64 * logged(trainer, "meta/drawn")[0]) and 30 < len(asked) < 55
    found = weights[0]  # of the choice; the loss's are of the same policy here
    assert 64 * (1 - found.mean().item()) == pytest.approx(len(asked), abs=3 * 4)
    assert found.min() < 0.3 and found.max() > 0.45  # h falls where the policy ranks worse than its reference
    rows = {prompt["row"] for prompt in asked}
    trained = {s.prompt["row"] for s in trainer.buffer.samples if not s.left_out}
    assert trained <= rows and len(trained) == round(len(rows) * (1 - logged(trainer, "pairs/without_signal")[0]))
    assert len(trainer.meta.pairs) == len(trained)


def test_prompts_that_are_not_answered_take_no_place_in_micro_batches():
    def sample(prompt, kind, left_out=False):
        return Sample(
            {"prompt_ids": [prompt] * 3}, [10 * prompt + kind] * 2, "", [0.0] * 2, False, 0, left_out=left_out
        )

    prompts_, kept = range(1, 9), {2, 3, 7}
    offline = [sample(p, kind) for p in prompts_ for kind in (0, 1)]
    online = [sample(p, kind, left_out=p not in kept) for p in prompts_ for kind in (2, 3)]
    samples = mixed_groups(offline, online)
    assert len(samples) == 32 and {s.prompt["prompt_ids"][0] for s in samples if not s.left_out} == kept
    for shared in (False, True):
        planner = MixedPlanner(0, num_generations=8, shared_prefix=shared)
        parts = planner.plan(samples, 2)
        assert sorted(s.completion_ids[0] for part in parts for s in part) == sorted(
            10 * p + kind for p in kept for kind in range(4)
        )
        for part in parts:
            kinds = [s.completion_ids[0] % 10 for s in part]
            assert kinds == sorted(kinds, key=[0, 2, 1, 3].index)  # offline and online chosen, then rejected
            assert [kinds[i] for i in online_rows(len(part))] == [2] * (len(part) // 4) + [3] * (len(part) // 4)
        assert len(planner.plan(samples, 5)) == 5  # two of the others, left out, fill the micro-batches
        assert {s.completion_ids[0] for s in planner.new_pairs(samples)} == {22, 23, 32, 33, 72, 73}


def test_a_rollout_without_any_prompt_changes_nothing(policy, tmp_path, caplog):
    trainer = make(policy, tmp_path, max_steps=2, num_mini_batches=2)
    trainer.meta.parameters["fc2_bias"].data.fill_(50.0)  # w is 1
    before = parameters(trainer.model)
    trainer.train()
    assert_same(before, parameters(trainer.model))
    assert logged(trainer, "meta/drawn") == [0.0] and "no prompt has a pair" in caplog.text


# ---- h --------------------------------------------------------------------------------------------------------------


class Released(nn.Module):
    """As in the authors' code."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(1, 100), nn.Linear(100, 1)
        for layer in (self.fc1, self.fc2):
            nn.init.constant_(layer.weight, 0.1)
            nn.init.constant_(layer.bias, 0.0)

    def forward(self, x):
        return torch.sigmoid(self.fc2(torch.tanh(self.fc1(x.unsqueeze(-1))))).squeeze(-1)


def test_h_learns_as_in_the_released_code():
    """Ten steps of AdamW on the mixture, with the log-probs as constants: the same w."""
    torch.manual_seed(0)
    ours, theirs = MetaLearner(learning_rate=5e-3, every=2), Released()
    decayed = [theirs.fc1.weight, theirs.fc2.weight]
    groups = [{"params": decayed, "weight_decay": 1e-4}]
    groups += [{"params": [theirs.fc1.bias, theirs.fc2.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    assert ours.weights(torch.zeros(1)).item() == pytest.approx(0.33358, abs=1e-5)  # at the start of a run
    for step in range(1, 21):
        delta, offline, online = 3 * torch.randn(16), torch.rand(16), torch.rand(16)
        ours.keep(delta[:10], offline[:10], online[:10])
        ours.keep(delta[10:], offline[10:], online[10:])
        loss = ours.end_step(step)
        assert (loss is None) == (step % 2 == 1)
        if step % 2:
            before = delta, offline, online
            continue
        delta, offline, online = (torch.cat(two) for two in zip(before, (delta, offline, online), strict=True))
        w = theirs(torch.nn.functional.logsigmoid(delta))
        expected = (w * offline + (1 - w) * online).mean()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
    probe = torch.linspace(-8, 8, 9)
    torch.testing.assert_close(ours.weights(probe), theirs(torch.nn.functional.logsigmoid(probe)).detach())


def test_h_gives_weight_to_the_pair_with_the_smaller_loss():
    """Offline pairs with a positive Delta have the smaller loss, the others the larger one: w separates them."""
    learner, delta = MetaLearner(learning_rate=5e-2, every=1), torch.tensor([-4.0, -2.0, 2.0, 4.0])
    for step in range(1, 201):
        learner.keep(delta, (delta < 0).float(), 1 - (delta < 0).float())
        learner.end_step(step)
    w = learner.weights(delta)
    assert w[:2].max() < 0.1 and w[2:].min() > 0.9, w


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_resuming_is_exact(adapter, policy, tmp_path):
    """Inside a rollout, and between two steps of h."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if adapter else None
    options = {
        "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3, "max_steps": 7, "meta_every": 2,
        "num_mini_batches": 2, "meta_learning_rate": 0.05,
    }  # fmt: skip

    def run(resume):
        trainer = make(policy, tmp_path, rows=24, peft_config=lora, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-3"))
    assert_same(parameters(whole.model), parameters(resumed.model))
    assert_same(whole.meta.parameters, resumed.meta.parameters)
    assert torch.equal(whole.meta.pairs, resumed.meta.pairs) and len(whole.meta.pairs)
    assert logged(whole, "loss") == logged(resumed, "loss") and len(logged(whole, "meta/loss")) == 3
    ended = run(str(tmp_path / "checkpoint-7"))  # of a run that was killed before it saved h
    assert_same(whole.meta.parameters, ended.meta.parameters)


def test_a_run_goes_on_from_another_ones_h(policy, tmp_path):
    first = make(policy, tmp_path / "first", max_steps=2, meta_every=1, meta_learning_rate=0.05)
    first.train()
    first.save_model()
    options = {"meta_learner": str(tmp_path / "first"), "ref_model_name_or_path": policy, "max_steps": 1}
    second = make(str(tmp_path / "first"), tmp_path / "second", **options)
    assert_same(second.meta.parameters, first.meta.parameters)
    second.train()
    assert logged(second, "kl")[0] != 0  # to the policy before the first run
    assert not torch.equal(
        second.meta.parameters["fc2_bias"], MetaLearner(learning_rate=0, every=1).parameters["fc2_bias"]
    )
    with pytest.raises(TrainingError, match=r"has no meta_learner.safetensors"):
        make(policy, tmp_path / "third", meta_learner=policy)


def test_an_h_that_is_not_whole_is_refused(tmp_path):
    learner = MetaLearner(learning_rate=0, every=1)
    learner.save(tmp_path)
    (tmp_path / "usual").touch()
    assert (tmp_path / FILE).stat().st_mode == (tmp_path / "usual").stat().st_mode  # safetensors 0.8 writes 0600
    content = (tmp_path / FILE).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" * len(content)):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(TrainingError, match="is damaged"):
            learner.load(tmp_path)
    save_file({"fc1_weight": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(TrainingError, match="holds other weights"):
        learner.load(tmp_path)


def test_the_reference_may_follow(policy, tmp_path):
    trainer = make(
        policy, tmp_path, max_steps=4, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0
    )
    trainer.train()
    kl = logged(trainer, "kl")
    assert abs(kl[0]) < 1e-5 and abs(kl[2]) < 1e-5 and abs(kl[1]) > 1e-4 and abs(kl[3]) > 1e-4, kl


def test_it_learns_from_both_kinds_of_pairs(policy, tmp_path):
    """The wanted words become more, as the rewards have it, and the answers of the data are ranked as these are."""
    options = {"max_steps": 16, "per_device_train_batch_size": 32, "num_generations": 4, "meta_every": 2}
    evaluated = {"eval_rows": prompts(48, seed=1), "eval_strategy": "steps", "eval_steps": 16}
    trainer = make(policy, tmp_path, rows=128, gold_reward=wanted_words, **options, **evaluated)
    trainer.train()
    gold, accuracies = logged(trainer, "eval_gold"), logged(trainer, "offline/accuracies")
    assert gold[1] > gold[0] + 0.1, gold
    assert np.mean(accuracies[-4:]) > 0.65, accuracies


def test_two_processes_are_one(policy, tmp_path):
    """Both have the same h, whose steps are of all pairs, though they drew different numbers of prompts."""
    run_ranks("tests.trainers.on_policy.meta_ranks", str(policy), str(tmp_path / "two"), logs=tmp_path / "logs")
    one = meta_ranks.train(policy, tmp_path / "one", 1)
    first, second = (json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(one["meta/loss"]) == 2
    for key, values in one.items():
        assert first[key] == (values if key in ("logged", "pairs") else pytest.approx(values, rel=2e-3, abs=1e-4)), key
    assert metrics_of(METAAPO) == set(one["logged"]), "docs/online.md names other metrics"


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused(policy, tokenizer, tmp_path):
    for options, message in (
        ({"old_policy_share": 0.5}, "old_policy_share: 0.5 has no effect here"),
        ({"dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds: 1 has no effect here"),
        ({"chat_template_kwargs": {"a": 1}}, "has no effect here"),
        ({"loss_type": "simpo"}, "has no reference"),
        ({"num_generations": 1}, "a pair is made of the prompt's own completions"),
        ({"meta_every": 0}, "meta_every must be at least 1"),
        ({"meta_learning_rate": -1.0}, "meta_learning_rate must be at least 0"),
        ({"tokens_per_batch": 87}, "the 4 completions of a prompt's pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(policy, tmp_path, **options)
    with pytest.raises(ConfigError, match="given twice"):
        make(policy, tmp_path, ref_model=other(tokenizer), ref_model_name_or_path=policy)
    with pytest.raises(DataError, match="chosen"):
        make(policy, tmp_path, data=prompts(8))
    same = Dataset.from_list([{"prompt": "rose", "chosen": " wave", "rejected": " wave"}] * 8)
    with pytest.raises(DataError):
        make(policy, tmp_path, data=same)
