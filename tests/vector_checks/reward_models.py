"""Reward models, ensembles, best-of-n and the forms of Gao et al."""

from math import comb

import numpy as np
import pytest

from align.data.encode import render_pair
from align.errors import RewardError
from align.evaluation import fits
from align.objectives.best_of_n import bon_expected, bon_kl, bon_weights
from align.objectives.ensemble import aggregate
from align.objectives.reward_model import bradley_terry_loss, score_l2
from tests.reward_models.worlds import tokenizer as word_tokenizer
from tests.vector_checks.registry import close, covers, t64

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
    start, wholes = render_pair(prompt, answers, tokenizer, {})
    expected_start, expected_answers, end = outputs["proxy"]
    assert start == expected_start and wholes == [start + answer + end for answer in expected_answers]
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
    close([fits.gao_bon(outputs["bon_zero"], *bon), fits.gao_rl(outputs["rl_zero"], *rl)], [0.0, 0.0])
