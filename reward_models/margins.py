"""Margin rewards of preference pairs: scored once per dataset, kept on disk, read for every weight vector."""

import json
import logging
import os
import zlib
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.data.ending import end_ids, written_text
from align.distributed.disk import open_to_others, writing
from align.distributed.ranks import shared
from align.errors import ConfigError, RewardError
from align.modeling.fingerprint import fingerprint
from align.reward_models.base import Reward, RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.ensemble import by_normalizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PAIRS_AT_ONCE = 256
SIDES = ("chosen", "rejected")
COLUMNS = tuple(f"{side}_margin_rewards" for side in SIDES)
NOT_FOR_REWARDS = {"prompt", "row", "prompt_ids", *SIDES, *(f"{side}_ids" for side in SIDES), *COLUMNS}


class MarginRewards:
    """Rewards that are scored on both completions of tokenised pairs, and a folder that remembers the scores.

    A file of the folder belongs to one reward and one dataset: its name is made from the reward's `fingerprint`
    (weights, settings, code) and from every value of the rows, so that a change of either is a new file and the rest
    is reused.

    Args:
        reward: a `Reward`, a spec for `build_reward`, or a list of either; their names are the objectives' names.
        tokenizer: the policy's. folder: of the scores; None keeps nothing.
    """

    def __init__(self, reward: Any, tokenizer: "PreTrainedTokenizerBase", folder: str | Path | None):
        specs = list(reward) if isinstance(reward, (list, tuple)) else [reward]
        self.rewards: list[Reward] | None = [build_reward(spec, tokenizer=tokenizer) for spec in specs]
        self.names = [reward.name for reward in self.rewards]
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"two rewards have the same name in {self.names}: give each its own `name`")
        for reward in self.rewards:
            if reward.placed:
                raise ConfigError(
                    f"margin reward {reward.name!r} scores the pairs once, before the training, and is freed then: "
                    "leave ranks out, so that every process scores its share of them"
                )
            normalised = [reward.name] if getattr(reward, "normalized", False) else by_normalizer([reward])[1]
            if normalised:
                logger.warning(
                    "margin reward %s is normalised%s: it counts in standard deviations, not in units of the "
                    "Bradley-Terry model that the pairs follow. Use normalize: false unless that is meant",
                    reward.name,
                    "" if normalised == [reward.name] else f" ({', '.join(normalised)})",
                )
        self.tokenizer = tokenizer
        self.folder = None if folder is None else Path(folder)

    @cached_property
    def fingerprints(self) -> list[str | None]:
        """One per reward; None for a reward that has none, whose scores are then not kept."""
        found: list[str | None] = []
        for reward in self.rewards or ():
            try:
                found.append(fingerprint(reward))
            except RewardError as error:
                logger.warning("the scores of margin reward %s are not kept on disk: %s", reward.name, error)
                found.append(None)
        return found

    def free(self) -> None:
        """Free the reward models. Scores that are on disk can still be read."""
        if self.folder is not None and None not in self.fingerprints:
            self.rewards = None

    def add_to(self, dataset: "Dataset") -> "Dataset":
        """Tokenised pairs with the columns `chosen_margin_rewards` and `rejected_margin_rewards`, lists [M] each."""
        from datasets import Features, List, Value

        present = [column for column in COLUMNS if column in dataset.column_names]
        if present:
            raise ConfigError(f"the data has a column {present[0]!r} already: margin rewards are computed, remove it")
        rows = rows_fingerprint(dataset)
        scores = torch.stack([self._scores(number, dataset, rows) for number in range(len(self.names))], dim=-1)
        for column, values in zip(COLUMNS, scores.unbind(1), strict=True):
            feature = Features({column: List(Value("float32"), length=len(self.names))})[column]
            dataset = dataset.add_column(column, values.tolist(), feature=feature)
        return dataset

    def _scores(self, number: int, dataset: "Dataset", rows: str) -> Tensor:
        """[N, 2] of one reward: from the folder, or scored now, shared among the processes, and kept."""
        state, path = PartialState(), self._path(number, rows)
        there = shared(path is not None and path.exists())
        if there and path is not None:
            logger.info("margin reward %s: scores read from %s", self.names[number], path)
            return _read(path, len(dataset))
        if self.rewards is None:
            raise RewardError(
                f"margin reward {self.names[number]!r} has not scored these pairs, and its model was freed when the "
                "trainer was ready: pass all datasets when the trainer is made"
            )
        mine = range(state.process_index, len(dataset), state.num_processes)
        own = score_pairs(self.rewards[number], dataset.select(mine), self.tokenizer)
        parts = gather_object([(list(mine), own)])
        scores = torch.empty(len(dataset), 2)
        for indices, values in parts:
            scores[indices] = values
        if path is not None and state.is_main_process:
            _write(path, scores)
            logger.info("margin reward %s: scores of %d pairs kept in %s", self.names[number], len(dataset), path)
        state.wait_for_everyone()
        return scores

    def _path(self, number: int, rows: str) -> Path | None:
        if self.folder is None or self.fingerprints[number] is None:
            return None
        key = blake2b(f"{self.fingerprints[number]} {rows}".encode(), digest_size=8).hexdigest()
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.names[number])
        return self.folder / f"{name}-{key}.safetensors"


def score_pairs(reward: Reward, dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Scores [N, 2] (chosen, rejected), float32, of exactly the tokens that train.

    A completion that was cut at max_length is shown to the reward as what is left of it, in text too.
    """
    scores = torch.empty(len(dataset), 2)
    for start in range(0, len(dataset), PAIRS_AT_ONCE):
        rows = dataset[start : start + PAIRS_AT_ONCE]
        count = len(rows["prompt_ids"])
        batch = RewardBatch(
            prompts=(rows["prompt"] if "prompt" in rows else tokenizer.batch_decode(rows["prompt_ids"])) * 2,
            completions=[text for side in SIDES for text in _texts(rows, side, tokenizer)],
            prompt_ids=rows["prompt_ids"] * 2,
            completion_ids=rows["chosen_ids"] + rows["rejected_ids"],
            columns={name: values * 2 for name, values in rows.items() if name not in NOT_FOR_REWARDS},
            rows=rows["row"] * 2 if "row" in rows else None,
        )
        scores[start : start + count] = reward.score(batch).scores.reshape(2, count).T
    return scores


def _texts(rows: dict[str, list], side: str, tokenizer: "PreTrainedTokenizerBase") -> list:
    ids, ends = rows[f"{side}_ids"], end_ids(tokenizer)
    written: Sequence = rows.get(side) or [None] * len(ids)
    return [
        text if text is not None and tokens[-1] in ends else _decoded(tokens, text, tokenizer)
        for tokens, text in zip(ids, written, strict=True)
    ]


def _decoded(tokens: list[int], written: Any, tokenizer: "PreTrainedTokenizerBase") -> str | list[dict]:
    text = written_text(tokenizer, tokens, stopped=False)
    return [{**written[-1], "content": text}] if isinstance(written, list) else text


def rows_fingerprint(dataset: "Dataset") -> str:
    """A digest of all rows: token ids and every other column, since a reward may look at any."""
    digest = blake2b(json.dumps(sorted(dataset.column_names)).encode(), digest_size=16)
    plain = dataset.with_format(None)
    for start in range(0, len(plain), 1000):
        rows = plain[start : start + 1000]
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _write(path: Path, scores: Tensor) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several runs may share the folder
        save_file({"scores": scores}, temporary, metadata={"crc32": _checksum(scores)})
        temporary.replace(path)
        open_to_others(path.parent)


def _checksum(scores: Tensor) -> str:
    return str(zlib.crc32(scores.contiguous().numpy().tobytes()))


def _read(path: Path, count: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            scores, written = file.get_tensor("scores"), (file.metadata() or {}).get("crc32")
    except Exception as error:  # safetensors has no public error class of its own
        raise RewardError(f"{path} cannot be read ({error}): delete it, and the scores are computed again") from error
    if written is None:
        raise RewardError(
            f"{path} has no checksum (an older version wrote it): delete it, and the scores are computed again"
        )
    if written != _checksum(scores):
        raise RewardError(f"{path} does not match its checksum: delete it, and the scores are computed again")
    if scores.shape != (count, 2) or not scores.isfinite().all():
        raise RewardError(f"{path} does not hold {count} pairs of finite scores: delete it")
    return scores
