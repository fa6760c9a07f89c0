"""Rewards that a classifier gives on a vLLM server."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import urlsplit

import torch

from align.errors import ConfigError, RewardError
from align.modeling.adapters import is_adapter
from align.modeling.load import load_tokenizer
from align.modeling.pretrained import check_one_label, from_pretrained
from align.modeling.score_head import reads_end_token
from align.reward_models.base import RewardBatch, RewardOutput
from align.reward_models.normalizer import choose_normalizer
from align.reward_models.remote import AskingForScores, ScoreServer
from align.reward_models.rules import not_numbers
from align.reward_models.sequences import SequenceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REMEDIES = {
    401: "Its key is missing or wrong: set api_key_file, or headers",
    404: "Fix the url, or start a server of classifiers there: `vllm serve MODEL --runner pooling`",
}

KNOWN, TOKENS, PRIME = 8, 8, 7919  # sequences by which a model is known again, their tokens, and what these are apart
SAME = 0.1  # of the length of the vector of their scores: bfloat16 moves it by hundredths, beside other neighbours


def known_sequences(vocabulary: int) -> list[list[int]]:
    """[KNOWN, TOKENS] ids below `vocabulary`."""
    return [[(PRIME * (TOKENS * row + place + 1)) % vocabulary for place in range(TOKENS)] for row in range(KNOWN)]


class VllmReward(ScoreServer):
    """The scores that `ClassifierReward` gives for a model, from a server that `vllm serve MODEL --runner pooling`
    started: the same token ids are sent, and the output is read before any activation function.

    The server is asked for its models, once, before the first completions are scored or their room is checked: vLLM
    wants its key there, and not where it classifies. Then it scores a few fixed sequences, and again beside every
    request: a server that was started anew with another model has other scores for them, whatever its name. A resumed
    run compares them with those that the run had before (`check_as_before`).

    Args:
        url: of the server, http://localhost:8000 say; its routes may stand behind it.
        path: folder or hub name of the model that is served, for its tokenizer, config and normaliser.
        model: the name that the server knows it by; None where it serves one.
        policy_tokenizer, normalize, max_length: of `ClassifierReward`.
        name: default: the folder's. headers, batch_size, concurrency, timeout, retries, backoff: of `ScoreServer`.
    """

    elsewhere = (*ScoreServer.elsewhere, "route", "listing", "path", "model", "known")

    def __init__(
        self,
        url: str,
        path: str | Path,
        *,
        model: str | None = None,
        name: str | None = None,
        policy_tokenizer: "PreTrainedTokenizerBase | None" = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        **of_server: Unpack[AskingForScores],
    ):
        from transformers import AutoConfig

        super().__init__(url, name=name or Path(path).name, **of_server)
        parts = urlsplit(self.url)
        base = parts.path.rstrip("/").removesuffix("/classify").removesuffix("/v1")
        self.url, self.listing = (parts._replace(path=base + route).geturl() for route in ("/classify", "/v1/models"))
        if is_adapter(path):
            raise ConfigError(
                f"reward {self.name!r}: {path} is an adapter, and vLLM serves its whole model: `align export` it, then "
                "serve and name that folder"
            )
        check_one_label(str(path), {})
        config = from_pretrained(AutoConfig, str(path), "reward model")
        self.path, self.model = str(path), model
        self.normalizer = choose_normalizer(self.name, str(path), normalize)
        self.tokenizer = load_tokenizer(path)
        vocabulary = config.get_text_config().vocab_size
        self.sequences = known_sequences(vocabulary)
        self.known: torch.Tensor | None = None  # the scores that they had when the server was first asked
        self.encoder = SequenceEncoder(
            self.name,
            self.tokenizer,
            policy_tokenizer=policy_tokenizer,
            vocabulary=vocabulary,
            max_length=max_length,
            whole_turn=not reads_end_token(config),
        )

    @property
    def normalized(self) -> bool:
        return self.normalizer is not None

    def check_room(self, prompt: int, completion: int, *, conversational: bool) -> None:
        self.connect()
        self.encoder.check_room(prompt, completion, conversational=conversational)

    def connect(self) -> None:
        """Ask the server for its models, unless that has been done: for the name of its one, and for what it takes."""
        if self.known is not None:
            return
        where = f"reward {self.name!r} at {self.shown}"
        cards = served_models(self.ask(None, where, self.listing), where)
        lengths = {name: card.get("max_model_len") for name, card in cards.items()}  # unknown of adapters
        if self.model is None and len(lengths) == 1:
            (self.model,) = lengths
        if self.model is None or self.model not in lengths:
            wrong = "`model` has to name one of them" if self.model is None else f"`model` names {self.model!r}"
            raise RewardError(f"{where}: the server has the models {', '.join(lengths) or '(none)'}, and {wrong}")
        longest, given = lengths[self.model], self.encoder.max_length
        if longest is not None and given is not None and given > longest:
            raise RewardError(
                f"{where}: max_length is {given}, and the server takes {longest} tokens: lower it, or start the server "
                "with a larger --max-model-len"
            )
        served = str(cards[self.model].get("root"))
        if Path(served).is_dir() and Path(self.path).is_dir() and not Path(served).samefile(self.path):
            logger.warning(
                "%s: the server's model is %s, and `path` is %s: unless that is a copy, correct the url or the path",
                where,
                served,
                self.path,
            )
        self.encoder.longest = longest
        self.known = known_scores(self._scores(self.ask(self._asked([]), where), where), where)

    def _ready(self, batch: RewardBatch) -> None:
        self.connect()

    def _output(self, scores: torch.Tensor) -> RewardOutput:
        return RewardOutput((self.normalizer(scores) if self.normalizer else scores).float())

    def _content(self, part: RewardBatch) -> dict:
        return self._asked([prompt + completion for prompt, completion in self.encoder(part)])

    def _asked(self, sequences: list[list[int]]) -> dict:
        return {"model": self.model, "input": [*sequences, *self.sequences], "use_activation": False}

    def read(self, answer: Any, where: str) -> list:
        scores = self._scores(answer, where)
        assert self.known is not None  # `_ready` has connected
        again = known_scores(scores[-KNOWN:], where)
        self._check_same(self.known, again, where, "when this run first asked it", "then resume the run")
        return scores[:-KNOWN]

    def check_as_before(self, before: list[float] | None) -> None:
        """Of a resumed run. RewardError where the server has another model now. before: `known` of the run that is
        resumed, None if it never asked."""
        if before is None:
            return
        self.connect()
        where, known = f"reward {self.name!r} at {self.shown}", torch.tensor(before, dtype=torch.float64)
        assert self.known is not None
        self._check_same(
            known, self.known, where, "the run that is resumed had", "or allow the change: resume_changes: [rewards]"
        )

    def _check_same(self, before: torch.Tensor, now: torch.Tensor, where: str, when: str, remedy: str) -> None:
        if not (now - before).norm() <= SAME * before.norm():
            raise RewardError(
                f"{where}: the server has another model than {when}: {KNOWN} fixed sequences had the scores "
                f"{listed(before)} and have {listed(now)}. Start it with the model of `path` ({self.path}) again, "
                + remedy
            )

    def _scores(self, answer: Any, where: str) -> list:
        found = answer.get("data") if isinstance(answer, dict) else None
        outputs = [item.get("probs") if isinstance(item, dict) else None for item in found or ()]
        if not isinstance(found, list) or not all(isinstance(output, list) for output in outputs):
            raise RewardError(f"{where}: the answer is not that of vLLM's /classify: {str(answer)[:200]!r}")
        labels = {len(output) for output in outputs if output is not None} - {1}
        if labels:
            raise RewardError(
                f"{where}: the model {self.model!r} on the server has {max(labels)} labels, and a reward model has "
                "one: serve the model of `path` there"
            )
        return [score for output in outputs for score in output or ()]

    def remedy(self, status: int) -> str:
        return REMEDIES.get(status) or super().remedy(status)


def known_scores(found: list, where: str) -> torch.Tensor:
    """Scores of `known_sequences` as [KNOWN] float64. RewardError for another number of them, and for what is none."""
    if len(found) != KNOWN or not_numbers(found):
        raise RewardError(f"{where}: {KNOWN} fixed sequences have the scores {found!s:.200}. Fix the server")
    return torch.tensor(found, dtype=torch.float64)


def listed(scores: torch.Tensor) -> str:
    return ", ".join(f"{score:.4g}" for score in scores.tolist())


def served_models(answer: Any, where: str) -> dict[str, dict]:
    """What vLLM's /v1/models says of each model, by its name."""
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise RewardError(f"{where}: the answer of /v1/models lists no models, fix the url: {str(answer)[:200]!r}")
    return {str(card["id"]): card for card in cards}
