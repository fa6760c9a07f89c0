"""Rollouts with transformers alone: runs wherever the model runs."""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache

from align.distributed.shards import is_zero3
from align.errors import ConfigError
from align.modeling.logprobs import language_model
from align.modeling.rotary import share_factors
from align.modeling.types import Model
from align.rollout.engine import RolloutEngine
from align.rollout.identity import Fingerprints, fingerprint
from align.rollout.roomy_cache import give_room, pick_rows
from align.rollout.sampling import RowSampler
from align.rollout.types import Completion, OnDone, Request
from align.rollout.weights import check_supported, own_weights

NO_ZERO3 = "the transformers rollout engine does not work with DeepSpeed ZeRO-3: use vLLM's, or --setup fsdp2 or zero2"
KEPT = 0.75  # ended rows are dropped when no larger share still runs: measured, for each dropping copies the cache


class TransformersEngine(RolloutEngine):
    """Batched decoding with a key-value cache; rows that have ended are dropped from the batch.

    The engine holds its own copy of the weights, on the model's device, although the trainer's model is at hand:
    rollouts between two pushes must come from the pushed weights, as with every other back-end, or `weight_version`
    would lie as soon as the optimiser has stepped. It costs the memory of the weights once more.
    `max_num_seqs`: sequences decoded at a time.
    """

    name = "transformers"
    tells = True  # at the end of each batch

    def __init__(
        self, model, tokenizer=None, *, max_model_len, seed=0, max_num_seqs=256, sync_tolerance=None, dtype=None
    ):
        super().__init__(
            model, tokenizer, max_model_len=max_model_len, seed=seed, sync_tolerance=sync_tolerance, dtype=dtype
        )
        self.max_num_seqs = max_num_seqs
        if is_zero3(model.parameters()):
            raise ConfigError(NO_ZERO3)
        self._native = holds_adapters(model)
        check_supported(model)
        self._model = empty_copy(language_model(model), self.dtype)
        if self._native:
            self._model = adapted_copy(self._model, model)
        share_factors(self._model, language_model(model))
        self._tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        self._pushes = 0
        accepted = inspect.signature(self._model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})}
        self._start(model)

    def _weights(self, model, everything):
        if not self._native:
            return super()._weights(model, everything)
        return self._with_adapters(model, everything)

    def _with_adapters(self, model, everything: bool) -> Iterator[tuple[str, Tensor]]:
        """The model as it is, adapters and all; of what is frozen one tensor in turn, unless `everything`."""
        weights = list(own_weights(language_model(model)))
        if not everything:
            self._pushes += 1
            frozen = [weight for weight in weights if not weight.trained]
            weights = [weight for weight in weights if weight.trained] + [frozen[self._pushes % len(frozen)]]
        for weight in weights:
            yield weight.name, weight.value(self._tensors[weight.name].dtype)
        self.arrived.add(1.0, 1.0)  # adapters keep their own dtype here

    @torch.no_grad()
    def _load(self, weights) -> None:
        for name, tensor in weights:
            self._tensors[name].copy_(tensor)

    def _parts(self, name: str, tensor: Tensor) -> list[Tensor]:
        return [tensor.to(self._tensors[name].dtype)]  # a few models keep some tensors in float32

    def _held(self, names) -> Fingerprints:
        return {name: [fingerprint(self._tensors[name])] for name in names}

    def _free(self) -> None:
        del self._model, self._tensors

    @torch.inference_mode()
    def _complete(self, requests: list[Request], progress: bool, done: OnDone | None = None) -> list[list[Completion]]:
        from tqdm.auto import tqdm

        rows = [_Row(request, sample) for request in requests for sample in range(request.params.n)]
        by_length = sorted(rows, key=lambda row: len(row.request.prompt_ids))  # neighbours need little padding
        every = iter(rows)
        groups = [[next(every) for _ in range(request.params.n)] for request in requests]
        untold = dict(enumerate(groups)) if done is not None else {}
        with tqdm(total=len(rows), desc="Generating", disable=not progress) as bar:
            for start in range(0, len(rows), self.max_num_seqs):
                batch = by_length[start : start + self.max_num_seqs]
                self._decode(batch)
                bar.update(len(batch))
                for index in [index for index, group in untold.items() if all(row.finish_reason for row in group)]:
                    assert done is not None
                    done(index, [row.completion() for row in untold.pop(index)])
        return [[row.completion() for row in group] for group in groups]

    def _decode(self, rows: list["_Row"]) -> None:
        device = self._model.device
        sampler = RowSampler(
            [row.request.params for row in rows],
            [row.seed for row in rows],
            [row.request.stop_ids for row in rows],
            self.vocab_size,
            _sampling_device(device),
            [row.request.prompt_ids for row in rows],
        )
        logits, cache, mask = self._read_prompts([row.request.prompt_ids for row in rows])
        step = 0
        while True:
            tokens, logps = sampler.draw(logits.to(_sampling_device(device)).float(), step)
            for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                row.append(token, logp)
            running = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not running:
                return
            tokens = tokens.to(device)
            if len(running) <= KEPT * len(rows):
                rows = [rows[i] for i in running]
                sampler.select(running)
                index = torch.tensor(running, device=device)
                pick_rows(cache, index)
                tokens, mask = tokens[index], mask[index]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits, _ = self._forward(tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)
            step += 1

    def _read_prompts(self, prompts: list[list[int]]) -> tuple[Tensor, Cache, Tensor]:
        """The last logits [B, V], cache and attention mask [B, T] of the prompts, each different one read once."""
        different = list(dict.fromkeys(map(tuple, prompts)))
        input_ids, mask = left_padded([list(ids) for ids in different], self._model.device)
        logits, cache = self._forward(input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None)
        give_room(cache)
        if len(different) < len(prompts):
            places = {ids: place for place, ids in enumerate(different)}
            index = torch.tensor([places[tuple(ids)] for ids in prompts], device=self._model.device)
            pick_rows(cache, index)
            logits, mask = logits[index], mask[index]
        return logits, cache, mask

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """The last logits [B, V], and the cache with the new tokens in it."""
        inputs = {"input_ids": input_ids, "attention_mask": mask, "past_key_values": cache, **self._options}
        if self._takes_positions:
            # rows that have ended but are still in the batch must not run past the last position
            inputs["position_ids"] = positions.clamp(max=self.max_model_len - 1)
        output = self._model(**inputs)
        if "past_key_values" not in output:
            raise ConfigError(
                f"{type(self._model).__name__} keeps what it has read in a form that rows cannot be picked from: use "
                "rollout.backend: vllm",
                key="rollout",
            )
        return output.logits[:, -1], output.past_key_values


@dataclass
class _Row:
    """One sample of one request, while it grows."""

    request: Request
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def seed(self) -> int | None:
        return None if self.request.seed is None else self.request.seed + self.sample

    def append(self, token: int, logp: float) -> None:
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        self.logprobs.append(logp)
        if token in self.request.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.params.max_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        logprobs = None if self.request.params.greedy else self.logprobs
        return Completion(self.tokens, logprobs, cast(str, self.finish_reason))


def _sampling_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def left_padded(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, T], padded on the left with 0s."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return input_ids, mask


def holds_adapters(model: Model) -> bool:
    """Whether the engine can hold the adapters beside the weights, as the model does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules())
    return isinstance(model, PeftModel) and not merged


def adapted_copy(plain: Model, model: PeftModel) -> Model:
    """`plain` with the adapters of the PEFT model `model` in it, their values still to be loaded, in their dtypes."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin: Any = None
    for name, config in model.peft_config.items():
        config = copy.deepcopy(config)
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # some kinds of initialisation change the weights, or read data
        if twin is None:
            twin = get_peft_model(plain, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            twin.add_adapter(name, config, autocast_adapter_dtype=False)
    twin.base_model.set_adapter(model.active_adapters)
    core, original = twin.get_base_model(), language_model(model)
    for name, layer in core.named_modules():
        for kind in layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ():
            for parameter_name, parameter in getattr(layer, kind).named_parameters():
                dtype = original.get_parameter(f"{name}.{kind}.{parameter_name}").dtype
                parameter.data = parameter.data.to(dtype)
    return core.requires_grad_(False).eval()


def empty_copy(core: Model, dtype: torch.dtype) -> Model:
    """A model of the same architecture and device, in eval mode, with weights still to be loaded.

    Not a deep copy: that would take adapters, hooks and shards along.
    """
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(core.config)
    with no_init_weights(), torch.device(core.device):
        model = type(core)._from_config(config, dtype=dtype)
    model.tie_weights()  # part of the initialisation that was skipped
    return model.requires_grad_(False).eval()
