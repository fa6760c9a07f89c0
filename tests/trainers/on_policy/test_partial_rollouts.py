"""partial_rollouts: completions that are drawn in parts, what each part is of, and what a checkpoint keeps of them."""

import pytest
import torch

from align.errors import ConfigError
from align.rollout.types import Completion, Rollout, SamplingParams
from align.trainers.core.checkpoints import read_checkpoint
from align.trainers.on_policy.parts import Drawn, Part, draw_parts
from tests.rollout.rollout_models import own_logps
from tests.trainers.on_policy.elsewhere import PLACE
from tests.trainers.on_policy.test_rollouts_ahead import kept
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, wanted_words

PARTS = {"partial_rollouts": 3, "rollout_correction": "token_truncate", "learning_rate": 1e-2}
AHEAD = {"rollouts_ahead": 1, "rollout": PLACE}


def make(policy, folder, method="rloo", rows=64, **options):
    trainer_class, args = on_policy(method, folder, **{**PARTS, **options})
    return trainer_class(policy, wanted_words, args, prompts(rows))


@pytest.mark.parametrize(
    ("ahead", "parts"),
    [
        ({}, [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]),
        (AHEAD, [[0], [0], [0, 1], [0, 1, 2], [1, 2, 3]]),
    ],
)
def test_every_part_is_of_the_weights_of_its_time(ahead, parts, policy, tmp_path):
    """The log-prob of every token is that of the policy as it was when the token was drawn, and no step waits for more
    than a third of the longest completion once the first ones are through."""
    trainer, rollouts = make(policy, tmp_path, max_steps=5, **ahead), []
    kept(trainer, rollouts)
    asked, generate = [], trainer.engine.generate
    trainer.engine.generate = lambda ids, params: asked.append(params) or generate(ids, params)
    trainer.train()
    versions = [[s.versions for s in buffer.samples] for buffer, _ in rollouts]
    assert [sorted(set(sum(of, []))) for of in versions] == parts
    assert all(v == sorted(v) for of in versions for v in of)
    assert max(p.max_tokens for p in asked[-1]) == 2 == len(parts[-1]) - 1
    for buffer, _ in rollouts[2:4]:
        for sample in buffer.samples[::5]:
            for version in set(sample.versions):
                logps = own_logps(rollouts[version][1], sample.prompt["prompt_ids"], sample.completion_ids, 1.0)
                own = [v == version for v in sample.versions]
                torch.testing.assert_close(logps[own], torch.tensor(sample.engine_logps)[own], rtol=0, atol=1e-5)
    first = len(ahead) // 2  # the age of the newest part
    shares = [logged(trainer, f"rollout/share_{age}_rollouts_old")[-1] for age in range(first, first + 3)]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.2
    assert logged(trainer, "rollout/unfinished_ratio")[0] == 0 and logged(trainer, "rollout/unfinished_ratio")[-1] > 0.8
    assert logged(trainer, "rollout/staleness")[-1] == pytest.approx(first + shares[1] + 2 * shares[2])
    assert max(logged(trainer, "rollout/effective_sample_size")[2:]) < 1 - 1e-6


@pytest.mark.parametrize(("method", "steps", "ahead"), [("remax", 1, {}), ("rloo", 2, AHEAD)])
def test_a_run_goes_on_exactly_with_what_is_unfinished(ahead, method, steps, policy, tmp_path):
    split = {} if steps == 1 else {"num_mini_batches": 2, "per_device_train_batch_size": 4}
    options = {"method": method, "max_steps": 5 * steps, "save_strategy": "steps", "save_steps": 2 * steps + 1, **split}
    straight = make(policy, tmp_path, **ahead, **options)
    straight.train()
    state = read_checkpoint(tmp_path / f"checkpoint-{2 * steps + 1}", rank=0, processes=1).state["ahead"]
    made = [c for drawn in state["drawn"] for rollout in drawn["rollouts"] for c in rollout["completions"]]
    assert any(c["finish_reason"] == "length" and len(c["token_ids"]) < 6 for c in made)
    resumed = make(policy, tmp_path, **ahead, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 * steps + 1}"))
    assert_same(parameters(resumed.model), parameters(straight.model))
    for key in ("reward", "rollout/staleness", "rollout/unfinished_ratio"):
        assert logged(resumed, key) == logged(straight, key)


def test_where_nothing_is_learned_greedy_completions_are_those_of_one_part(policy, tmp_path):
    """Over the end of an epoch, whose prompts are drawn whole where nothing was drawn of them before."""
    found = []
    for parts in (1, 3):
        options = {"learning_rate": 0.0, "rows": 24, "max_steps": 5, "partial_rollouts": parts}
        trainer = make(policy, tmp_path / str(parts), "remax", **options)
        trainer.train()
        found.append(logged(trainer, "remax/greedy_reward"))
    assert found[0] == found[1] and len(set(found[0])) > 2
    assert logged(trainer, "rollout/unfinished_ratio")[3] == 0 < logged(trainer, "rollout/unfinished_ratio")[4]


class Counting:
    """Writes 5, 6, 7 ... and ends with 1 after seven tokens of a completion that may end then."""

    version = 0

    def generate(self, prompts, params):
        self.asked = list(zip(prompts, params, strict=True))
        self.version += 1
        return [Rollout(ids, [self.one(ids, p) for _ in range(p.n)], self.version) for ids, p in self.asked]

    def one(self, ids, params):
        new = []
        while len(new) < params.max_tokens:
            ends = len(ids) + len(new) >= 3 + 7 and len(new) >= params.min_tokens
            new.append(1 if ends else 5 + len(ids) + len(new))
            if ends:
                return Completion(new, [-0.5] * len(new), "stop")
        return Completion(new, [-0.5] * len(new), "length")


def test_a_part_asks_for_what_is_left():
    """The least and the largest number of tokens are of the whole completion; what has ended is not asked again."""
    engine, params = Counting(), SamplingParams(12, n=2, min_tokens=9, seed=3)
    requests = [([5, 6, 7], params), ([5, 6, 7], SamplingParams(12, temperature=0))]
    drawn = Drawn(4, 1)
    for version, expected in enumerate([[(2, 4, 4), (1, 4, 0)], [(1, 4, 4)] * 2 + [(1, 4, 0)], [(1, 4, 1)] * 2], 1):
        draw_parts(engine, [Part(drawn, requests, 4)], version)
        assert [(p.n, p.max_tokens, p.min_tokens) for _, p in engine.asked] == expected
    seeds = [p.seed for _, p in engine.asked]
    assert len({3, *seeds}) == 3
    ended, greedy = drawn.rollouts[0].completions, drawn.rollouts[1].completions[0]
    assert greedy.token_ids == [8, 9, 10, 11, 12, 13, 14, 1] and greedy.drawn_by == [(1, 4), (2, 4)]
    assert all(c.finish_reason == "stop" and c.drawn_by == [(1, 4), (2, 4), (3, 2)] for c in ended)
    assert all(len(c.logprobs) == len(c.token_ids) == 10 for c in ended)
    draw_parts(engine, [Part(drawn, requests, None)], 4)
    assert not engine.asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_correction": "none"}, "with partial_rollouts the samples are of older weights.*set rollout_corr"),
        ({"dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds draws again.*set partial_rollouts: 1"),
        ({"partial_rollouts": 7}, "cuts the 6 tokens of max_completion_length into 7 parts"),
        ({"partial_rollouts": 0}, "partial_rollouts"),
    ],
)
def test_what_cannot_be_drawn_in_parts_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        on_policy("rloo", tmp_path, **{**PARTS, **options})


def test_environments_are_refused(policy, tmp_path):
    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: one.
            b: another.
        """
        return a + b

    trainer_class, args = on_policy("rloo", tmp_path, **PARTS)
    with pytest.raises(ConfigError, match="answer whole completions.* and partial_rollouts draws them in parts"):
        trainer_class(policy, wanted_words, args, prompts(8), tools=[add])
