"""The order of sleep, push and generation. vLLM on CPUs has no sleep mode: its calls are recorded, and what level 2
would lose is overwritten. `tests/device` and benchmarks/gpu run the real one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.errors import RolloutError
from align.rollout import SamplingParams, make_engine
from tests.rollout.rollout_models import llama, never_ending
from tests.trainers.tiny_runs import needs_vllm

pytestmark = needs_vllm
PROMPTS, PARAMS = [[5, 6, 7], [8, 9]], SamplingParams(4, seed=1)


class Nap:
    """In place of vLLM's `sleep` and `wake_up`: what was called, and on level 2 the weights are gone."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []
        engine._sleeps = True
        engine._llm.sleep, engine._llm.wake_up = self.sleep, self.wake_up

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        if level == 2:
            self.engine._llm.apply_model(lose)

    def wake_up(self, tags):
        self.calls.extend(tags)


def lose(model) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))


def completions(engine) -> list:
    return [rollout.completions[0].token_ids for rollout in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture
def made():
    engines = []

    def make(model):
        engines.append(make_engine(model, backend="vllm", max_model_len=64))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_weights_come_back_by_a_push_before_keys_and_values(made):
    model = never_ending(llama())
    engine = made(model)
    before, nap = completions(engine), Nap(engine)
    assert engine.sleep() and engine.sleep()  # the second finds it asleep
    for use in (lambda: completions(engine), lambda: engine.verify(model), lambda: engine.probe(model)):
        with pytest.raises(RolloutError, match="sleeps and holds no weights: push"):
            use()
    assert nap.calls == ["sleep 2"]
    engine.push(model, 3)
    assert nap.calls == ["sleep 2", "weights", "kv_cache"]
    assert completions(engine) == before
    assert nap.calls == ["sleep 2", "weights", "kv_cache"]


def test_a_push_that_broke_off_can_be_repeated(made):
    model = never_ending(llama())
    engine = made(model)
    before, nap = completions(engine), Nap(engine)
    engine.sleep()
    broken = engine._load_weights

    def stop(weights):
        next(iter(weights))
        raise KeyboardInterrupt

    engine._load_weights = stop
    with pytest.raises(KeyboardInterrupt):
        engine.push(model, 1)
    with pytest.raises(RolloutError, match="holds no weights"):
        completions(engine)
    engine._load_weights = broken
    engine.push(model, 1)
    assert nap.calls == ["sleep 2", "weights", "kv_cache"] and completions(engine) == before


def test_under_an_adapter_the_base_weights_are_kept(made):
    model = get_peft_model(never_ending(llama()), LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    engine = made(model)
    before, nap = completions(engine), Nap(engine)
    assert not engine.sleep()
    assert completions(engine) == before  # awake by itself
    assert nap.calls[0] == "sleep 1" and sorted(nap.calls[1:]) == ["kv_cache", "weights"]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
    engine.sleep()
    engine.push(model, 1)
    assert len(nap.calls) == 6 and nap.calls[3:] == ["sleep 1", "weights", "kv_cache"]


def test_the_trainer_lets_it_sleep_after_rollouts_and_evaluations(tmp_path):
    """Level 2: each of them is preceded by a push."""
    from align import ReMaxTrainer
    from align.data import toy
    from tests.trainers.tiny_runs import prompts, remax_config, tiny_model, wanted_words

    tokenizer, options = toy.tokenizer(), {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    config = remax_config(tmp_path, rollout={"backend": "vllm"}, **options)
    trainer = ReMaxTrainer(
        tiny_model(tokenizer), wanted_words, config, prompts(8), eval_dataset=prompts(4), processing_class=tokenizer
    )
    trainer.sync_engine()
    nap = Nap(trainer.engine.current)
    trainer.train()
    trainer.close()
    assert nap.calls.count("sleep 2") >= 4 and nap.calls[:3] == ["sleep 2", "weights", "kv_cache"]
    assert [call for call in nap.calls if call != "sleep 2"] == ["weights", "kv_cache"] * (len(nap.calls) // 3)


def test_an_engine_that_sleeps_wakes_to_be_freed(made):
    """vLLM on GPUs frees memory that sleep has unmapped with an error that stays."""
    engine = made(never_ending(llama()))
    nap = Nap(engine)
    engine.sleep()
    engine.close()
    assert nap.calls == ["sleep 2", "weights", "kv_cache"]
