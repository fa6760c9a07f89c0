"""`align serve` and its options, as far as they go without a server."""

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.cli.main import build_parser, main
from align.cli.serve import started_with
from align.config.server_key import own_key, read_key
from align.config.source import apply_overrides, read_overrides
from align.errors import ConfigError
from align.rollout import make, rollout_options
from align.rollout.server import launch
from align.rollout.server.launch import address, announce, as_arguments
from tests.rollout.rollout_models import llama
from tests.rollout.served import CONFIG

URL = "http://127.0.0.1:8000"


def section(*tokens, **file):
    """What the section of a file becomes with options of the command line."""
    from align.config.source import Entry

    entries = {key: Entry(value, None, "run.yaml, line 1") for key, value in file.items()}
    apply_overrides(entries, read_overrides(list(tokens)))
    return rollout_options(entries["rollout"].value)


@pytest.mark.parametrize(
    "tokens",
    [
        ["--rollout.urls", URL],
        ["--rollout.urls.0", URL],
        ["--rollout.urls.0", URL, "--rollout.urls.1", "http://[::1]:1"],
    ],
)
def test_one_address_need_not_be_a_list(tokens):
    options = section("--rollout.backend", "server", *tokens)
    assert options.urls == [URL, "http://[::1]:1"][: len(tokens) // 2]
    assert rollout_options(options.given()) == options == rollout_options({**options.given(), "urls": options.urls})


def test_a_word_in_the_file_and_an_option_on_the_command_line_are_one_section():
    assert section("--rollout.kv_cache_gib", "2", rollout="vllm").given() == {"backend": "vllm", "kv_cache_gib": 2.0}
    assert section("--rollout", "vllm", "--rollout.max_num_seqs", "3").max_num_seqs == 3


@pytest.mark.parametrize("url", ["http://me:s3cret@127.0.0.1:1", "http://s3cret@127.0.0.1:1", "me:s3cret@127.0.0.1"])
def test_a_password_in_an_address_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="api_key_env|is not an address") as refused:
        rollout_options({"backend": "server", "urls": url})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:port", "http://127.0.0.1:0", "http://", "ftp://a"])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match="is not an address"):
        rollout_options({"backend": "server", "urls": [url]})


def test_servers_are_started_as_the_file_says_unless_the_command_line_does():
    file = {"backend": "server", "urls": URL, "api_key_env": "A", "api_key_file": "b", "kv_cache_gib": 2}
    file |= {"gpu_memory_utilization": 0.5, "engine_options": {"max_num_batched_tokens": 4096}}
    options = rollout_options(file)
    assert not {"kv_cache_gib", "gpu_memory_utilization", "engine_options"} & options.engine_arguments().keys()

    def started(*tokens, section=options):
        return started_with(section, build_parser().parse_args(["serve", "run.yaml", *tokens]))

    own = {"api_key_env": "A", "api_key_file": "b", "kv_cache_gib": 2.0, "gpu_memory_utilization": 0.5}
    assert started() == {**own, "further": {"max_num_batched_tokens": 4096}}
    given = started("--api-key-env", "C", "--api-key-file", "d", "--gpu-memory", "0.7", "--kv-cache-gib", "3")
    own = {"api_key_env": "C", "api_key_file": "d", "kv_cache_gib": 3.0, "gpu_memory_utilization": 0.7}
    assert given == {**own, "further": {"max_num_batched_tokens": 4096}}
    plain = started(section=rollout_options({"backend": "server", "urls": URL}))
    assert (plain["api_key_env"], plain["api_key_file"]) == ("ALIGN_ROLLOUT_KEY", None)
    assert (plain["gpu_memory_utilization"], plain["kv_cache_gib"], plain["further"]) == (0.9, None, {})
    with pytest.raises(ConfigError, match="worker_extension_cls follows"):
        rollout_options({**file, "engine_options": {"worker_extension_cls": "mine"}})
    assert as_arguments({"a_b": [1, 2], "c": False}) == ["--a-b", "1", "2", "--no-c"]


def test_serve_says_in_a_sentence_what_keeps_it_from_starting(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text("method: rloo\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(make.EngineBackend, "installed", True)
        port = taken.getsockname()[1]
        for given, message in ((port, f"cannot listen at http://127.0.0.1:{port}"), (70_000, "--port goes from 1 to")):
            assert main(["serve", str(tmp_path / "run.yaml"), "--port", str(given)]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setattr(make.EngineBackend, "installed", False)
    assert main(["serve", str(tmp_path / "run.yaml")]) == 2
    assert "vllm is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tensor-parallel=0", "--tensor-parallel is at least 1, not 0"),
        ("--gpu-memory=1.5", "--gpu-memory is above 0, and at most 1, not 1.5"),
        ("--kv-cache-gib=-1", "--kv-cache-gib is above 0, not -1"),
        ("--start-timeout=0", "--start-timeout is above 0, not 0"),
        ("--start-timeout=nan", "--start-timeout is above 0, not nan"),
    ],
)
def test_numbers_of_the_command_have_the_ranges_of_the_files(option, message, capsys):
    assert main(["serve", "run.yaml", option]) == 2
    assert capsys.readouterr().err == f"align: error: {message}\n"


def test_a_task_of_srun_serves(tmp_path, monkeypatch):
    """`align launch --slurm --rollout-gpus` on several nodes starts servers in a step of as many tasks, each of which
    was refused as a process that would train by itself. A file with `fsdp: true` is of a run of several, too."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path) + "fsdp: true\n")
    started = []
    monkeypatch.setattr(make.EngineBackend, "installed", True)
    monkeypatch.setattr(launch, "prepare", lambda: None)
    monkeypatch.setattr(launch, "serve", lambda *args, **options: started.append(options["max_model_len"]))
    for name, value in {"SLURM_STEP_NUM_TASKS": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ALIGN_ROLLOUT_KEY", "key")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["serve", str(tmp_path / "run.yaml"), "--port", str(port)]) == 0
    assert started == [256]


COMMANDS = [
    "generate m --prompts p --to a",
    "compare a b --rewards r",
    "front RUN --prompts p --rewards r",
    "bon --model m --prompts p --rewards r --gold_reward g",
]


@pytest.mark.parametrize(
    ("backend", "message"), [("server", "--backend server is for runs"), ("vlm", "rollout: backend must be one of")]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_make_an_engine_of_their_own_refuse_a_backend_at_once(command, backend, message, capsys):
    assert main([*command.split(), "--backend", backend]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"align: error: {message}")


def test_a_users_engine_is_named_by_its_place(tmp_path, monkeypatch):
    """Also on a command line: no code of the user's has to run before."""
    monkeypatch.setattr(make, "BACKENDS", dict(make.BACKENDS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"  # then the types of fields are looked up in the module
        "from dataclasses import dataclass\n"
        "from typing import Literal\n"
        "from align import RolloutOptions\n"
        "from align.rollout.transformers_engine import TransformersEngine\n"
        "@dataclass\nclass State:\n    beams: int = 1\n"
        "class MyOptions(RolloutOptions):\n    beams: Literal[1, 2] = 1\n"
        "class Mine(TransformersEngine):\n    options_class = MyOptions\n"
    )
    options = section("--rollout.backend", "mine.py:Mine", "--rollout.beams", "2")
    assert (options.backend, options.beams) == ("mine.py:Mine", 2) and rollout_options(options.given()) == options
    make.check_backend("mine.py:Mine")
    with pytest.raises(ConfigError, match="rollout.beams"):
        rollout_options({"backend": "mine.py:Mine", "beams": "x"})
    for place, message in (
        ("mine.py:MyOptions", "no subclass of align.RolloutEngine"),
        ("mine.py:Other", "no function 'Other' there; it has Mine, MyOptions, State"),
    ):
        with pytest.raises(ConfigError, match=message):
            rollout_options({"backend": place})


class Answering(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_key_goes_to_the_server_alone(tmp_path, monkeypatch, capsys):
    """Neither to a proxy of the environment, nor replaced by what ~/.netrc has for the host; over IPv6 too."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\nmachine ::1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a server that lives was ended"))
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        kind = type("Server", (ThreadingHTTPServer,), {"address_family": family})
        try:
            server = kind((host, 0), Answering)
        except OSError:
            continue  # a machine without IPv6
        server.keys = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        announce(address(host, server.server_address[1]), "the key", f"ready at {host}", 5)
        server.shutdown()
        server.server_close()
        assert server.keys == ["Bearer the key"] and f"ready at {host}" in capsys.readouterr().out
    assert address("::1", 8) == "http://[::1]:8"


def test_servers_that_make_the_key_at_the_same_time_have_one(tmp_path, monkeypatch):
    """The second finds the file of the first when its own is written; nobody ever reads half a key."""
    monkeypatch.delenv("ALIGN_ROLLOUT_KEY", raising=False)
    file, link = tmp_path / "key", os.link

    def late(made, path):
        if not file.exists():
            monkeypatch.setattr(os, "link", link)
            late.first = own_key("ALIGN_ROLLOUT_KEY", str(file))
        link(made, path)

    monkeypatch.setattr(os, "link", late)
    assert own_key("ALIGN_ROLLOUT_KEY", str(file)) == late.first == read_key("NONE", str(file))
    assert len(late.first) >= 40 and os.listdir(tmp_path) == ["key"] and file.stat().st_mode & 0o777 == 0o600
