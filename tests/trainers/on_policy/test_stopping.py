"""`stop_at`: the run ends after its gold score's peak, or where an ensemble's members disagree, and not by chance."""

import json

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState

from align.data import toy
from align.errors import ConfigError
from align.reward_models.composite import CompositeReward
from align.reward_models.ensemble import RewardEnsemble
from align.reward_models.rules import RuleReward
from align.trainers.on_policy.stopping import StopRule, disagreement_columns
from align.trainers.weighting.sections import parse_stop
from tests.trainers.tiny_runs import logged, on_policy, prompts


def count(text: str) -> int:
    return sum(word in toy.POLITE for word in text.split())


def polite(completions, **columns) -> list[float]:
    return [float(count(text)) for text in completions]


def moderate(completions, **columns) -> list[float]:
    """Gold: best for one courtesy, worse for none and for more."""
    return [1.0 - abs(count(text) - 1) for text in completions]


def chance(completions, **columns) -> list[float]:
    """Gold that has nothing to do with what is trained."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def make(policy, folder, reward=polite, gold=moderate, evaluated=None, **options):
    settings = {
        "beta": 0.0, "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 5,
        "learning_rate": 4e-3, "max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "num_eval_prompts": None,
        "per_device_eval_batch_size": 64, "eval_num_generations": 4, "stop_at": {"gold_peak": {"patience": 2}},
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **options,
    }  # fmt: skip
    kind, args = on_policy("rloo", folder, **settings)
    return kind(policy, reward, args, prompts(64), evaluated or prompts(48, seed=1), gold_reward=gold)


def folders(path):
    return sorted(found.name for found in path.glob("checkpoint-*"))


def test_the_run_ends_after_the_peak_and_its_checkpoint_stays(policy, tmp_path):
    trainer = make(policy, tmp_path / "a")
    trainer.train()
    golds, steps = logged(trainer, "eval_gold"), trainer.state.global_step
    peak = 2 * int(np.argmax(golds))
    assert 0 < peak < steps < 40 and golds[peak // 2] > golds[0] + 0.1 and golds[-1] < golds[peak // 2] - 0.1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{peak}")
    assert folders(tmp_path / "a") == [f"checkpoint-{peak}"]  # save_total_limit is 1
    curve = [json.loads(line) for line in (tmp_path / "a" / "overoptimization.jsonl").read_text().splitlines()[1:]]
    assert [record["step"] for record in curve] == list(range(0, steps + 1, 2))
    # it goes on from the peak to the same end, and ends with the weights of the peak if it is told to
    again = make(policy, tmp_path / "a", load_best_model_at_end=True, save_total_limit=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps and logged(again, "eval_gold")[-1] == golds[-1]
    assert again.evaluate()["eval_gold"] == golds[peak // 2]
    # a run that has ended there has no step left
    last = make(policy, tmp_path / "a")
    last.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{steps}"))
    assert last.state.global_step == steps


def test_noise_does_not_end_it(policy, tmp_path):
    often = {"max_steps": 12, "eval_steps": 1, "save_steps": 100, "eval_num_generations": 1, "learning_rate": 1e-3}
    trainer = make(policy, tmp_path, gold=chance, stop_at={"gold_peak": {"patience": 1}}, **often)
    trainer.train()
    golds = logged(trainer, "eval_gold")
    assert trainer.state.global_step == 12 and len(set(golds)) > 8 and golds[-1] < max(golds)
    best = int(np.argmax(golds[1:])) + 1  # of those after a step, as transformers has it; no save was due there
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


# ---- the rule by itself ----------------------------------------------------------------------------------------------


def rule(ensemble=None, **section):
    options = parse_stop(section, "stop_at")
    return StopRule(options, ensemble, metric=None if options.gold_peak is None else "eval_gold", loads=False)


def ends_at(stop, evaluations) -> int | None:
    """Step at which the rule ends a run of these evaluations [K] of columns [P]; one step each."""
    stop.clear()
    for step, columns in enumerate(evaluations):
        control = TrainerControl()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        stop.observe(rows, TrainerState(global_step=step), control)
        if control.should_training_stop:
            return step
    return None


def golds(curve, seed, noise=1.0, prompts=64):
    """Evaluations with these mean gold scores: a fixed effect of each prompt, and noise."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=prompts)
    return [{"proxy": base + k, "gold": base + mean + noise * rng.normal(size=prompts)} for k, mean in enumerate(curve)]


def test_flat_and_noisy_curves_go_on():
    """Scores without any trend, 15 evaluations of them: the highest is luck. By the plain rule (patience 3 below the
    highest mean) most would end."""
    stop = rule(gold_peak={"patience": 3})
    assert sum(ends_at(stop, golds([0.0] * 15, seed)) is not None for seed in range(10)) == 0
    plain = [max(k - int(np.argmax([e["gold"].mean() for e in golds([0.0] * 15, s)][: k + 1])) for k in range(15))
             for s in range(10)]  # fmt: skip
    assert sum(longest >= 3 for longest in plain) >= 8


def test_a_fall_ends_it_after_the_patience():
    curve = [0.0, 1.0, 2.0, 3.0, 1.5, 1.4, 1.3, 1.2, 1.1]
    assert ends_at(rule(gold_peak={"patience": 1}), golds(curve, 0)) == 4
    assert ends_at(rule(gold_peak={"patience": 3}), golds(curve, 0)) == 6
    recovers = [0.0, 1.0, 2.0, 3.0, 1.5, 1.4, 3.0, 3.5, 3.5]
    assert ends_at(rule(gold_peak={"patience": 3}), golds(recovers, 0)) is None
    # a gold score that only falls: there is nothing to wait for either
    stop = rule(gold_peak={"patience": 2})
    assert ends_at(stop, golds([0.0, -1.0, -2.0, -3.0], 0)) == 2 and "had not risen" in stop.reason


def test_resumed_it_decides_the_same():
    evaluations, stop = golds([0.0, 2.0, 0.5, 0.4, 0.3], 1), rule(gold_peak={"patience": 3})
    assert ends_at(stop, evaluations[:4]) is None
    other = rule(gold_peak={"patience": 3})
    other.load_state_dict(stop.state_dict())
    control = TrainerControl()
    other.observe([{"proxy": p, "gold": g} for p, g in zip(*evaluations[4].values(), strict=True)],
                  TrainerState(global_step=4), control)  # fmt: skip
    assert control.should_training_stop and other.reason and ends_at(stop, evaluations) == 4
    patient = rule(gold_peak={"patience": 4})  # a longer patience goes on from there
    patient.load_state_dict(other.state_dict())
    assert patient.reason is None and len(patient.steps) == 5


def spread(means, seed=0):
    rng = np.random.default_rng(seed)
    return [{"disagreement/rm": mean + 0.3 * rng.normal(size=40)} for mean in means]


def test_disagreement_beyond_the_limit():
    stop = rule("rm", disagreement={"limit": 1.0})
    assert ends_at(stop, spread([0.5, 0.7, 0.99, 1.02, 1.5, 2.0])) == 4  # 1.02 is within chance of the limit
    assert ends_at(rule("rm", disagreement={"limit": 1.0, "patience": 2}), spread([0.5, 1.5, 0.5, 1.5, 1.5])) == 4
    with pytest.raises(ConfigError, match="before its first step: the members of rm disagree by 1.98"):
        ends_at(stop, spread([2.0]))


def test_disagreement_ends_a_run_at_the_last_checkpoint_within_the_limit(policy, tmp_path):
    """Two members that agree about one courtesy and differ about more."""
    members = [RuleReward(polite, name="a"), RuleReward(lambda completions: [min(count(t), 1) for t in completions],
               name="b")]  # fmt: skip
    ensemble = RewardEnsemble(members, "mean", name="rm")
    options = {"stop_at": {"disagreement": {"limit": 0.4}}, "save_steps": 2, "gold": None}
    trainer = make(policy, tmp_path, reward=ensemble, load_best_model_at_end=True, **options)
    assert trainer.args.metric_for_best_model == "loss"  # transformers' default, whose best is the highest proxy
    trainer.train()
    measured, steps = logged(trainer, "eval_disagreement/rm"), trainer.state.global_step
    assert steps < 40 and measured[-1] > 0.4 and measured[-1] == max(measured)
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert measured[best // 2] < 0.45 and best in (steps - 2, steps - 4)
    assert f"checkpoint-{best}" in folders(tmp_path)
    assert trainer.evaluate()["eval_disagreement/rm"] == measured[best // 2]


def test_the_best_after_the_start_is_written_where_the_start_was_better(policy, tmp_path):
    """The start has no checkpoint, and the next one that was due would have been worse."""
    options = {"save_steps": 4, "load_best_model_at_end": True, "max_steps": 4, "stop_at": {"gold_peak": {}}}
    trainer = make(policy, tmp_path, gold=lambda completions: [-float(count(t)) for t in completions], **options)
    trainer.train()
    golds = logged(trainer, "eval_gold")
    assert golds[0] > golds[1] > golds[2]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and trainer.evaluate()["eval_gold"] == golds[1]


def test_the_log_names_the_checkpoint_that_is_kept(policy, tmp_path, caplog):
    """The peak may be the evaluation that ends the run; with a metric of the user's it is not known yet."""
    members = [RuleReward(polite, name="a"), RuleReward(lambda completions: [0.0] * len(completions), name="b")]
    ensemble = RewardEnsemble(members, "mean", name="rm")
    disagreement = {"limit": 0.4}
    stop = {"gold_peak": {}, "disagreement": disagreement}
    trainer = make(policy, tmp_path / "a", reward=ensemble, gold=polite, stop_at=stop)
    trainer.train()
    best = trainer.state.best_model_checkpoint.rpartition("/")[2]
    assert best == f"checkpoint-{trainer.state.global_step}" and f"Kept is {best};" in caplog.text
    named = {"stop_at": {"disagreement": disagreement}, "metric_for_best_model": "gold"}
    make(policy, tmp_path / "b", reward=ensemble, gold=polite, **named).train()
    assert "Kept is the checkpoint of the best gold;" in caplog.text


def test_of_several_sets_the_first_has_the_peak_and_its_checkpoint(policy, tmp_path):
    """The checkpoint that was kept was the best of another set, and the run ended by the first."""
    sets = {"near": prompts(48, seed=1), "far": prompts(48, seed=2)}
    for metric in ("far_gold", "eval_far_gold"):
        with pytest.raises(
            ConfigError, match=f"the first evaluation set, near, and metric_for_best_model is {metric}:"
        ):
            make(policy, tmp_path, evaluated=sets, metric_for_best_model=metric)
    for metric in (None, "gold", "eval_near_gold"):
        trainer = make(policy, tmp_path, evaluated=sets, metric_for_best_model=metric)
        assert trainer.args.metric_for_best_model == "eval_near_gold"


def test_whose_disagreement_there_is():
    pair = [RuleReward(polite, name="a"), RuleReward(moderate, name="b")]
    ensemble = RewardEnsemble(pair, "mean", name="rm")
    inner = CompositeReward([ensemble, RuleReward(polite, name="c")], name="both")
    single = RewardEnsemble(pair[:1], "mean", name="one")
    assert disagreement_columns([inner, single, pair[0]]) == {"both/rm": "both/rm/variance"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gold": None}, "stop_at.gold_peak needs a gold_reward"),
        ({"num_eval_prompts": 12}, "at least 20 prompts, not 12"),
        ({"eval_strategy": "no"}, "stop_at looks at evaluations: set eval_strategy"),
        ({"save_strategy": "no"}, "keeps the checkpoint of the peak: set save_strategy"),
        ({"metric_for_best_model": "proxy"}, "and metric_for_best_model is proxy: leave that"),
        ({"stop_at": {"disagreement": {"limit": 1.0}}}, "needs a reward that is an ensemble of two"),
        ({"stop_at": {"disagreement": {"limit": 0.0}}}, "stop_at.disagreement.limit: input should be greater than 0"),
        ({"stop_at": {"gold_peak": {"patience": 0}}}, "stop_at.gold_peak.patience: input should be greater"),
        ({"stop_at": {"gold_peek": {}}}, "unknown key stop_at.gold_peek; nearest valid: gold_peak"),
        ({"stop_at": {}}, "name what to stop at: gold_peak or disagreement"),
    ],
)
def test_what_cannot_be_decided_is_refused(options, message, policy, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(policy, tmp_path, **options)
