"""SRPO: one policy that answers, and that improves an answer it is shown, from preference pairs (Choi et al. 2024,
arXiv 2406.01660).

A pair is read in three contexts: its prompt, and two prompts that show one of its answers and ask for a better one
(`align.data.revisions`). In the loop for pairs these are three pairs of prompts with the same two answers. The losses
are in `align.objectives.srpo`.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from align.data.formats import check_tokens, columns_of
from align.data.limits import lengths_of
from align.data.revisions import check_template, revision_prompt
from align.data.tokenize import tokenize_prompts
from align.errors import ConfigError, DataError
from align.modeling.pairs import PairTokens
from align.objectives.pair_losses import PairLosses
from align.objectives.srpo import RevisionRatios, srpo_losses
from align.trainers.core.trl_options import TrlDPOOptions
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.data import IDS, lengths_above_0, numbered_pairs
from align.trainers.pairs.micro_batches import PaddedPairs, Rows, SharedPrefixPairs
from align.trainers.pairs.preference import PreferenceTrainer

logger = logging.getLogger(__name__)

REVISIONS = ("revise_chosen_ids", "revise_rejected_ids")
"""Of the prompts that show the chosen and the rejected answer."""
CONTEXTS = (IDS[0], *REVISIONS)


@dataclass
class SRPOConfig(TrlDPOOptions, PreferenceConfig):
    """Options of SRPO. The paper's values of `improver_weight`, `beta` and `revision_template` are not known to us."""

    improver_weight: float = field(
        default=0.5, metadata={"help": "Share of the improver's loss in the sum, the generator's has the rest."}
    )
    revision_template: str | None = field(
        default=None,
        metadata={
            "help": "How a better answer is asked for: of texts a template with {prompt} and {answer}, of "
            "conversations the user's turn after the answer. Default: align.data.revisions."
        },
    )
    max_revision_length: int | None = field(
        default=None,
        metadata={"help": "Such a prompt and an answer to it together, tokens; longer ones are bad rows. Default: "
        "2 x max_length."},
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs: the cache holds a pair's log-probs after its prompt, and SRPO looks at them "
                "in three contexts: leave it out",
                key="precompute_ref_log_probs",
            )
        if self.max_revision_length is None and self.max_length is not None:
            self.max_revision_length = 2 * self.max_length


def in_three_contexts(rows: Rows) -> Rows:
    """B pairs -> 3B: after their prompts, then after those of `REVISIONS`."""
    return [{**row, IDS[0]: row[context]} for context in CONTEXTS for row in rows]


def of_rows(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A batch of `in_three_contexts` whose column `row` numbers each of the `count` pairs once."""
    return {**batch, "row": batch["row"][:count]}


class PaddedContexts(PaddedPairs):
    """All rows padded to the longest."""

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        return of_rows(super().__call__(in_three_contexts(rows)), len(rows))

    def tokens_of(self, row: dict) -> int:
        longest = max((row[context] for context in CONTEXTS), key=len)
        return len(CONTEXTS) * super().tokens_of({**row, IDS[0]: longest})


class SharedContexts(SharedPrefixPairs):
    """The two answers share each of their contexts."""

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        return of_rows(super().__call__(in_three_contexts(rows)), len(rows))

    def tokens_of(self, row: dict) -> int:
        return sum(map(super().tokens_of, in_three_contexts([row])))


class SRPOTrainer(PreferenceTrainer):
    """Train on preference pairs.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: preference pairs in TRL's formats (docs/data.md), or tokenised ones with
            `prompt_ids`, `chosen_ids`, `rejected_ids` and `REVISIONS`.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        peft_config: trains an adapter.
    """

    _tag_names = ["align", "srpo"]
    paper = "Choi et al. 2024, arXiv 2406.01660"
    args: SRPOConfig
    config_class = SRPOConfig
    token_columns = REVISIONS
    padded, shared = PaddedContexts, SharedContexts

    def _check_stream(self) -> None:
        raise ConfigError(
            "SRPO makes two more prompts of each pair before training, and the rows are a stream: load them without "
            "streaming"
        )

    def read_rows(self, dataset, tokenizer, **options):
        """Pairs -> tokenised pairs with the columns of `REVISIONS`, without those that are too long."""
        if {*IDS, *REVISIONS} <= columns_of(dataset):
            check_tokens(dataset, REVISIONS)
            lengths_above_0(dataset, REVISIONS)
            rows = numbered_pairs(dataset, tokenizer, **options)
        elif {*IDS} <= columns_of(dataset):
            raise DataError(f"tokenised pairs need the columns {' and '.join(REVISIONS)} too: pass the texts")
        else:
            rows = with_revisions(
                numbered_pairs(dataset, tokenizer, **options),
                tokenizer,
                self.args.revision_template,
                num_proc=self.args.dataset_num_proc,
            )
        return within(rows, self.args.max_revision_length, self.args.max_bad_share)

    @property
    def longest_row(self) -> int | None:
        return self.args.max_revision_length

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        assert reference is not None  # this method always has one
        ratios = revision_ratios((policy.logps - reference.logps).sum(-1))
        return srpo_losses(ratios, beta=self.args.beta, improver_weight=self.args.improver_weight)


def revision_ratios(log_ratios: Tensor) -> RevisionRatios:
    """log_ratios: [6B], of a batch of `in_three_contexts`: the chosen answers in the three contexts, then the rejected
    ones."""
    (chosen, again, after_rejected), (rejected, after_chosen, rejected_again) = log_ratios.view(2, len(CONTEXTS), -1)
    return RevisionRatios(
        chosen=chosen,
        rejected=rejected,
        chosen_again=again,
        rejected_after_chosen=after_chosen,
        chosen_after_rejected=after_rejected,
        rejected_again=rejected_again,
    )


def with_revisions(pairs, tokenizer, template: str | None, *, num_proc: int | None = None):
    """Tokenised pairs with their texts -> the same with the columns of `REVISIONS`. ConfigError for a template that is
    of another form than the rows, DataError for answers that are no single turn."""
    from datasets import concatenate_datasets

    conversational = not isinstance(pairs[0]["prompt"], str)
    if template is not None:
        check_template(template, conversational=conversational)
    kept = [name for name in ("row", "chat_template_kwargs") if name in pairs.column_names]
    columns = [pairs]
    for name, column in zip(("chosen", "rejected"), REVISIONS, strict=True):

        def shown(row: dict[str, Any], name: str = name) -> dict[str, Any]:
            if conversational and len(row[name]) != 1:
                raise DataError(
                    f"row {row['row']}: {name} has {len(row[name])} turns, and SRPO improves answers of one"
                )
            return {"prompt": revision_prompt(row["prompt"], row[name], template)}

        prompts = pairs.select_columns([*kept, "prompt", name]).map(shown, remove_columns=[name], num_proc=num_proc)
        made = tokenize_prompts(
            prompts, tokenizer, max_prompt_length=None, source=f"the prompts that show {name}", num_proc=num_proc
        )
        columns.append(made.select_columns(["prompt_ids"]).rename_column("prompt_ids", column))
    return concatenate_datasets(columns, axis=1)


def within(pairs, longest: int | None, max_bad_share: float):
    """The pairs that have at most `longest` tokens after each of their prompts; DataError where more than
    `max_bad_share` of them have not, or none is left."""
    if longest is None:
        return pairs
    lengths = {column: lengths_of(pairs, column) for column in (*REVISIONS, *IDS[1:])}
    total = np.maximum(*(lengths[c] for c in REVISIONS)) + np.maximum(*(lengths[c] for c in IDS[1:]))
    bad = np.flatnonzero(total > longest)
    if not len(bad):
        return pairs
    text = f"{len(bad)} of {len(pairs)} pairs have more than max_revision_length={longest} tokens with an answer shown"
    if len(bad) > max_bad_share * len(pairs) or len(bad) == len(pairs):
        rows = [pairs[int(index)]["row"] for index in bad[:10]]
        raise DataError(f"{text} (rows {rows} ...): raise it, or max_bad_share, which is {max_bad_share}")
    logger.warning("%s: they are left out", text)
    return pairs.select(np.flatnonzero(total <= longest))
