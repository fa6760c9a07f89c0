"""`align serve --reward` and the reward that asks it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import requests
import torch

from align.cli.main import main
from align.errors import RewardError
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.server import RewardServer
from tests.reward_models import worlds

CHAT = RewardBatch(
    [[{"role": "user", "content": "w1 w2"}]] * 3,
    [[{"role": "assistant", "content": text}] for text in ("w7", "w8 w9", "w8 w9")],
    ended=[True, True, False],
)


@contextmanager
def served(spec, key="a key"):
    server = RewardServer(build_reward(spec), key, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_served_reward_gives_the_scores_of_the_reward(tmp_path, monkeypatch):
    """By the command, with the key that it makes, and no key in what it prints."""
    monkeypatch.delenv("ALIGN_ROLLOUT_KEY", raising=False)
    folder, key = worlds.reward_folder(tmp_path / "reward"), tmp_path / "key"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "align", "serve", "--reward", folder, "--port", port, "--api-key-file", str(key)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert f"serving reward 'reward' at http://127.0.0.1:{port}" in line and key.read_text().strip() not in line
        spec = {"type": "remote", "url": f"http://127.0.0.1:{port}", "api_key_file": str(key), "batch_size": 2}
        scores = build_reward(spec).score(CHAT).scores
        torch.testing.assert_close(scores, build_reward(folder).score(CHAT).scores, rtol=0, atol=1e-6)
        assert (scores[1] - scores[2]).abs() > 0.1  # the last one was cut, and has no end token
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0


def test_variables_of_the_template_are_sent_where_they_are_named(tmp_path):
    folder = worlds.reward_folder(tmp_path, template="{% if not thoughts %}w21 {% endif %}" + worlds.TEMPLATE)
    batch = replace(CHAT, columns={"chat_template_kwargs": [{"thoughts": True}, {"thoughts": False}, None]})
    here = build_reward(folder).score(batch).scores
    with served(folder) as url:
        remote = {"type": "remote", "url": url, "headers": {"Authorization": "Bearer a key"}}
        sent = build_reward({**remote, "columns": ["chat_template_kwargs"]}).score(batch).scores
        without = build_reward(remote).score(batch).scores
    torch.testing.assert_close(sent, here, rtol=0, atol=1e-6)
    assert (without - here).abs()[0] > 1e-3 and torch.equal(without[1:], sent[1:])


def test_who_has_not_the_key_and_what_is_no_batch(monkeypatch):
    monkeypatch.setenv("ALIGN_ROLLOUT_KEY", "another")
    with served({"type": "rule", "function": lambda completions: [float(len(c)) for c in completions]}) as url:
        with pytest.raises(RewardError, match="answered 401.*key is missing or wrong: api_key_file"):
            build_reward({"type": "remote", "url": url, "api_key_file": "unused"}).score(RewardBatch(["p"], ["abc"]))
        assert requests.get(url, timeout=5).status_code == 401
        own = {"Authorization": "Bearer a key"}
        assert requests.get(url, headers=own, timeout=5).status_code == 200
        asked = requests.post(url, json={"prompts": ["p"], "completions": ["abc"]}, headers=own, timeout=5)
        assert asked.json() == {"scores": [3.0]}
        for content, words in (
            (b"[" * 10_000, "no batch"),
            (b'{"prompts": ["p"]}', "needs the lists prompts and completions"),
            (b'{"prompts": ["p"], "completions": []}', "not all are lists of one length"),
            (b'{"prompts": ["p"], "completions": ["a"], "columns": {"a": 1}}', "not all are lists"),
            (b'{"prompts": ["p"], "completions": ["a"], "texts": []}', "it has texts"),
        ):
            answer = requests.post(url, data=content, headers=own, timeout=5)
            assert answer.status_code == 422 and words in answer.json()["error"]
        long = requests.post(url, headers={**own, "Content-Length": "999999999999"}, timeout=5)
        assert long.status_code == 413


def broken(completions):
    if completions[0] == "nan":
        return [float("nan")]
    raise KeyError("of the function")


def test_what_the_reward_refuses_is_said_to_who_asked():
    """At once: it is not asked for again, and the server lives on."""
    with served({"type": "rule", "function": broken}) as url:
        remote = {"type": "remote", "url": url, "headers": {"Authorization": "Bearer a key"}, "retries": 1}
        remote |= {"backoff": 0.0}
        with pytest.raises(RewardError, match="422.*returned nan for"):
            build_reward(remote).score(RewardBatch(["p"], ["nan"]))
        with pytest.raises(RewardError, match="500.*2 times.*KeyError: .*of the function"):
            build_reward(remote).score(RewardBatch(["p"], ["a"]))


def test_a_member_that_a_served_ensemble_cannot_ask_is_named_with_what_to_do(caplog):
    """In the run, and in the server's log; a long error of a server is not cut off before its remedy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    member = {"type": "remote", "name": "strict", "url": f"http://127.0.0.1:{port}/{'long/' * 40}", "retries": 0}
    fine = {"type": "rule", "function": lambda completions: [1.0] * len(completions)}
    with served({"type": "ensemble", "aggregation": "mean", "members": [fine, member]}) as url:
        remote = {"type": "remote", "name": "all", "url": url, "headers": {"Authorization": "Bearer a key"}}
        with pytest.raises(
            RewardError, match="'all' at .*'strict' at .*no connection.*Start the server, or fix the ur"
        ):
            build_reward(remote).score(RewardBatch(["p"], ["a"]))
    assert re.search("refused a batch: reward 'strict' at", caplog.text)


@pytest.mark.parametrize(
    "words, message",
    [
        (["run.yaml", "--reward", "a:b"], "run.yaml is for servers of completions"),
        (["--reward", "a:b", "--gpu-memory", "0.5"], "--gpu-memory is for servers of completions"),
        ([], "name the run's YAML file, or a reward by --reward"),
        (["--reward", "{type: nothing}"], "nothing"),
    ],
)
def test_what_cannot_be_served(words, message, capsys):
    assert main(["serve", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
