"""The reference of a trainer on pairs: a model, the policy with its adapter off, or log-probs kept on disk."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from align.errors import ConfigError, TrainingError
from align.modeling.load import Reference, load_policy, reference_of
from align.modeling.logprobs import language_model
from align.modeling.pairs import PairTokens, completions, pair_tokens
from align.trainers.core.reference_checks import ReferenceChecks
from align.trainers.pairs.data import IDS
from align.trainers.pairs.reference_cache import mark_of, weights_mark, with_cached_reference


class PairReference(ReferenceChecks):
    """Makes and asks `self.reference`, which is None for a loss without one and once its log-probs are on disk."""

    reference: Reference | None
    cache_marks: dict[str, str]  # of the cached log-probs, by dataset (train, eval)

    def load_reference(self, ref_model: str | nn.Module | None) -> nn.Module | None:
        """The reference that is named, as the policy is loaded."""
        core = language_model(self.model)
        if isinstance(ref_model, str):
            return load_policy(ref_model, dtype=core.dtype, attn_implementation=core.config._attn_implementation)
        return ref_model

    def set_reference(self, ref_model: nn.Module | None) -> None:
        """Before the first step, while the policy is what it starts as."""
        self.cache_marks = {}
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.precompute_ref_log_probs and ref_model is None and not sharded:
            # The policy has not been trained yet: it is its own reference, and no copy is made.
            self.reference = Reference(self.model, adapter_off=isinstance(self.model, PeftModel))
            self._weights_mark = weights_mark(self.model, frozen_only=self.reference.adapter_off)
            return
        self.reference = reference_of(self.model, ref_model)
        if self.args.precompute_ref_log_probs:
            if self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3:
                raise ConfigError("precompute_ref_log_probs does not work under ZeRO-3: use fsdp2, or a live reference")
            # where weights are sharded, only the main process may have them all
            mark = weights_mark(self.reference.model, frozen_only=self.reference.adapter_off)
            self._weights_mark = broadcast_object_list([mark])[0]
        self.reference.prepare(self.accelerator)

    def with_cached_reference(self, dataset, name: str):
        if self.reference is None:
            raise ConfigError(
                "precompute_ref_log_probs: the reference is not kept after set-up, so other pairs than the trainer's "
                "own eval_dataset cannot be evaluated"
            )
        args = self.args
        precision = f"{self.accelerator.mixed_precision} {language_model(self.model).dtype}"
        self.cache_marks[name] = mark_of(dataset, self._weights_mark, precision)
        folder = Path(args.ref_log_probs_dir or Path(args.output_dir) / "ref_log_probs")
        pairs = args.precompute_ref_batch_size or (args.train_batch_size if name == "train" else args.eval_batch_size)
        return with_cached_reference(
            dataset, folder, name, self.cache_marks[name], lambda: self._reference_of_all(dataset, name, pairs)
        )

    def _reference_of_all(self, dataset, name: str, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of all tokens of chosen and of rejected, row after row; the processes share the rows."""
        world, rank = self.args.world_size, self.args.process_index
        found, window = {}, 64 * pairs * world
        progress = tqdm(
            total=len(dataset),
            desc=f"Reference log-probs of the {name} pairs",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        for start in range(0, len(dataset), window):
            part = dataset.select(range(start, min(start + window, len(dataset)))).to_list()
            batches = self.micro_batches([{**row, "number": start + i} for i, row in enumerate(part)], pairs)
            # all make as many batches: those that gather weights wait for one another
            for first in range(0, len(batches), world):
                batch = batches[min(first + rank, len(batches) - 1)]
                values = self._live_reference(self._prepare_inputs(self.collate(batch))).logps.float().cpu().numpy()
                for row, *both in zip(batch, values[: len(batch)], values[len(batch) :], strict=True):
                    found[row["number"]] = [v[: len(row[ids])].copy() for v, ids in zip(both, IDS[1:], strict=True)]
            progress.update(len(part))
        progress.close()
        everything = {i: values for part in gather_object([found]) for i, values in part.items()}
        return tuple(np.concatenate([everything[i][side] for i in range(len(dataset))]) for side in (0, 1))

    def reference_tokens(self, batch: dict[str, Tensor]) -> PairTokens:
        """The reference's tokens of a batch, without gradient: computed, or as they were computed beforehand."""
        if "ref_logps" in batch:
            return PairTokens(batch["ref_logps"], completions(batch).mask)
        with self.phase("reference") if self.model.training else nullcontext():
            return self._live_reference(batch)

    def _live_reference(self, batch: dict[str, Tensor]) -> PairTokens:
        with self.reference.active() as model, self.accelerator.autocast():
            return pair_tokens(model, batch, chunk_size=self.args.chunk_size)

    def extra_state(self) -> dict:
        if self.reference is not None:
            return {"reference": self.reference_probe()}
        return {"reference": self.cache_marks.get("train")}

    def restore_state(self, state: dict) -> None:
        """Called before the first step of a resumed run, with what `extra_state` returned when it was saved."""
        self.check_reference()

    def check_reference(self) -> None:
        before = self.resume_state["reference"]
        if isinstance(before, Tensor) and self.reference is not None:
            super().check_reference()
        elif before != self.cache_marks.get("train"):
            raise TrainingError(
                "the pairs or the reference are not those of the run that is resumed: start the trainer with the same "
                "data, model and precompute_ref_log_probs as at first"
            )
