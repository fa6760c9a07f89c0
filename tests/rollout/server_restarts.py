"""Servers that are not what they were at the last push: collected by `test_server`, whose servers these tests share."""

import threading
import time

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model

from align.errors import RolloutError
from align.rollout import SamplingParams
from align.rollout.server.client import Server, ServerLost
from align.rollout.weights import weights_of
from tests.rollout.rollout_models import llama, never_ending, prompts
from tests.rollout.served import KEY, connected
from tests.rollout.server_transfers import assert_drawn_from

SAMPLED = SamplingParams(12, n=3, temperature=0.7)


def drawn(engine, ids):
    return [[(c.token_ids, c.logprobs) for c in r.completions] for r in engine.generate(ids, SAMPLED)]


def as_started_anew(served, number: int) -> None:
    """With weights that are not the run's, no label, and in no group of its."""
    with connected(served, llama(2), urls=[served.urls[number]], transfer="gloo", timeout=30):
        pass  # pushes them
    own, body = {"Authorization": f"Bearer {KEY}"}, {"method": "align_label", "args": [""]}
    url = f"{served.urls[number]}/collective_rpc"
    requests.post(url, json=body, headers=own, timeout=30).raise_for_status()


def test_a_server_that_comes_back_gets_the_weights_again(served):
    """It is frozen for longer than the deadline, and then has other weights and the label of a fresh server."""
    model, ids = never_ending(llama(1)), prompts([4, 30, 100, 7])
    with connected(served, llama(0), on_engine_failure="wait", timeout=4) as engine:
        engine.push(model, 5)
        state = engine.state_dict()
        expected = drawn(engine, ids)
        as_started_anew(served, 1)
        members = served.members(1)
        for member in members:
            member.suspend()
        back = threading.Timer(6, lambda: [member.resume() for member in members])
        back.start()
        engine.load_state_dict(state)
        again = engine.generate(ids, SAMPLED)
        back.join()
    assert [[(c.token_ids, c.logprobs) for c in r.completions] for r in again] == expected
    assert {rollout.weight_version for rollout in again} == {5}


def test_completions_that_a_server_breaks_off_are_of_a_lost_server(served, monkeypatch, caplog):
    """So it answers what is open when it is told to end, and when it is paused, as here."""
    model, ids, call = never_ending(llama(1)), prompts([4, 30, 100, 7]), Server.call
    long, own, paused = SamplingParams(150, n=8), {"Authorization": f"Bearer {KEY}"}, []

    def pause():
        time.sleep(0.2)
        for route in ("pause?mode=abort", "resume"):
            requests.post(f"{served.urls[1]}/{route}", headers=own, timeout=30).raise_for_status()

    async def noticed(self, http, method, path, *rest, **named):
        if path == "/inference/v1/generate" and self.url == served.urls[1] and not paused:
            paused.append(threading.Thread(target=pause))
            paused[0].start()
        return await call(self, http, method, path, *rest, **named)

    with connected(served, model, timeout=30) as engine:
        state = engine.state_dict()
        expected = [[c.token_ids for c in r.completions] for r in engine.generate(ids, long)]
        monkeypatch.setattr(Server, "call", noticed)
        for waits in (True, False):
            engine.load_state_dict(state)
            engine.waits = waits
            if waits:
                again = [[c.token_ids for c in r.completions] for r in engine.generate(ids, long)]
                assert again == expected and f"{served.urls[1]} broke completions off: it is being ended" in caplog.text
            else:
                with pytest.raises(ServerLost, match=f"{served.urls[1]} broke completions off: it is being ended; wi"):
                    engine.generate(ids, long)
            paused.pop().join()


def test_an_adapter_goes_to_no_server_without_what_it_lies_on(served):
    """The one frozen tensor that is compared at a push may be the same in both, as norms are here."""
    torch.manual_seed(0)
    model = get_peft_model(never_ending(llama(1)), LoraConfig(r=8, target_modules="all-linear"))
    for mode in ("wait", "stop"):
        with connected(served, model, on_engine_failure=mode, timeout=30) as engine:
            frozen = [weight.name for weight in weights_of(model, merged=False, text=True)]
            engine._pushes = 2 * len(frozen) + next(i for i, name in enumerate(frozen) if "norm" in name)
            for server in engine.servers:
                engine._background.run(engine._with_session(lambda http, s=server: s.name_weights(http, engine._label)))
            as_started_anew(served, 1)
            if mode == "stop":
                with pytest.raises(ServerLost, match=f"{served.urls[1]} has not got the weights.*was started anew"):
                    engine.push(model, 1)
                with connected(served, llama(3), urls=[served.urls[1]]):
                    with pytest.raises(RolloutError, match=f"{served.urls[1]} has the weights of another run"):
                        engine.push(model, 1)
            else:
                engine.push(model, 1)
                assert_drawn_from(engine, model)


@pytest.mark.parametrize("transfer", ["files", "gloo"])
def test_a_server_that_was_started_anew_before_a_push_is_learned_anew(served, monkeypatch, transfer):
    """What it keeps, and how it draws; and it computes what the run does."""
    model, learned, probed = never_ending(llama(1)), [], []
    with connected(served, model, transfer=transfer, timeout=30) as engine:
        as_started_anew(served, 1)
        describe, probe = Server.describe, engine.probe
        monkeypatch.setattr(Server, "describe", lambda self, http: learned.append(self.url) or describe(self, http))
        monkeypatch.setattr(engine, "probe", lambda model: probed.append(1) or probe(model))
        for version in (1, 2):
            engine.push(model, version)
            assert_drawn_from(engine, model)
    assert learned == served.urls[1:] and probed == [1]
