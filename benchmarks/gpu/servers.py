"""Stage `servers` of gpu/check.py: a vLLM server (`align serve`) beside the trainer, on the same GPU if there is one.

Pushes by every transfer that can be here, each proved in the server's memory, and timed; a weight that was changed
behind the server's back; an adapter; completions through HTTP.
"""

import dataclasses
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from align.errors import RolloutError
from align.rollout import SamplingParams, make_engine
from align.rollout.make import choose_backend
from benchmarks.gpu.common import Part, Setting, completed
from benchmarks.gpu.rollouts import different

KEY = "ALIGN_ROLLOUT_KEY"


def parts(setting: Setting) -> Iterator[Part]:
    if choose_backend("auto") != "vllm":
        yield "start", lambda: "skipped: needs vLLM"
        return
    with tempfile.TemporaryDirectory() as folder:
        world = Servers(setting, Path(folder))
        yield "start", world.start
        try:
            for transfer in ("ipc", "files", "gloo") if setting.device == "cuda" else ("files", "gloo"):
                yield transfer, lambda transfer=transfer: world.pushes(transfer)
            yield "identity", world.identity
            yield "adapter", world.adapter
            yield "completions", world.completions
            if setting.device == "cuda":
                yield "nccl", nccl_alone
        finally:
            world.close()


class Servers:
    """One server, with room for an adapter, and engines of several runs after each other."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting, self.folder = setting, folder
        self.length = 32 if setting.small else 128  # of prompts, and of completions
        self.count = 4 if setting.small else 64
        self.process: subprocess.Popen | None = None

    def start(self) -> dict:
        """Seconds until the server answers."""
        self.model = self.setting.model().to(self.setting.dtype)
        self.model.config.save_pretrained(self.folder / "model")
        rows = self.folder / "prompts.jsonl"
        rows.write_text(json.dumps({"prompt": "words"}) + "\n")
        options = {"enforce_eager": True} if self.setting.device == "cuda" else {}
        config = {
            "method": "rloo", "model_name_or_path": str(self.folder / "model"), "dataset_name": str(rows),
            "rewards": [{"type": "rule", "function": "builtins:len"}], "max_prompt_length": self.length,
            "max_completion_length": self.length, "use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear",
            "bf16": self.setting.device == "cuda",
            "rollout": {
                "backend": "vllm", "max_num_seqs": self.count, "kv_cache_gib": 1 if self.setting.small else 8,
                "engine_options": options,
            },
        }  # fmt: skip
        (self.folder / "run.yaml").write_text(json.dumps(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        os.environ[KEY] = secrets.token_hex(8)
        begin = self.setting.clock()
        self.log = (self.folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "align", "serve", str(self.folder / "run.yaml"), "--port", str(port)],
            stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )  # fmt: skip
        if not any(self.url in line for line in self.process.stdout):  # until it is ready, or has ended
            self.log.seek(0)
            return {"failed": f"the server ended: {self.log.read()[-1500:]}"}
        return {"seconds": round(self.setting.clock() - begin, 1)}

    def engine(self, model, **options):
        return make_engine(
            model, backend="server", urls=[self.url], max_model_len=2 * self.length, dtype=self.setting.dtype, **options
        )

    def pushes(self, transfer: str) -> dict:
        """The third of three pushes of all weights, each of which has to change the completions."""
        engine = self.engine(self.model, transfer=transfer)
        try:
            before = self.complete(engine)
            for version in (1, 2, 3):
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter.mul_(1.02)
                report = engine.push(self.model, version)
            found = {**dataclasses.asdict(report), "changed_completions": different(before, self.complete(engine))}
            found["gib"] = round(sum(p.nbytes for p in self.model.parameters()) / 2**30, 2)
            probe = engine.probe(self.model)
            found["probe"] = {"mean_abs_diff": probe.mean_abs_diff, "rounding": probe.rounding}
        finally:
            engine.close()
        if found["changed_completions"] == 0:
            found["failed"] = "no completion changed: the server goes on with its old weights"
        return found

    def identity(self) -> dict:
        engine = self.engine(self.model)
        weight = self.model.get_parameter("model.layers.0.mlp.up_proj.weight")
        try:
            with torch.no_grad():
                weight[0, 0] += 1.0
            engine.verify(self.model)
        except RolloutError as error:
            return {"found": str(error)[:300]}
        finally:
            engine.close()
        return {"failed": "a weight that differs was not found"}

    def adapter(self) -> dict:
        model = get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
        engine = self.engine(model)
        try:
            before = self.complete(engine)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(1.5)
            report = engine.push(model, 1)
            changed = different(before, self.complete(engine))
        finally:
            engine.close()
            model.unload()
        return {**dataclasses.asdict(report), "changed_completions": changed}

    def completions(self) -> dict:
        engine = self.engine(self.model)
        try:
            self.complete(engine)
            begin = self.setting.clock()
            tokens = sum(map(len, self.complete(engine)))
            seconds = self.setting.clock() - begin
            again = different(self.complete(engine), self.complete(engine))
        finally:
            engine.close()
        return {"tokens": tokens, "tokens_per_second": round(tokens / seconds), "other_tokens_when_repeated": again}

    def complete(self, engine) -> list[list[int]]:
        generator, vocabulary = torch.Generator().manual_seed(0), self.setting.first_shape["vocab_size"]
        prompts = torch.randint(vocabulary, (self.count, self.length), generator=generator).tolist()
        params = [SamplingParams(self.length, seed=seed) for seed in range(self.count)]
        return completed(engine, prompts, params)

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


def nccl_alone() -> dict:
    """NCCL's calls with a group of one, which is what one GPU can show."""
    from align.rollout.server.group import Group, meeting_point

    group = Group("nccl", meeting_point("127.0.0.1", 20), 0, 1, 20.0, "127.0.0.1")
    block = torch.arange(1 << 20, dtype=torch.int32, device="cuda").view(torch.uint8)
    expected = block.clone()
    group.broadcast(block)
    group.close()
    return {"bytes": block.numel()} if torch.equal(block, expected) else {"failed": "other bytes came back"}
