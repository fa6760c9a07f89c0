"""What comes out of an engine: order, lengths, log-probs, ends, and its checks of what goes in."""

from dataclasses import replace

import pytest
import torch

from align.errors import ConfigError, RolloutError
from align.rollout import SamplingParams, make_engine
from align.rollout.seeds import derive_seed
from tests.rollout.rollout_models import EOS, VOCAB, is_greedy, llama, needs_vllm, never_ending, own_logps, prompts

GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def model():
    """The same weights as the shared engine's."""
    return never_ending(llama())


def test_sampled_and_greedy_requests_share_a_call_and_keep_their_order(engine, model):
    ids = prompts([5, 40, 3, 17])
    params = [SamplingParams(8, n=3), GREEDY, SamplingParams(2, temperature=0.5), GREEDY]
    rollouts = engine.generate(ids, params)
    assert [r.prompt_ids for r in rollouts] == ids
    assert [len(r.completions) for r in rollouts] == [3, 1, 1, 1]
    assert [[len(c.token_ids) for c in r.completions] for r in rollouts] == [[8, 8, 8], [6], [2], [6]]
    for i in (1, 3):
        assert is_greedy(model, ids[i], rollouts[i].completions[0].token_ids)
        assert rollouts[i].completions[0].logprobs is None
    assert {r.weight_version for r in rollouts} == {0}


def test_what_is_done_is_told_once_and_whole(engine):
    """By vLLM, which draws all together, the short ones before the long one."""
    ids, told = prompts([5, 40, 3, 17]), {}
    params = [SamplingParams(60, n=3, seed=1), SamplingParams(2, n=7, seed=2), GREEDY, SamplingParams(3, seed=3)]

    def done(index, completions):
        assert index not in told
        told[index] = completions

    found = engine.generate(ids, params, on_done=done)
    assert {index: made for index, made in enumerate(rollout.completions for rollout in found)} == told
    assert engine.tells and (engine.name == "transformers" or list(told)[-1] == 0)
    again = engine.generate(ids, params)
    assert [[c.token_ids for c in r.completions] for r in again] == [
        [c.token_ids for c in r.completions] for r in found
    ]
    with pytest.raises(RolloutError, match="which has no place"):
        engine.generate(ids[:1], GREEDY, on_done=refuse)


def refuse(index, completions):
    raise RolloutError("a completion which has no place")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_the_models_at_the_sampling_temperature(engine, model, temperature):
    ids = prompts([4, 60, 150])
    for rollout in engine.generate(ids, SamplingParams(12, n=2, temperature=temperature)):
        for completion in rollout.completions:
            expected = own_logps(model, rollout.prompt_ids, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


def test_long_completions_of_uneven_length(engine, model):
    """Past the room that a key-value cache was given at first, while ended rows are dropped on the way."""
    ids = prompts([4, 30, 4, 9])
    params = [SamplingParams(90 + 50 * i, n=2) for i in range(3)] + [SamplingParams(180, temperature=0)]
    rollouts = engine.generate(ids, params)
    for rollout, own in zip(rollouts[:3], params, strict=False):
        for completion in rollout.completions:
            assert len(completion.token_ids) == own.max_tokens
            expected = own_logps(model, rollout.prompt_ids, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)
    assert is_greedy(model, ids[3], rollouts[3].completions[0].token_ids)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 20, "top_p": 0.5}, {"min_p": 0.3, "top_k": 4}])
def test_truncated_logprobs_are_renormalised_over_what_can_be_drawn(engine, model, cut):
    (prompt,) = prompts([9])
    with torch.no_grad():
        ordered, order = model.eval()(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).sort(descending=True)
    if "min_p" in cut:
        ordered = ordered[ordered.exp() >= cut["min_p"] * ordered[0].exp()].log_softmax(-1)
    if "top_k" in cut:
        ordered = ordered[: cut["top_k"]].log_softmax(-1)
    if "top_p" in cut:  # the smallest set of the most likely tokens that holds top_p
        ordered = ordered[: int((ordered.exp().cumsum(0) < cut["top_p"]).sum()) + 1].log_softmax(-1)
    expected = dict(zip(order.tolist(), ordered.tolist(), strict=False))
    (rollout,) = engine.generate([prompt], SamplingParams(1, n=200, **cut))
    drawn = {c.token_ids[0]: c.logprobs[0] for c in rollout.completions}
    assert drawn == pytest.approx({token: expected[token] for token in drawn}, abs=1e-4)
    assert len(drawn) > 1


def test_a_repetition_penalty_is_that_of_transformers(engine, model):
    """Of prompt and completion, before the temperature, and in the log-probs; a neighbour without one has none."""
    from transformers import RepetitionPenaltyLogitsProcessor

    (prompt,) = prompts([9])
    process = RepetitionPenaltyLogitsProcessor(2.5)
    asked = [SamplingParams(10, n=3, temperature=0.7), SamplingParams(10, temperature=0), SamplingParams(4)]
    asked[:2] = [replace(params, repetition_penalty=2.5) for params in asked[:2]]
    sampled, greedy, plain = engine.generate([prompt] * 3, asked)
    for completion in [*sampled.completions, *greedy.completions]:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        for t, token in enumerate(completion.token_ids):
            changed = process(torch.tensor([prompt + completion.token_ids[:t]]), logits[t : t + 1].clone())[0]
            if completion.logprobs is None:
                assert token == changed.argmax()
            else:
                assert completion.logprobs[t] == pytest.approx(float((changed / 0.7).log_softmax(-1)[token]), abs=1e-4)
    (completion,) = plain.completions
    expected = own_logps(model, prompt, completion.token_ids, 1.0)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


def test_a_call_with_more_prompt_tokens_than_one_scheduling_step_takes(engine, model):
    ids = prompts([150] * 40, seed=1)  # vLLM processes at most 4,096 prompt tokens at once on CPUs
    for rollout in engine.generate(ids, SamplingParams(3)):
        (completion,) = rollout.completions
        expected = own_logps(model, rollout.prompt_ids, completion.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


def test_samples_of_one_prompt_differ(engine):
    (rollout,) = engine.generate(prompts([6]), SamplingParams(10, n=8, seed=3))
    assert len({tuple(c.token_ids) for c in rollout.completions}) == 8


def test_draws_follow_the_distribution(engine, model):
    (prompt,) = prompts([12], seed=4)
    (rollout,) = engine.generate([prompt], SamplingParams(1, n=2000, temperature=0.7))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in rollout.completions]), minlength=VOCAB)
    expected = torch.stack([own_logps(model, prompt, [t], 0.7) for t in range(VOCAB)]).exp().flatten() * 2000
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum() + (
        (counts[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum()
    )
    # chi-square with k degrees of freedom has mean k and variance 2k: five standard deviations
    degrees = int(common.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@needs_vllm
def test_vllm_draws_seeded_tokens_with_one_number_each(model):
    """The token of a draw is the inverse of the distribution function at the next number of the request's generator."""
    (prompt,) = prompts([9], seed=2)
    engine = make_engine(model, backend="vllm", max_model_len=64)
    (rollout,) = engine.generate([prompt], SamplingParams(20, n=3, seed=5, temperature=0.7))
    engine.close()
    for number, completion in enumerate(rollout.completions):
        generator = torch.Generator().manual_seed(derive_seed("request", 5) + number)
        context = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                logps = (model.eval()(torch.tensor([context])).logits[0, -1] / 0.7).log_softmax(-1)
            below = logps.double().exp().cumsum(-1)
            point = torch.rand((), generator=generator, dtype=torch.float64) * below[-1]
            assert token == int((below <= point).sum())
            context.append(token)


def ending_model(last: int):
    """After any token `t` comes t + 1, up to `last`, then the end token: a chain that greedy decoding follows."""
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream is the embedding alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.one_hot(torch.arange(VOCAB) % 64, 64).float()
        model.model.embed_tokens.weight.copy_(embedding)
        follower = torch.arange(VOCAB) + 1
        follower[last] = EOS
        model.lm_head.weight.zero_()
        for token in range(64):
            model.lm_head.weight[follower[token], token] = 4.0
    return model


def test_the_end_token_ends_and_is_part_of_the_completion(holding):
    engine = holding(ending_model(last=12))
    params = [
        SamplingParams(20, temperature=0),
        SamplingParams(3, temperature=0),
        SamplingParams(4, temperature=0),
        SamplingParams(20, temperature=0, stop_token_ids=(11,)),
        SamplingParams(20, temperature=0, min_tokens=6),
    ]
    got = [r.completions[0] for r in engine.generate([[5, 9]] * 5, params)]
    assert (got[0].token_ids, got[0].finish_reason) == ([10, 11, 12, EOS], "stop")
    assert (got[1].token_ids, got[1].finish_reason) == ([10, 11, 12], "length")
    assert (got[2].token_ids, got[2].finish_reason) == ([10, 11, 12, EOS], "stop")  # at max_tokens, but by itself
    assert (got[3].token_ids, got[3].finish_reason) == ([10, 11], "stop")
    assert len(got[4].token_ids) >= 6 and EOS not in got[4].token_ids[:5]


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer(make):
    class Tokenizer:
        eos_token_id = 12
        chat_template = None

    engine = make(ending_model(last=13), Tokenizer())
    assert set(engine.eos_token_ids) == {EOS, 12}
    (rollout,) = engine.generate([[5, 9]], SamplingParams(20, temperature=0))
    assert rollout.completions[0].token_ids == [10, 11, 12]


def test_prompts_that_cannot_be_completed_are_named(engine):
    good = prompts([3])[0]
    with pytest.raises(RolloutError, match="prompt 1 .*empty"):
        engine.generate([good, []], GREEDY)
    with pytest.raises(RolloutError, match=r"prompt 1 .*251 tokens.*max_tokens=6.*max_model_len=256"):
        engine.generate([good, prompts([251])[0]], GREEDY)
    with pytest.raises(RolloutError, match=f"prompt 2 .*token id {VOCAB}"):
        engine.generate([good, good, [3, VOCAB]], GREEDY)
    with pytest.raises(RolloutError, match="prompt 0 .*token id -1"):
        engine.generate([[-1]], GREEDY)
    with pytest.raises(RolloutError, match="1 sampling parameters for 2 prompts"):
        engine.generate([good, good], [GREEDY])
    assert engine.generate([], GREEDY) == []


def test_a_sequence_may_fill_the_engine_to_the_last_token(engine, model):
    (prompt,) = prompts([250])
    (rollout,) = engine.generate([prompt], GREEDY)
    assert is_greedy(model, prompt, rollout.completions[0].token_ids)
    assert len(rollout.completions[0].token_ids) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": 0.001},
        {"temperature": 2.5},
        {"temperature": 0.0, "n": 2},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"min_tokens": 5},
    ],
)
def test_wrong_sampling_parameters_are_refused(wrong):
    with pytest.raises(ConfigError):
        SamplingParams(**{"max_tokens": 4, **wrong})
