"""Stage `rollouts` of gpu/check.py: the rollout engine in the trainer's process, vLLM where it is installed.

Start, rollouts, push and its proof, seeds, sleeping, and adapters, each part with its seconds. Identity is tried both
ways: a push is proved, and one weight that was changed behind the engine's back has to be found.
"""

import dataclasses
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model

from align.errors import RolloutError
from align.rollout import SamplingParams, make_engine
from align.rollout.make import choose_backend
from benchmarks.gpu.common import Part, Setting, completed


def parts(setting: Setting) -> Iterator[Part]:
    """Two engines, both able to sleep, asleep when nothing else is left to ask of them. vLLM's defaults, without sleep,
    are in the device tests."""
    full, adapter = Rollouts(setting), Rollouts(setting, lora=True)
    yield "start", full.start
    yield "rollouts", full.rollouts
    yield "push", full.push
    yield "identity", full.identity
    yield "seeds", full.seeds
    yield "sleep", full.sleep
    yield "close", full.close
    yield "adapter_start", adapter.start
    yield "adapter_rollouts", adapter.rollouts
    yield "adapter_push", adapter.push
    yield "adapter_sleep", adapter.sleep
    yield "adapter_close", adapter.close


class Rollouts:
    """An engine beside the model that it got its weights from."""

    def __init__(self, setting: Setting, lora: bool = False):
        self.setting, self.lora = setting, lora
        self.backend = choose_backend("auto")
        self.prompt_tokens, self.tokens = (8, 8) if setting.small else (128, 128)
        self.count = 4 if setting.small else 128
        self.version = 0
        self.can_sleep = setting.device == "cuda" and self.backend == "vllm"

    def start(self) -> dict:
        """On a GPU without compilation and graphs, which cost more than what is asked here."""
        options: dict = {}
        if self.can_sleep:
            options = {"kv_cache_gib": 8, "engine_options": {"enforce_eager": True}, "sleep": True}
        model = self.setting.model().to(self.setting.dtype)
        if self.lora:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
        self.model, begin = model, self.setting.clock()
        self.engine = make_engine(
            model,
            backend=self.backend,
            max_model_len=self.prompt_tokens + self.tokens,
            max_num_seqs=self.count,
            **options,
        )
        seconds = self.setting.clock() - begin
        return {
            "engine": self.backend,
            "options": options,
            "seconds": round(seconds, 2),
            "probe": self.differences(),
        }

    def differences(self) -> dict:
        """Log-probs of the engine against the trainer's, and what rounding alone does on this model (nats)."""
        probe = self.engine.probe(self.model)
        return {"mean_abs_diff": probe.mean_abs_diff, "rounding": probe.rounding, "tokens": probe.tokens}

    @property
    def prompts(self) -> list[list[int]]:
        generator, vocabulary = torch.Generator().manual_seed(0), self.setting.first_shape["vocab_size"]
        return torch.randint(vocabulary, (self.count, self.prompt_tokens), generator=generator).tolist()

    def complete(self, prompts=None, seeds=None) -> list[list[int]]:
        prompts = self.prompts if prompts is None else prompts
        params = [SamplingParams(self.tokens, seed=seed) for seed in seeds or [None] * len(prompts)]
        return completed(self.engine, prompts, params)

    def rollouts(self) -> dict:
        self.complete()  # what is compiled or captured at first use
        begin = self.setting.clock()
        completions = self.complete()
        seconds = self.setting.clock() - begin
        tokens = sum(map(len, completions))
        return {"sequences": len(completions), "tokens": tokens, "tokens_per_second": round(tokens / seconds)}

    def push(self) -> dict:
        """Every trained weight changed, three pushes; the last one's report."""
        before = self.complete(seeds=range(self.count))
        for _ in range(3):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.05)
            report = self.next_push()
        after = self.complete(seeds=range(self.count))
        found = {**dataclasses.asdict(report), "changed_completions": different(before, after)}
        if found["changed_completions"] == 0:
            found["failed"] = "no completion changed: the engine goes on with its old weights"
        return {**found, "probe": self.differences()}

    def next_push(self):
        self.version += 1
        return self.engine.push(self.model, self.version)

    def identity(self) -> dict:
        """One number of one tensor changed without a push."""
        weight = self.model.get_parameter("model.layers.0.mlp.up_proj.weight")
        with torch.no_grad():
            kept = weight[0, 0].clone()
            weight[0, 0] += 1.0
            try:
                self.engine.verify(self.model)
            except RolloutError as error:
                found = {"found": str(error)[:300]}
            else:
                found = {"failed": "a weight that differs was not found"}
            weight[0, 0] = kept
        self.engine.verify(self.model)
        return found

    def seeds(self) -> dict:
        """The share of the requests that draw other tokens when nothing changed, and in another order. On a GPU the
        second need not be 0: the kernels that a batch gets depend on it, and so does the last bit of a log-prob."""
        seeds = list(range(self.count))
        first, again = self.complete(seeds=seeds), self.complete(seeds=seeds)
        turned = self.complete(self.prompts[::-1], seeds[::-1])[::-1]
        found = {"again": different(first, again), "other_order": different(first, turned)}
        if found["again"]:
            found["failed"] = "the same call drew other tokens"
        return found

    def sleep(self) -> dict | str:
        """`rollout.sleep`: GiB given back, and whether what comes after waking is what was before."""
        if not self.can_sleep:
            return "skipped: needs a GPU and vLLM"
        seeds = range(self.count)
        awake = self.complete(seeds=seeds)
        again = different(awake, self.complete(seeds=seeds))
        before, begin = self.used_gib(), self.setting.clock()
        discarded = self.engine.sleep()
        slept = self.setting.clock()
        asleep = self.used_gib()
        report = self.next_push()
        changed = different(awake, self.complete(seeds=seeds))
        self.engine.verify(self.model)  # every tensor; those under an adapter came back from the host's memory
        found = {
            "gib_given_back": round(before - asleep, 2),
            "weights_discarded": discarded,
            "seconds_to_sleep": round(slept - begin, 3),
            "seconds_of_waking_push": round(report.seconds, 3),
            "changed_completions": changed,
            "changed_without_sleep": again,
        }
        if changed and not again:
            found["failed"] = "the engine draws other tokens after its sleep, from the same weights"
        return found

    def used_gib(self) -> float:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def close(self) -> dict:
        self.engine.close()
        del self.engine, self.model
        if self.setting.device != "cuda":
            return {}
        return {"gib_still_used": round(self.used_gib(), 2)}


def different(first: list, second: list) -> float:
    return sum(a != b for a, b in zip(first, second, strict=True)) / len(first)
