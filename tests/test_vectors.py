"""Every golden vector of a folder of JSON files, run against our functions.

The folder is `ALIGN_VECTORS`, by default tests/vectors: numbers made with the original authors' code. An entry that no
function of ours answers yet is skipped as "not covered yet: <name>"; it never counts as passed.
"""

import json
import os
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.encode import render_pair
from align.errors import RewardError
from align.evaluation import fits
from align.objectives import kl
from align.objectives.advantages import remax_loss, remax_token_weights, reward_to_go
from align.objectives.best_of_n import bon_expected, bon_kl, bon_weights
from align.objectives.ensemble import aggregate
from align.objectives.reward_model import bradley_terry_loss, score_l2
from tests.reward_models.worlds import tokenizer as word_tokenizer

FOLDER = Path(os.environ.get("ALIGN_VECTORS", Path(__file__).parent / "vectors"))
CHECKS = {}


def covers(*names):
    def register(check):
        for name in names:
            CHECKS[name] = check
        return check

    return register


def t64(value):
    return torch.tensor(value, dtype=torch.float64)


def close(actual, expected, *, rtol=1e-6, atol=1e-9):
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), np.asarray(expected), rtol=rtol, atol=atol)


# ---- ReMax and the KL estimators


@covers(
    "remax_original_g0.99_kl0.05_clip5.0", "remax_original_g1.0_kl0.05_clip5.0", "remax_original_g0.99_kl0.1_clip1.0"
)
def remax_original(inputs, outputs):
    score, greedy, logp, ref, new_logp, mask = (
        t64(inputs[key]) for key in ("score", "greedy_reward", "logp", "ref", "new_logp", "mask")
    )
    weights = remax_token_weights(
        score, greedy, logp, ref, mask, beta=inputs["kl_ctl"], gamma=inputs["gamma"],
        reward_clip=inputs["clip_reward_value"], kl_mode="one_step",
    )  # fmt: skip
    close(weights, outputs["token_weights"])
    close(remax_loss(new_logp, weights, mask), outputs["loss"])
    close(remax_loss(new_logp, weights, mask, normalizer=2 * mask.sum()), outputs["loss"] / 2)


@covers("verl_remax_nokl", "verl_remax_k1")
def verl_remax(inputs, outputs):
    rewards, mask, greedy = (t64(inputs[key]) for key in ("token_level_rewards", "mask", "reward_baselines"))
    close(reward_to_go(rewards, mask), outputs["returns"])
    # token rewards = a score on the last token - beta * k1 elsewhere: so split, beta = 1 gives verl's advantages
    last = mask.cumsum(-1) == mask.sum(-1, keepdim=True)
    penalty = torch.where(last & mask.bool(), torch.zeros(()), rewards)
    score = (rewards * mask).sum(-1) - (penalty * mask).sum(-1)
    advantages = remax_token_weights(
        score, greedy, -penalty, torch.zeros_like(penalty), mask, beta=1.0, kl_mode="to_go"
    )
    close(advantages, outputs["advantages"])


@covers("verl_kl_k1", "verl_kl_k2", "verl_kl_k3", "openrlhf_kl_k1", "openrlhf_kl_k2", "openrlhf_kl_k3")
def kl_values(inputs, outputs, name):
    estimator = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[name[-2:]]
    # OpenRLHF's were computed in float32, where the two log-probs cancel
    tolerance = {"rtol": 1e-5, "atol": 2e-7} if name.startswith("openrlhf") else {}
    close(estimator(t64(inputs["logp"]), t64(inputs["ref"])), outputs["kl"], **tolerance)


@covers("verl_kl_gradients")
def kl_gradients(inputs, outputs):
    for name, expected in outputs.items():
        logp = t64(inputs["logp"]).requires_grad_()
        values = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[name](logp, t64(inputs["ref"]))
        values.sum().backward()
        close(values.detach(), expected["value"])
        close(logp.grad, expected["grad"])


@covers("ens_ppo_kl_estimators")
def ppo_kl_estimators(inputs, outputs):
    logp, ref, mask = (t64(inputs[key]) for key in ("logprobs", "ref_logprobs", "mask"))
    close(kl.k1(logp, ref) * mask, outputs["log_ratio"], atol=1e-7)
    for estimator, name in ((kl.k1, "k1_sum_mean"), (kl.k2, "k2_sum_mean")):
        close(kl.masked_sum(estimator(logp, ref), mask).mean(), outputs[name], rtol=1e-5, atol=1e-7)
    # released: e^d - 1 - d, the estimator for samples from the *reference*; ours is e^-d - 1 + d, and differs
    close(kl.masked_sum(kl.k3(ref, logp), mask).mean(), outputs["k3_sum_mean"], rtol=1e-5)
    assert abs(kl.masked_sum(kl.k3(logp, ref), mask).mean() - outputs["k3_sum_mean"]) > 0.01
    response = mask.clone()
    response[:, 1] = 0  # one prompt position per sequence
    close(kl.masked_sum(kl.k2(logp, ref), response).mean(), outputs["k2_response_only"], rtol=1e-5)
    sequence_level = kl.masked_sum(kl.k1(logp, ref), mask).square().mean() / 2
    close(sequence_level, outputs["k2_sequence_level_mean"], atol=1e-12)


# ---- reward models and ensembles


@covers("ens_rm_loss")
def rm_loss(inputs, outputs):
    chosen, rejected = t64(inputs["pos"]), t64(inputs["neg"])
    losses = bradley_terry_loss(chosen, rejected) + inputs["beta"] * score_l2(chosen, rejected)
    close(losses, outputs["per_pair"])
    close(losses.mean(), outputs["mean"])


@covers("ens_aggregate_bon_numpy")
def aggregate_bon(inputs, outputs):
    scores = t64(inputs["scores"])[:, None]
    close(aggregate(scores, "mean").scores, [outputs["mean"]])
    close(aggregate(scores, "wco").scores, [outputs["wco"]])
    for lambda_ in inputs["lambdas"]:
        uwo = aggregate(scores, "uwo", lambda_=lambda_)
        close(uwo.scores, [outputs["uwo"][str(lambda_)]])
        close(uwo.variance, [outputs["population_variance"]])


@covers("ens_get_reward")
def get_reward(inputs, outputs):
    base = t64([sum(ord(c) % 7 for c in text) for text in inputs["samples"]])
    close(base, outputs["member_base"])
    scores = t64(inputs["scales"])[:, None] * base
    uwo = aggregate(scores, "uwo", lambda_=inputs["uwo_lambda"], ddof=1)
    close(uwo.scores, outputs["uwo"])
    close(uwo.variance, outputs["variance"])
    close(aggregate(scores, "wco").scores, outputs["wco"])
    close(aggregate(scores[:1], "mean").scores, outputs["single"])
    # released: with one member the variance is uninitialised memory
    with pytest.raises(RewardError, match="at least two members"):
        aggregate(scores[:1], "uwo", lambda_=inputs["uwo_lambda"])


@covers("ens_prompt_format")
def the_reward_model_sees_the_instruction(inputs, outputs):
    """Released: the gold model's template lost everything after its first line. Ours is the chat template, whole."""
    template = (
        "{% for m in messages %}{{ '<|prompter|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}"
        "<|endoftext|>{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
    )
    tokenizer = word_tokenizer(template=template)
    entry = inputs["entry"]
    prompt = [{"role": "user", "content": f"{entry['instruction']}\n{entry['input']}"}]
    answers = [[{"role": "assistant", "content": answer}] for answer in entry["answers"]]
    start, completions = render_pair(prompt, answers, tokenizer, {})
    expected_start, expected_answers, end = outputs["proxy"]
    assert start == expected_start and completions == [answer + end for answer in expected_answers]
    assert entry["instruction"] in start and entry["instruction"] not in outputs["gold_as_coded"][0]


# ---- best-of-n


@covers("bon_kl_analytic")
def kl_of_best_of_n(inputs, outputs):
    close(bon_kl(inputs["n"]), outputs["kl"], rtol=1e-12)
    close(np.sqrt(bon_kl(inputs["n"])), outputs["sqrt_kl"], rtol=1e-12)


@covers("ens_unbiased_bon_estimator")
def unbiased_best_of_n(inputs, outputs):
    proxy = np.array([prompt["proxy_scores"] for prompt in inputs["dataset"]])
    gold = np.array([prompt["gold_scores"] for prompt in inputs["dataset"]])
    ns = [int(n) for n in outputs]
    shuffled = np.random.default_rng(0).permutation(proxy.shape[1])
    for order in (np.arange(proxy.shape[1]), shuffled):
        by_gold = bon_expected(proxy[:, order], gold[:, order], ns).mean(0)
        by_proxy = bon_expected(proxy[:, order], proxy[:, order], ns).mean(0)
        for column, n in enumerate(ns):
            close(by_gold[column], outputs[str(n)]["gold"], rtol=1e-12)
            close(by_proxy[column], outputs[str(n)]["proxy"], rtol=1e-12)
            close(bon_weights(inputs["N"], n)[n - 1 :], outputs[str(n)]["coeffs"], rtol=1e-12)


@covers("ens_bug_effect_on_gold_curve")
def gold_follows_the_ensemble(inputs, outputs):
    """Released: proxy scores re-sorted by the ensemble, gold left in member 1's order. Ours re-sorts both."""
    N = len(outputs["wco_fixed"])
    weights = np.array([[comb(i, n) / comb(N, n + 1) for i in range(N)] for n in range(N)])

    def ranked(curve):  # the answers' (gold, selection score), ascending in the selection score: the curve inverted
        return np.linalg.solve(weights, np.array(curve))

    member1, wco = ranked(outputs["member1_alone"]), ranked(outputs["wco_fixed"])
    by_gold = np.argsort(member1[:, 0]), np.argsort(wco[:, 0])  # the gold scores differ, so they name the answers
    gold, member1, wco = member1[by_gold[0], 0], member1[by_gold[0], 1], wco[by_gold[1], 1]
    close(gold, ranked(outputs["wco_fixed"])[by_gold[1], 0])
    ns = list(range(1, N + 1))
    for selection, name in ((wco, "wco_fixed"), (member1, "member1_alone")):
        for values, column in ((gold, 0), (selection, 1)):
            close(bon_expected(selection[None], values[None], ns)[0], np.array(outputs[name])[:, column])
    gold_curve, released = bon_expected(wco[None], gold[None], ns)[0], np.array(outputs["wco_as_released"])[:, 0]
    assert gold_curve[-1] - released[-1] > 2.9


@covers("gao_forms")
def forms_of_gao(inputs, outputs):
    bon, rl = (inputs["alpha_bon"], inputs["beta_bon"]), (inputs["alpha_rl"], inputs["beta_rl"])
    close(fits.gao_bon(inputs["d"], *bon), outputs["R_bon"])
    close(fits.gao_rl(inputs["d"], *rl), outputs["R_rl"])
    close(fits.gao_bon_peak(*bon), outputs["bon_opt"])
    close(fits.gao_rl_peak(*rl), outputs["rl_opt"])
    close([fits.gao_bon_zero(*bon), fits.gao_rl_zero(*rl)], [outputs["bon_zero"], outputs["rl_zero"]])


# ---- the folder


def load(folder: Path):
    entries = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        assert isinstance(content, dict) and "vectors" in content, f"{path}: not a file of vectors (no key 'vectors')"
        for number, entry in enumerate(content["vectors"]):
            name = entry.get("name", entry.get("id"))
            shape_is_known = name is not None and isinstance(entry.get("inputs"), dict) and "outputs" in entry
            assert shape_is_known, f"{path}, entry {number} ({name}): needs name or id, inputs and outputs"
            entry["inputs"] = {key: resolve(value, content.get("common", {})) for key, value in entry["inputs"].items()}
            entries.append((name, entry))
    return entries


def resolve(value, common: dict):
    is_reference = isinstance(value, str) and value.startswith("common.")
    # an expression over the shared tensors ("common.logp + 2.0") stays text, for the check that will cover it
    return common.get(value.removeprefix("common."), value) if is_reference else value


ENTRIES = load(FOLDER)


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_vector(name, entry):
    if name not in CHECKS:
        pytest.skip(f"not covered yet: {name}")
    check = CHECKS[name]
    extra = {"name": name} if "name" in check.__code__.co_varnames[: check.__code__.co_argcount] else {}
    check(entry["inputs"], entry["outputs"], **extra)


def test_every_covered_vector_is_there():
    missing = sorted(set(CHECKS) - {name for name, _ in ENTRIES})
    assert not missing, f"{FOLDER} lacks vectors that this file claims to check: {missing}"


def test_names_are_unique():
    names = [name for name, _ in ENTRIES]
    assert len(names) == len(set(names))
