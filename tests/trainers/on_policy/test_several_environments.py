"""The row of an environment: several environments by name, prompts of their own, and what they may change in it."""

from contextlib import nullcontext
from functools import partial
from typing import ClassVar

import pytest
from datasets import Dataset

from align.errors import ConfigError, RolloutError
from align.reward_models.base import RewardBatch
from align.rollout.types import SamplingParams
from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.episodes import Episodes, make_episodes
from tests.trainers.on_policy.talks import CALLS, GuessingGame, Scripted, Sums, questions, rows, talking_tokenizer
from tests.trainers.tiny_runs import logged, on_policy, tiny_model


class Plain:
    """Another of TRL's kind, without a reward."""

    def reset(self, **row):
        assert "environment" not in row
        return " higher"

    def guess(self, number: str) -> str:
        """A guess.

        Args:
            number: its name.
        """
        return "lower"


SEVERAL = {"sums": Sums, "more sums": Sums, "plain": Plain}


def test_a_row_picks_its_environment_and_is_shown_its_tools_alone():
    tokenizer = talking_tokenizer()
    call = f"<tool_call> {CALLS[0]} </tool_call>"
    engine = Scripted(tokenizer, call, "two")
    episodes = Episodes(Environments(SEVERAL, [], 5), tokenizer)
    asked = [{**row, "environment": name} for row, name in zip(rows(tokenizer, 3), SEVERAL, strict=True)]
    params = [SamplingParams(max_tokens=60, seed=1)] * 3
    made = [rollout.completions[0].episode for rollout in episodes.complete(engine, asked, params, [0] * 3)]
    prompts = [prompt for prompt, _ in engine.asked[0]]
    assert ["system double" in prompt for prompt in prompts] == [True, True, False]
    assert [prompt.count("guess") for prompt in prompts] == [1, 1, 2]  # the question, and the name of the tool
    assert [prompt.endswith("higher <|im_end|> <|im_start|> assistant") for prompt in prompts] == [False, False, True]
    assert [(e.environment, e.reward, e.failed_calls) for e in made] == [
        ("Sums", 1.0, 0), ("Sums", 1.0, 0), ("Plain", None, 1)]  # fmt: skip
    assert "Tool double not found" in made[2].messages[1]["content"]
    # one reward for each class that has one; it does not apply to the others'
    (own,) = episodes.rewards
    columns = {"environment_class": [e.environment for e in made], "environment_reward": [e.reward for e in made]}
    batch = RewardBatch(["guess"] * 3, ["two"] * 3, columns={**columns, "environment_failure": [None] * 3})
    output = own.score(batch, partial=True)
    assert own.name == "Sums" and output.missing.tolist() == [False, False, True]
    with pytest.raises(ConfigError, match="row 0 has environment='other', which is not among the environments"):
        episodes.complete(engine, [{**asked[0], "environment": "other"}], params[:1], [0])


class Asking(GuessingGame):
    def reset(self, row):
        super().reset(row)
        return "guess"


class Steps:
    """Takes from its row what is left to do."""

    def reset(self, row):
        self.left = row["left"]
        row["prompt"][-1]["content"] += " higher"

    def step(self, answer):
        self.left.remove(answer)
        return "guess", 1.0, not self.left


def test_an_environment_may_change_its_row():
    """Those of the other samples, and the rewards, get what the data hold."""
    tokenizer = talking_tokenizer()
    prompts = rows(tokenizer, left=["one", "two"])
    params = SamplingParams(max_tokens=30, n=2, seed=3)
    episodes = Episodes(Environments(Steps, [], 5), tokenizer)
    (found,) = episodes.complete(Scripted(tokenizer, "one", "two"), prompts, [params], [0])
    assert [one.episode.reward for one in found.completions] == [2.0, 2.0]
    assert prompts == rows(tokenizer, left=["one", "two"]) and found.completions[0].episode.prompt == prompts[0]


def test_an_environment_that_brings_prompts_and_rewards(tmp_path):
    """No data and no reward but its own: as many empty prompts as a rollout takes, for as long as max_steps says."""
    tokenizer = talking_tokenizer()
    options = {"max_prompt_length": 12, "max_completion_length": 16, "num_generations": 2, "logging_steps": 1}
    trainer_class, args = on_policy("rloo", tmp_path, max_steps=3, per_device_train_batch_size=4, beta=0.0, **options)
    model = tiny_model(tokenizer, num_hidden_layers=1)
    build = partial(trainer_class, model, None, args, processing_class=tokenizer)
    trainer = build(environment_factory=Asking)
    assert len(trainer.train_dataset) == 4 and trainer.reward_func_names == ["Asking"]
    trainer.train()
    assert len(logged(trainer, "rewards/Asking")) == 3
    with pytest.raises(RolloutError, match=r"row \d ends in an empty message, and reset of GuessingGame adds nothing"):
        build(environment_factory=GuessingGame).train()
    # with other rewards TRL's weights are theirs alone; the names are TRL's
    _, weighted = on_policy("rloo", tmp_path, max_steps=3, reward_weights=[0.5], **options)
    both = trainer_class(model, wordy, weighted, None, processing_class=tokenizer, environment_factory=Sums)
    assert both.reward_func_names == ["wordy", "Sums"] and both.reward_weights.tolist() == [0.5, 1.0]
    assert len(both.reward_funcs) == 2 and [tool.__name__ for tool in both.tools] == ["double"]


def wordy(completions, **columns):
    return [float(len(messages)) for messages in completions]


def test_rows_that_name_only_their_environment(tmp_path):
    tokenizer = talking_tokenizer()
    trainer_class, args = on_policy("rloo", tmp_path, max_prompt_length=40, num_generations=2)
    build = partial(trainer_class, tiny_model(tokenizer, num_hidden_layers=1), wordy, args)
    data = Dataset.from_dict({"environment": list(SEVERAL) * 8})
    trainer = build(data, processing_class=tokenizer, environment_factory=SEVERAL)
    assert trainer.reward_func_names == ["wordy", "Sums"] and len(trainer.tools) == len(SEVERAL)
    assert trainer.train_dataset["prompt"][0] == [{"role": "user", "content": ""}]
    for dataset, factory, message in (
        (questions(4), SEVERAL, "column 'environment'"),
        (Dataset.from_dict({"environment": ["plain", "play"]}), SEVERAL, "row 1 has environment='play'"),
        (None, SEVERAL, "requires a `train_dataset`"),
        (None, GuessingGame, "max_steps"),
        (None, None, "`train_dataset` is required"),
    ):
        args.max_steps = -1
        with pytest.raises(ConfigError, match=message):
            build(dataset, processing_class=tokenizer, environment_factory=factory)
    with pytest.raises(ConfigError, match="No reward source provided"):
        trainer_class(build.args[0], None, args, data, processing_class=tokenizer, environment_factory={"plain": Plain})


def test_several_environments_in_a_configuration(tmp_path):
    places = {"sums": f"{__file__}:Sums", "plain": f"{__file__}:Plain"}
    episodes = make_episodes(on_policy("rloo", tmp_path, environment=places)[1], None, None, talking_tokenizer())
    assert [kind.name for kind in episodes.environments.kinds.values()] == ["Sums", "Plain"]


class Holds:
    ended: ClassVar[list["Holds"]] = []

    def reset(self, row):
        pass

    def step(self, answer):
        return 1 / 0

    def close(self):
        self.ended.append(self)


@pytest.mark.parametrize("stops", [True, False])
def test_every_environment_is_closed_also_where_one_ends_the_run(stops):
    tokenizer, Holds.ended = talking_tokenizer(), []
    params = SamplingParams(max_tokens=20, n=3, seed=3)
    episodes = Episodes(Environments(Holds, [], 5), tokenizer, stops=stops)
    with pytest.raises(RolloutError, match="ZeroDivisionError") if stops else nullcontext():
        episodes.complete(Scripted(tokenizer, "two"), rows(tokenizer, 1), [params], [1])
    assert len(set(Holds.ended)) == len(Holds.ended) == 3 and not episodes.open
