"""DPO on whole rankings: the Plackett-Luce loss of lists of answers (Rafailov et al. 2023, arXiv 2305.18290, A.3).

A list goes through the loop for pairs as (its prompt, its best answer, all its others one after the other), so that
reference, cache and batches are those of pairs; what stands where says the column `lengths` (`align.data.ranked`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.data.formats import check_tokens, columns_of
from align.data.passes import numbered
from align.data.ranked import LISTS, RankedCollator, SharedRankedCollator, lists_of_two, tokenize_ranked
from align.data.sets import rows_of
from align.errors import ConfigError, DataError
from align.modeling.pairs import PairTokens
from align.objectives.pair_losses import PairLosses
from align.objectives.plackett_luce import listwise_losses
from align.trainers.core.trl_options import TrlDPOOptions
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.data import IDS, lengths_above_0, numbered_pairs
from align.trainers.pairs.micro_batches import PaddedPairs, SharedPrefixPairs
from align.trainers.pairs.preference import PreferenceTrainer


@dataclass
class ListwiseDPOConfig(TrlDPOOptions, PreferenceConfig):
    """Options of DPO on rankings, with TRL's names. Batch sizes count lists."""


class PaddedLists(RankedCollator, PaddedPairs):
    """Padded batches of lists, cut as those of pairs are."""


class SharedPromptLists(SharedRankedCollator, SharedPrefixPairs):
    """Batches of lists that share their prompts, cut as those of pairs are."""


class ListwiseDPOTrainer(PreferenceTrainer):
    """Train on ranked lists of two or more answers to a prompt; with two it is DPO.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: rows of `prompt`, `completions` and `scores` (docs/data.md), or preference pairs,
            which are lists of two; or either of them tokenised (`tokenize_ranked`, `tokenize_pairs`).
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        peft_config: trains an adapter.
    """

    _tag_names = ["align", "listwise_dpo"]
    paper = "Rafailov et al. 2023, arXiv 2305.18290, appendix A.3"
    args: ListwiseDPOConfig
    config_class = ListwiseDPOConfig
    columns = ("lengths",)
    padded, shared = PaddedLists, SharedPromptLists

    @staticmethod
    def read_rows(dataset, tokenizer, **options):
        """Ranked lists or pairs -> tokenised lists, all with as many lengths: 0 where there is no further answer."""
        columns = columns_of(dataset)
        if {*LISTS} <= columns:
            check_tokens(dataset, ("prompt_ids", *LISTS))
            _check_lists(dataset, options["max_length"])
            rows = dataset
        elif {*IDS} <= columns:
            rows = lists_of_two(numbered_pairs(dataset, tokenizer, **options))
        else:
            rows = tokenize_ranked(dataset, tokenizer, **options)
        lengths = rows["lengths"][:]
        most = max(map(len, lengths))
        padded = [[*own, *[0] * (most - len(own))] for own in lengths]
        rows = rows.remove_columns("lengths").add_column("lengths", padded)
        return numbered(rows)

    def _check_stream(self) -> None:
        raise ConfigError(
            "rankings are read whole (how long the longest list is decides the batches), and the rows are a stream: "
            "load them without streaming"
        )

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        assert reference is not None  # this method always has one
        lengths = batch["lengths"].long()
        logps, ref_logps = (answer_logps(tokens.logps, lengths) for tokens in (policy, reference))
        return listwise_losses(logps, ref_logps, lengths > 0, beta=self.args.beta)


def answer_logps(logps: Tensor, lengths: Tensor) -> Tensor:
    """[B, K], the sums over the tokens of each answer. logps: [2B, L], the best answers and then the others of each
    list one after the other. lengths: [B, K], in tokens, 0 behind the end of a list."""
    best, others = logps.chunk(2)
    ends = lengths[:, 1:].cumsum(-1)[:, None]
    places = torch.arange(others.shape[1], device=logps.device)[:, None]
    owned = (places < ends) & (places >= ends - lengths[:, None, 1:])  # [B, L, K - 1]; a scatter would add in any order
    sums = (others[..., None] * owned).sum(1)
    return torch.cat([best.sum(-1, keepdim=True), sums], dim=-1)


def _check_lists(dataset, max_length: int | None) -> None:
    """DataError for tokenised lists whose lengths are not those of their answers, or that are too long."""
    lengths_above_0(dataset, ("prompt_ids", *LISTS), "lists")
    for number, row in enumerate(rows_of(dataset, [IDS[0], *LISTS])):
        lengths = [length for length in row["lengths"] if length]
        if len(lengths) < 2 or lengths != row["lengths"][: len(lengths)]:
            raise DataError(
                f"tokenised list {number}: lengths are {row['lengths']}, and a list has two answers or more"
            )
        if (lengths[0], sum(lengths[1:])) != (len(row["chosen_ids"]), len(row["rejected_ids"])):
            raise DataError(f"tokenised list {number}: lengths {lengths} are not those of chosen_ids and rejected_ids")
        if max_length is not None and len(row["prompt_ids"]) + max(lengths) > max_length:
            raise DataError(
                f"tokenised list {number} has an answer that ends beyond max_length={max_length} with its prompt: "
                "tokenise the rows with this max_length"
            )
