"""The interface to completions, for trainers, best-of-n and evaluation: `RolloutEngine`."""

import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, ClassVar

from align.data.ending import end_ids
from align.data.limits import positions
from align.errors import ConfigError, RolloutError
from align.overrides import says
from align.rollout.seeds import derive_seed
from align.rollout.types import Completion, OnDone, PushReport, Request, Rollout, SamplingParams

if TYPE_CHECKING:  # the command line reads this module for its help, without torch
    import torch
    from torch import Tensor

    from align.rollout.identity import Fingerprints
    from align.rollout.options import RolloutOptions
    from align.rollout.probe import Probe

logger = logging.getLogger(__name__)


class RolloutEngine(ABC):
    """Token ids in, token ids with log-probs out, from a copy of the weights that only `push` changes.

    `weight_version` counts the pushes: 0 for the weights that the engine started with, then the version given to
    `push`. Every `Rollout` carries it. `dtype`: of the engine's weights and arithmetic; by default the model's. A
    back-end provides `_complete`, `_load` and `_free`, and `_weights`, `_parts` and `_held` if it can prove its
    weights; all else is shared, so that seeds, checks and proofs mean the same everywhere.
    """

    name: str
    # Of the section `rollout`, for an engine that is named by its place and has options of its own.
    options_class: "ClassVar[type[RolloutOptions] | None]" = None
    # Whether completions are made outside this process, and `generate` touches nothing of it: no random state, no
    # device. Then another thread may call it while the policy trains.
    draws_elsewhere: ClassVar[bool] = False
    # Whether `_complete` says when a request is done, before all are. A subclass that completes in its own way says so
    # again, as it may know nothing of `done`, or return something else than what `done` was told.
    tells: ClassVar[bool] = False
    # Whether ranks complete each other's requests: then all of them call `generate`, also with none of their own.
    together = False

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_model_len: int,
        seed: int = 0,
        sync_tolerance: float | None = None,
        dtype: "torch.dtype | None" = None,
    ):
        from align.modeling.logprobs import language_model
        from align.rollout.adapters import ArrivedShare

        core = language_model(model)
        text_config = core.config.get_text_config()
        check_length(text_config, max_model_len)
        check_factors(core, max_model_len)
        self.max_model_len = max_model_len
        self.vocab_size = text_config.vocab_size
        self.eos_token_ids = end_tokens(core, tokenizer)
        self.dtype = dtype or core.dtype
        self.arrived = ArrivedShare()  # of the adapters in the last push
        self._sums: bool | None = None  # how `_held` makes fingerprints: as `fingerprint` does where the model lies
        self.rounding = 0.0  # mean difference of log-probs that rounding makes on this model, as the last probe found
        self.sync_tolerance = sync_tolerance
        self.seed = seed
        self.calls = 0
        self.weight_version = 0
        self.closed = False

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if not says(cls, "tells", ("generate", "_complete")):
            cls.tells = False

    # ---- what a back-end provides -----------------------------------------------------------------------------------

    @abstractmethod
    def _complete(self, requests: list[Request], progress: bool, done: OnDone | None = None) -> list[list[Completion]]:
        """The completions of each request, in order. done: only of a back-end that `tells`, which calls it once per
        request as soon as it is done, from one thread at a time."""

    @abstractmethod
    def _load(self, weights: "Iterable[tuple[str, Tensor]]") -> None:
        """Copy these into the engine: every tensor of the model, in `dtype`."""

    @abstractmethod
    def _free(self) -> None:
        """Give back what the back-end holds."""

    def _weights(self, model, everything: bool) -> "Iterator[tuple[str, Tensor]]":
        """The tensors of `model` as `_load` takes them. Unless `everything`, what never changes may be left out."""
        from align.rollout.weights import named_weights

        return named_weights(model, self.dtype, self.arrived)

    def _parts(self, name: str, tensor: "Tensor") -> "list[Tensor]":
        """The pieces of a tensor that `_held` has fingerprints of, as the engine holds them."""
        return [tensor]

    def _held(self, names: "Iterable[str]") -> "Fingerprints | None":
        """Fingerprints of these tensors in the engine's own memory; None: it cannot prove what it holds."""
        return None

    def _prove(self, sent: "Fingerprints") -> int | None:
        """How many tensors the engine holds as they were sent, all of them; None: it cannot prove what it holds."""
        from align.rollout.identity import check_identity

        held = self._held(sent)
        if held is None:
            return None
        check_identity(sent, held, self.name, self.weight_version)
        return len(sent)

    def _start(self, model) -> None:
        """The first weights, at the end of a back-end's `__init__`."""
        with preserved_random_states():
            self._load(self._weights(model, everything=True))

    # ---- what users call --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
        *,
        progress: bool = False,
        on_done: OnDone | None = None,
    ) -> list[Rollout]:
        """Complete `prompts` (lists of token ids), in order; `params` is one for all or one per prompt.

        The caller's random states (torch, numpy, python) are left as they were. Requests without a seed get one from
        (engine seed, number of earlier calls that needed one, index of the prompt), so their draws do not depend on
        what else is in the call; `state_dict` and `load_state_dict` carry the count over to a resumed run. `progress`
        shows a bar. `on_done` is told the completions of each prompt once, with an engine that `tells` as soon as they
        are there, in any order and perhaps from another thread; what it raises ends the call. Raises `RolloutError` for
        a prompt that cannot be completed, by index.
        """
        requests = self._requests(prompts, params)
        if not requests and not self.together:
            return []
        # to put the random states back would undo the draws that the process makes meanwhile
        with nullcontext() if self.draws_elsewhere else preserved_random_states():
            told = (on_done,) if on_done is not None and self.tells else ()
            completions = self._complete(requests, progress, *told)
        check_logprobs(completions)
        if on_done is not None and not told:
            for index, made in enumerate(completions):
                on_done(index, made)
        return [Rollout(r.prompt_ids, c, self.weight_version) for r, c in zip(requests, completions, strict=True)]

    def push(self, model, version: int) -> PushReport:
        """Give the engine the weights of `model` (a transformers model, or a PEFT model) and prove that it has them.

        With sharded weights (FSDP2, ZeRO-3) every rank must call this. The model is left as it was: adapters are merged
        into copies. Raises `RolloutError` when a tensor in the engine's memory differs from the trainer's by a bit; or
        when log-probs differ (`probe`), with a back-end that cannot say what it holds.
        """
        from align.modeling.logprobs import language_model
        from align.rollout.adapters import ArrivedShare
        from align.rollout.identity import WeightStream

        self._check_open()
        check_factors(language_model(model), self.max_model_len)
        start = time.perf_counter()
        self.arrived = ArrivedShare()
        stream = WeightStream(self._weights(model, everything=False), self._parts, self._sums)
        with preserved_random_states():
            self._load(stream)
        sent = stream.finish()
        self.weight_version = version
        loaded = time.perf_counter()
        proved = self._prove(sent)
        probe = self.probe(model) if proved is None else None
        end = time.perf_counter()
        return PushReport(version, end - start, loaded - start, end - loaded, proved, self.arrived.share, probe)

    def verify(self, model) -> "Probe":
        """Prove, without a push, that the engine holds the weights of `model` and computes what it computes.

        Raises `RolloutError` as `push` and `probe` do. The engine's own draws are not touched.
        """
        from align.rollout.identity import WeightStream

        self._check_open()
        self._prove(WeightStream(self._weights(model, everything=True), self._parts, self._sums).finish())
        return self.probe(model)

    def probe(self, model) -> "Probe":
        """Compare the engine's log-probs of a few fixed prompts with those of `model`, and with what rounding does.

        Warns when the mean difference is more than rounding explains; raises `RolloutError` when it is so much more
        that the engine must compute something else (another temperature, other positions, other weights).
        """
        from align.rollout.probe import check_probe, compare, probe_requests

        self._check_open()
        requests = probe_requests(self.vocab_size, self.max_model_len)
        with preserved_random_states():
            completions = self._complete(requests, progress=False)
            probe = compare(model, requests, completions, self.dtype)
        self.rounding = probe.rounding
        check_probe(probe, self.name, self.weight_version, self.sync_tolerance)
        return probe

    def anyone(self, wants: bool) -> bool:
        """Whether a further call of `generate` is wanted here, or by another rank if all must make it (`together`)."""
        return wants

    def interrupt(self) -> bool:
        """Give up the call of `generate` that another thread waits for (`draws_elsewhere`), which raises there. True:
        so it is; False for a back-end that cannot, where it runs to its end."""
        return False

    def sleep(self) -> bool:
        """Give memory back until the engine is used again, where a back-end can and its options say so. True: its
        weights went too, and a `push` has to come before anything else."""
        return False

    def state_dict(self) -> dict:
        """What a resumed run needs to draw the same completions (the weights come by `push`)."""
        return {"seed": self.seed, "calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        self.seed, self.calls = state["seed"], state["calls"]

    def close(self) -> None:
        """Free what the engine holds. It cannot be used afterwards."""
        if not self.closed:
            self.closed = True
            self._free()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise RolloutError(f"this {self.name} engine was closed: make a new one")

    def _requests(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Request]:
        self._check_open()
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise RolloutError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts: give one for all, or one for each"
            )
        call = self.calls
        requests = []
        for index, (ids, own) in enumerate(zip(prompts, params, strict=True)):
            self._check_prompt(index, ids, own)
            if own.greedy:
                seed = None
            elif own.seed is not None:
                seed = derive_seed("request", own.seed)
            else:
                seed = derive_seed("engine", self.seed, call, index)
                self.calls = call + 1
            stop_ids = self.eos_token_ids
            if own.stop_token_ids:
                stop_ids = tuple(dict.fromkeys((*stop_ids, *own.stop_token_ids)))
            requests.append(Request(ids, own, seed, stop_ids))
        return requests

    def _check_prompt(self, index: int, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise RolloutError(f"prompt {index} of this call is empty: a completion needs at least one token before it")
        if len(ids) + params.max_tokens > self.max_model_len:
            raise RolloutError(
                f"prompt {index} of this call has {len(ids)} tokens, and with max_tokens={params.max_tokens} that is "
                f"more than the engine's max_model_len={self.max_model_len}: shorten the prompt or the completion, or "
                "make the engine with a larger max_model_len"
            )
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise RolloutError(
                f"prompt {index} of this call has token id {bad}, outside the model's vocabulary of {self.vocab_size}: "
                "was it made by the model's own tokenizer?"
            )


def check_length(text_config, max_model_len: int) -> None:
    """Refuse sequences longer than the positions the model was made for (rotary models would silently degrade)."""
    limit = positions(text_config)
    rope = getattr(text_config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"  # then the back-end knows how far it reaches
    if limit is not None and max_model_len > limit and not scaled:
        raise ConfigError(
            f"max_model_len={max_model_len} (prompt and completion) is more than the {limit} positions of the model: "
            "lower max_prompt_length or max_completion_length"
        )


def check_factors(core, max_model_len: int) -> None:
    """LongRoPE: an engine takes the factors that its max_model_len needs, and so must the model whose weights it gets.
    A model of no run is given them."""
    from align.modeling.rotary import choose_factors, factors_for, factors_of

    chosen, needed = factors_of(core), factors_for(core.config, max_model_len)
    if chosen is None:
        choose_factors(core, max_model_len)
    elif chosen != needed:
        raise ConfigError(
            f"LongRoPE: the model takes the factors for {chosen} sequences, as the run's lengths need, and "
            f"an engine of max_model_len={max_model_len} with those for {needed} ones: make both at most the model's "
            "original positions, or both more (max_prompt_length + max_completion_length; self_judge needs room too)"
        )


def end_tokens(core, tokenizer) -> tuple[int, ...]:
    """Every token id that ends a completion: EOS and the chat template's end of turn as the tokenizer has them, and
    those of the model's generation config (end of turn, end of text, end of message)."""
    ids = [] if tokenizer is None else list(end_ids(tokenizer))
    own = getattr(getattr(core, "generation_config", None), "eos_token_id", None)
    ids += own if isinstance(own, list) else [own] if own is not None else []
    if not ids:
        logger.warning("neither the tokenizer nor the model names an end token: completions end at max_tokens only")
    return tuple(dict.fromkeys(ids))


def check_logprobs(completions: list[list[Completion]]) -> None:
    for index, group in enumerate(completions):
        for completion in group:
            if completion.logprobs is not None and not math.isfinite(sum(completion.logprobs)):
                raise RolloutError(
                    f"the log-probs of the completion of prompt {index} are not finite: the model's weights or logits "
                    "are broken (a diverged run, or float16 overflow)"
                )


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Leave the random states of torch, numpy and python as they are found: vLLM draws from all of them."""
    import numpy as np
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
