"""Talking to a server: every call has a deadline, and every failure names the server."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from align.errors import RolloutError
from align.rollout.identity import Fingerprints

SHOWN = 500  # characters of a server's own error that are shown
REPEATABLE = ("/collective_rpc", "/inference/v1/generate", "/v1/models", "/health")  # the same when it is done twice
HEALTH: dict[str, dict | None] = {"/health": None, "/collective_rpc": {"method": "check_health"}}


class ServerLost(RolloutError):
    """A server that does not answer, or has lost the weights that it had: it may come back."""


class Background:
    """An event loop in a thread of its own, so that callers need none and may have one (notebooks)."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._waited: set[Future] = set()  # for what callers wait
        self._thread = threading.Thread(target=self._loop.run_forever, name="align-rollout-server", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine) -> Any:
        """Its result. An interrupt here cancels it, which closes its connections; vLLM then drops the requests."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._waited.add(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._waited.discard(future)

    def interrupt(self) -> None:
        """Cancel what other threads wait for; `CancelledError` is raised there."""
        for future in list(self._waited):
            future.cancel()

    def close(self) -> None:
        self.interrupt()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def beside(action: Callable[[], None], seconds: float) -> None:
    """What this process does while servers answer, in a thread. Raises `RolloutError` after so many seconds: NCCL has
    no limit where it first meets the others. Then the thread is left behind, and nothing waits for it at the end."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result(error)

    def act() -> None:
        error: BaseException | None = None
        try:
            action()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=act, name="align-rollout-transfer", daemon=True).start()
    try:
        error = await asyncio.wait_for(ended, seconds)
    except TimeoutError:
        raise RolloutError(
            f"this process could not send weights within {seconds:g} seconds (rollout.timeout): a server takes no part"
        ) from None
    if error is not None:
        raise error


def session() -> aiohttp.ClientSession:
    """Without a limit of connections, and without keeping them: a restarted server has closed them. aiohttp reads no
    proxy and no ~/.netrc from the environment, unless it is told to: the key goes to the server alone."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


@dataclass
class Server:
    """One server. parts: of each tensor, what its workers keep, in the order of the workers; dtype, device: of its
    arithmetic; gpus: of its workers (`align_describe`). longest: tokens of a prompt and its completion together.
    config: the model's there; empty before it is described."""

    url: str
    key: str = field(repr=False)
    timeout: float
    parts: dict[str, list] = field(default_factory=dict, repr=False)
    adapters: list[str] = field(default_factory=list, repr=False)  # layers that can have one
    max_num_seqs: int = 1
    longest: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    device: str = ""
    gpus: list[str | None] = field(default_factory=list, repr=False)

    @property
    def workers(self) -> int:
        return len(self.gpus)

    async def call(
        self,
        http: aiohttp.ClientSession,
        method: str,
        path: str,
        body: dict | None = None,
        seconds: float | None = None,
    ) -> Any:
        """The answer, read as JSON. Raises `ServerLost`, or `RolloutError` for what waiting would not mend."""
        status, kind, text = await self._answer(http, method, path, body, seconds or self.timeout)
        if status == 401:
            raise RolloutError(
                f"the rollout server {self.url} does not take the key of this run: give both the same "
                "(api_key_env or api_key_file)"
            )
        if status == 404:
            raise RolloutError(f"the rollout server {self.url} has no {path}: start it with `align serve`")
        if status < 400:
            with self.understood(path):
                return json.loads(text) if kind == "application/json" else text
        failure = f"the rollout server {self.url} answered {path} with status {status}: {text[:SHOWN]}"
        if status >= 500 and not await self._lives(http):
            raise ServerLost(
                f"{failure}. Its engine does not answer any more: it was killed, is being ended or has failed. Look "
                "into its output"
            )
        raise RolloutError(failure)

    async def _answer(
        self, http: aiohttp.ClientSession, method: str, path: str, body: dict | None, seconds: float
    ) -> tuple[int, str, str]:
        """Status, content type and text. Raises `ServerLost`. What may be done twice is asked once more where the
        connection breaks off, which is seen of servers that live, under load."""
        limit = aiohttp.ClientTimeout(total=None)  # that of both attempts is outside
        headers = {"Authorization": f"Bearer {self.key}"}
        attempts = 2 if path in REPEATABLE else 1
        try:
            async with asyncio.timeout(seconds):
                while True:
                    attempts -= 1
                    try:
                        async with http.request(
                            method, self.url + path, json=body, headers=headers, timeout=limit
                        ) as response:
                            return response.status, response.content_type, await response.text()
                    except aiohttp.ClientConnectorError:
                        raise
                    except aiohttp.ClientError:
                        if not attempts:
                            raise
        except TimeoutError as error:
            raise ServerLost(
                f"the rollout server {self.url} did not answer {path} within {seconds:g} seconds"
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise ServerLost(
                f"the rollout server {self.url} cannot be reached ({path}: {error}): start it with `align serve`; with "
                "rollout.on_engine_failure: wait a run waits for it"
            ) from error
        except aiohttp.ClientError as error:
            raise ServerLost(
                f"the rollout server {self.url} broke off the connection before it had answered {path} ({error}): look "
                "into its output. With rollout.on_engine_failure: wait a run waits for it"
            ) from error

    @contextmanager
    def understood(self, path: str) -> Iterator[None]:
        """`RolloutError` for an answer of another form than `align serve` of this version gives."""
        try:
            yield
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RolloutError(
                f"the rollout server {self.url} answered {path} with what this version cannot read ({error!r:.100}): "
                "start it with `align serve` of the same versions of align and vLLM as this run's"
            ) from error

    async def _lives(self, http: aiohttp.ClientSession) -> bool:
        """Whether its engine answers. One that is being ended says of itself that it is healthy until that is done."""
        try:
            answers = [
                await self._answer(http, "GET" if body is None else "POST", path, body, self.timeout)
                for path, body in HEALTH.items()
            ]
        except ServerLost:
            return False
        return all(status < 500 for status, *_ in answers)

    async def describe(self, http: aiohttp.ClientSession) -> None:
        """Learn what the server keeps of each tensor, and how much it takes. Raises `RolloutError` for one that cannot
        take weights."""
        answer = await self.call(http, "POST", "/collective_rpc", {"method": "align_describe"})
        with self.understood("/collective_rpc align_describe"):
            workers = answer["results"]
            for worker in workers:
                if worker["reason"] is not None:
                    raise RolloutError(
                        f"the rollout server {self.url} cannot take weights: {worker['reason']}; use vLLM in process"
                    )
            self.parts = {
                name: [part for worker in workers for part in worker["parts"][name]] for name in workers[0]["parts"]
            }
            self.max_num_seqs = min(worker["max_num_seqs"] for worker in workers)
            self.adapters, self.dtype, self.device = (workers[0][key] for key in ("adapters", "dtype", "device"))
            self.gpus = [worker["gpu"] for worker in workers]
            self.config = workers[0]["config"]
        models = await self.call(http, "GET", "/v1/models")
        with self.understood("/v1/models"):
            self.longest = models["data"][0]["max_model_len"]

    async def label(self, http: aiohttp.ClientSession, seconds: float | None = None) -> str:
        """Of the weights that the server's workers have. Its engine answers, so this also shows that it is alive."""
        return await self._labelled(http, [], seconds)

    async def name_weights(self, http: aiohttp.ClientSession, label: str) -> None:
        await self._labelled(http, [label], None)

    async def _labelled(self, http: aiohttp.ClientSession, arguments: list[str], seconds: float | None) -> str:
        answer = await self.call(
            http, "POST", "/collective_rpc", {"method": "align_label", "args": arguments}, seconds=seconds
        )
        with self.understood("/collective_rpc align_label"):
            first, *others = answer["results"]
            if not isinstance(first, str):
                raise TypeError(first)
            return first if all(label == first for label in others) else ""  # of workers that differ: nobody's

    async def fingerprints(
        self, http: aiohttp.ClientSession, names: list[str], adapter: dict[str, list[int]]
    ) -> Fingerprints:
        """Of these tensors in the memory of the workers, each in the order of `parts`. adapter: shapes of the matrices
        of the adapter, by name."""
        body = {"method": "align_fingerprints", "args": [names, adapter]}
        answer = await self.call(http, "POST", "/collective_rpc", body)
        with self.understood("/collective_rpc align_fingerprints"):
            workers = answer["results"]
            return {name: [one for worker in workers for one in worker[name]] for name in (*names, *adapter)}

    async def adapter_names(self, http: aiohttp.ClientSession) -> list[str]:
        """Of the adapters that it holds."""
        models = await self.call(http, "GET", "/v1/models")
        with self.understood("/v1/models"):
            return [model["id"] for model in models["data"] if model["parent"] is not None]
