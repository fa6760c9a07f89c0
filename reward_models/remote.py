"""Rewards that a server computes."""

import functools
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit

import requests
import torch
from urllib3.util import Retry

from align.config.addresses import LOOPBACK
from align.config.secrets import expand, masked_text
from align.errors import ConfigError, RewardError
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.beside import Flight, Threads, run_all
from align.reward_models.deadlines import DeadlineExceeded, call_within
from align.reward_models.early import Early, EarlyPieces, at_once
from align.reward_models.rules import not_numbers

PASSING = (408, 425, 429, *range(500, 600))  # may be another answer soon; proxies have 5xx of their own (520 to 530)
LONGEST_WAIT = 30  # seconds between two attempts
WORDS = 2000  # characters of a server's own error that are shown


class Asking(TypedDict, total=False):
    """How a server is asked: the options of `JsonServer`."""

    headers: dict[str, str] | None
    concurrency: int
    timeout: float
    retries: int
    backoff: float


class AskingForScores(Asking, total=False):
    """The options of `ScoreServer`."""

    batch_size: int


class JsonServer:
    """A server that answers JSON posted to it. `what` names it in errors.

    No answer within `timeout`, an answer that breaks off, no connection and a passing failure (408, 425, 429, 5xx) are
    tried again, at once and then after 2, 4, 8 ... times `backoff` seconds, or when the server says (Retry-After), all
    of it within a deadline. Whatever is wrong in the end is a `RewardError`.

    Args:
        url: where to post, `${NAME}` standing for an environment variable.
        headers: of every request; `$NAME` in a value stands for that environment variable. Default: none.
        concurrency: requests in flight at most (4).
        timeout: seconds to wait for a connection, and then for the answer (60).
        retries: further attempts (5). backoff: seconds (0.5).
    """

    load: tuple[str, ...] = ("concurrency",)  # what a server that is too slow wants lowered
    elsewhere: tuple[str, ...] = (  # of `align.modeling.fingerprint.mark`
        "url", "shown", "session", "concurrency", "timeout", "retries", "backoff", "deadline",
    )  # fmt: skip

    def __init__(
        self,
        url: str,
        what: str,
        *,
        headers: dict[str, str] | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
    ):
        self.url = expand(url, f"{what}: url")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{what}: url must be http://... or https://..., got {masked_text(url)!r}")
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without secrets
        self.route = parts.path
        check_whole(what, concurrency=(concurrency, 1), retries=(retries, 0))
        if not timeout > 0 or backoff < 0:
            raise ConfigError(f"{what}: timeout must be > 0 and backoff >= 0, got {timeout} and {backoff}")
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        waits = sum(min(backoff * 2**attempt, LONGEST_WAIT) for attempt in range(1, retries + 1))
        self.deadline = (retries + 1) * 2 * timeout + 2 * waits + LONGEST_WAIT  # a connection and an answer, each time
        retry = Retry(
            total=retries,
            backoff_factor=backoff,
            backoff_max=LONGEST_WAIT,
            status_forcelist=PASSING,
            allowed_methods=None,  # scoring changes nothing, so a POST may be sent again
            raise_on_status=False,
        )
        self.session = requests.Session()
        self.session.headers.update(
            {key: expand(str(value), f"{what}: header {key}") for key, value in (headers or {}).items()}
        )
        if parts.hostname in LOOPBACK:  # a proxy of the environment does not reach this machine's own servers
            self.session.trust_env = False
            self.session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        if "Authorization" in self.session.headers and "@" not in parts.netloc:
            self.session.auth = lambda request: request  # else requests puts the password of ~/.netrc in its place
        adapter = requests.adapters.HTTPAdapter(max_retries=retry, pool_maxsize=concurrency)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)

    def each(self, function: Callable[[Any], Any], items: Iterable) -> list:
        """function(item) of all items, in order, `concurrency` at a time."""
        return run_all(Threads(self.concurrency), [functools.partial(function, item) for item in items])

    def ask(self, content: dict | None, where: str, url: str | None = None) -> Any:
        """The JSON that the server answers to `content`, or to GET where that is None. RewardError, beginning with
        `where`, for whatever is wrong. url: of another route of the server."""
        try:
            answer = call_within(self.deadline, functools.partial(self._send, content, url or self.url))
        except DeadlineExceeded:
            raise RewardError(
                f"{where}: no whole answer within {self.deadline:g} s, all attempts together. The server sends it in "
                "drops, or is stuck: look into its log"
            ) from None
        except (requests.exceptions.InvalidJSONError, TypeError) as error:  # of what is to be sent
            raise RewardError(
                f"{where}: what the server is to be sent is no JSON ({error}): dates, bytes and NaN are none. Write "
                "them as text, or leave that column out"
            ) from error
        except requests.RequestException as error:
            raise RewardError(f"{where}: {self._no_answer(error)}") from error
        if answer.status_code != 200:
            again = f", and so it did {self.retries + 1} times" if answer.status_code in PASSING else ""
            raise RewardError(
                f"{where}: the server answered {answer.status_code} {answer.reason}{again}: {said(answer)}. "
                f"{self.remedy(answer.status_code)}"
            )
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            raise RewardError(f"{where}: the answer is no JSON: {answer.text[:200]!r}") from error
        except (ValueError, RecursionError) as error:
            what = "a number of thousands of digits, or lists within lists without end"
            raise RewardError(f"{where}: the answer holds {what}: {answer.text[:200]!r}") from error

    def remedy(self, status: int) -> str:
        """What to do about an answer of another status than 200."""
        if status in (401, 403):
            return "Its key is missing or wrong: api_key_file names its file, or headers has it"
        return "Look into its log"

    def _send(self, content: dict | None, url: str) -> requests.Response:
        """The session repeats what has no answer; an answer that breaks off is repeated here."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2**attempt, LONGEST_WAIT))
            try:
                method = "GET" if content is None else "POST"
                return self.session.request(method, url, json=content, timeout=self.timeout, allow_redirects=False)
            except requests.exceptions.ChunkedEncodingError as error:
                broken = error
        raise broken

    def _no_answer(self, error: requests.RequestException) -> str:
        tried = f"tried {self.retries + 1} times"
        if "timed out" in str(error).lower():
            sizes = " or ".join(f"{name} ({getattr(self, name)})" for name in self.load)
            return (
                f"no answer within {self.timeout:g} s, {tried}. The server is too slow or stuck: raise timeout, or "
                f"lower {sizes}"
            )
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            return f"the answer broke off, {tried}. Look into the server's log: it may have died or been restarted"
        reason = masked_text(str(getattr(error.args[0], "reason", error.args[0]) if error.args else error))
        return f"no connection, {tried} ({reason}). Start the server, or fix the url"


def said(answer: requests.Response) -> str:
    """What a server says of its failure: the `error` of a JSON object, as `align serve --reward` and vLLM give it and
    as whole as it may be read, else the beginning of the answer."""
    try:
        error = answer.json()["error"]
        error = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError, RecursionError):
        error = None
    return repr(error[:WORDS] if isinstance(error, str) and error else answer.text[:200])


def check_whole(what: str, **given: tuple[int, int]) -> None:
    """Options by name with their least value. ConfigError for what is no whole number, or below it."""
    for key, (value, least) in given.items():
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{what}: {key} must be a whole number of at least {least}, got {value!r}")


class ScoreServer(JsonServer, Reward):
    """A server that gives every completion one finite number. Whatever is wrong in the end is an error that names the
    rows; nothing is made up. A subclass reads the scores from an answer.

    Args:
        url, headers, concurrency, timeout, retries, backoff: of `JsonServer`. name: in metrics and errors.
        batch_size: completions per request (64).
    """

    load = ("batch_size", "concurrency")

    def __init__(self, url: str, *, name: str, batch_size: int = 64, **of_server: Unpack[Asking]):
        self.name = name
        super().__init__(url, f"reward {name!r}", **of_server)
        check_whole(f"reward {name!r}", batch_size=(batch_size, 1))
        self.batch_size = batch_size

    @abstractmethod
    def read(self, answer: Any, where: str) -> list:
        """The scores in an answer. RewardError, beginning with `where`, for what is no such answer."""

    @abstractmethod
    def _ready(self, batch: RewardBatch) -> None:
        """Before anything is sent; its prompts and columns are there."""

    @abstractmethod
    def _content(self, part: RewardBatch) -> dict:
        """What is sent about some completions."""

    def _output(self, scores: torch.Tensor) -> RewardOutput:
        """scores: float64 [B]."""
        return RewardOutput(scores.float())

    def begin(self, batch: RewardBatch, *, user_code: bool) -> Early:
        return self._early(batch.copied())

    def _score(self, batch: RewardBatch) -> RewardOutput:
        return at_once(self._early(batch))

    def _early(self, batch: RewardBatch) -> Early:
        self._ready(batch)
        parts = [range(i, min(i + self.batch_size, len(batch))) for i in range(0, len(batch), self.batch_size)]

        def work(number: int, rows: Sequence[int]) -> list[Callable[[], list[float]]]:
            return [functools.partial(self._request, self._content(batch.select(rows)), batch, rows)]

        def join(flight: Flight) -> RewardOutput:
            scores = [score for part in flight.results() for score in part]
            return self._output(torch.tensor(scores, dtype=torch.float64))

        return EarlyPieces(batch, parts, Flight(Threads(self.concurrency)), work, join)

    def _request(self, content: dict, batch: RewardBatch, indices: Sequence[int]) -> list[float]:
        where = f"reward {self.name!r} at {self.shown}, {batch.row_names(indices)}"
        scores = self.read(self.ask(content, where), where)
        if len(scores) != len(indices):
            raise RewardError(f"{where}: {len(scores)} scores came back for {len(indices)} completions. Fix the server")
        bad = not_numbers(scores)
        if bad:
            raise RewardError(
                f"reward {self.name!r} at {self.shown}: the score is {scores[bad[0]]!r:.80} for "
                f"{batch.row_names([indices[i] for i in bad])}; every completion needs a finite number. Fix the server"
            )
        return [float(score) for score in scores]


class RemoteReward(ScoreServer):
    """A server that is sent `{"prompts": [...], "completions": [...], "columns": {...}}` as JSON by POST, in training
    with `"ended": [...]`, and answers `{"scores": [...]}`, one finite number per completion.

    How it is asked: `JsonServer`. Nothing is sent before the first completions are scored.

    Args:
        url, name, headers, batch_size, concurrency, timeout, retries, backoff: of `ScoreServer`.
        columns: names of the dataset's columns to send along.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "remote",
        columns: list[str] | tuple[str, ...] = (),
        **of_server: Unpack[AskingForScores],
    ):
        self.columns = tuple(columns)
        super().__init__(url, name=name, **of_server)

    def _ready(self, batch: RewardBatch) -> None:
        missing = [column for column in self.columns if column not in batch.columns]
        if missing:
            raise RewardError(
                f"reward {self.name!r}: the dataset has no column {', '.join(missing)} to send (it has "
                f"{', '.join(sorted(batch.columns)) or 'none'})"
            )

    def _content(self, part: RewardBatch) -> dict:
        return {
            "prompts": part.prompts,
            "completions": part.completions,
            "columns": {name: part.columns[name] for name in self.columns},
            **({} if part.ended is None else {"ended": part.ended}),
        }

    def read(self, answer: Any, where: str) -> list:
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise RewardError(f"{where}: the answer is not {{'scores': [...]}}: {str(answer)[:200]!r}")
        return scores
