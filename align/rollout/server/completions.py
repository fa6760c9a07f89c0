"""Completions from servers: which requests go where, the calls, and the watch on servers that have not answered."""

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace

import aiohttp

from align.errors import RolloutError
from align.rollout.server.client import Server, ServerLost
from align.rollout.types import Completion, OnDone, Request

MOST_SOCKETS = 4096  # of one process, whatever its limit of open files
FINAL_ONLY = 2  # of vLLM's RequestOutputKind: without it, vLLM 0.26 returns some of several samples only
BEATS = 4  # in `timeout` seconds, a server that makes completions is asked so often whether it lives


def pieces(request: Request, most: int) -> list[Request]:
    """The request with at most `most` samples at a time, as a server takes them; every sample keeps its seed."""
    found = []
    for start in range(0, request.params.n, most):
        params = replace(request.params, n=min(most, request.params.n - start))
        seed = None if request.seed is None else request.seed + start
        found.append(replace(request, params=params, seed=seed))
    return found


class Answers:
    """What the servers have answered of a call.

    asked: whole requests. most: samples of one `piece`. told: once about each request, when its last piece has come.
    """

    def __init__(self, asked: list[Request], most: int, told: OnDone | None = None):
        self.told = told
        self.pieces: list[Request] = []
        self.ranges: list[range] = []  # of the pieces of each request
        for request in asked:
            start = len(self.pieces)
            self.pieces += pieces(request, most)
            self.ranges.append(range(start, len(self.pieces)))
        self.of = [index for index, own in enumerate(self.ranges) for _ in own]  # the request of each piece
        self.found: dict[int, list[Completion]] = {}

    @property
    def left(self) -> list[int]:
        return [piece for piece in range(len(self.pieces)) if piece not in self.found]

    def take(self, piece: int, completions: list[Completion]) -> None:
        self.found[piece] = completions
        index = self.of[piece]
        if self.told is not None and all(other in self.found for other in self.ranges[index]):
            self.told(index, self.whole(index))

    def whole(self, index: int) -> list[Completion]:
        """The completions of a request."""
        return [sample for piece in self.ranges[index] for sample in self.found[piece]]


def balanced(requests: list[Request], indices: list[int], count: int) -> list[list[int]]:
    """Shares out requests by the tokens that they may take, the longest first, each to whom has least."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    size = {i: len(requests[i].prompt_ids) + requests[i].params.n * requests[i].params.max_tokens for i in indices}
    for index in sorted(indices, key=lambda i: -size[i]):
        place = loads.index(min(loads))
        shares[place].append(index)
        loads[place] += size[index]
    return shares


async def check_label(server: Server, http: aiohttp.ClientSession, label: str, seconds: float | None = None) -> None:
    """Raises `ServerLost` for a server that has lost its weights, `RolloutError` for one that another run has taken."""
    found = await server.label(http, seconds)
    if found == label:
        return
    check_not_taken(server, found, label.partition(":")[0])
    why = (
        "a push did not reach it whole"
        if found
        else "it was started anew; with rollout.on_engine_failure: wait a run gives them to it again"
    )
    raise ServerLost(f"the rollout server {server.url} has not got the weights of this run: {why}")


def check_not_taken(server: Server, found: str, run: str) -> None:
    """Raises `RolloutError` for a server whose label is that of another run than `run`."""
    if found and not found.startswith(run):
        raise RolloutError(
            f"the rollout server {server.url} has the weights of another run ({found.partition(':')[0]}): "
            "one server serves one run at a time"
        )


def sockets() -> int:
    """How many connections this process may hold open for completions, each of which takes one: half of its limit of
    open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_SOCKETS if soft == resource.RLIM_INFINITY else min(soft // 2, MOST_SOCKETS)


@dataclass(frozen=True)
class Call:
    """What all requests of a call share. label: of the weights. adapter: whether an adapter of that name makes them.
    salt: of `body_of`. limit: seconds for all. sockets: connections to one server at a time."""

    label: str
    salt: str
    adapter: bool
    limit: float
    sockets: int


async def completed(
    server: Server,
    http: aiohttp.ClientSession,
    requests: dict[int, Request],
    call: Call,
    done: Callable[[int, list[Completion]], None],
) -> None:
    """Send all requests; `done(index, completions)` as each is answered. All come from the weights `call.label`.

    While it waits, it asks the server's engine which weights it has: one that does not answer in `timeout` seconds is
    lost, however long completions take. The server always has what it decodes at a time, and as much to go on with.
    """
    label = call.label
    name = {"model": label} if call.adapter else {}
    gate = asyncio.Semaphore(max(1, min(2 * server.max_num_seqs, call.sockets)))
    await check_label(server, http, label)

    async def one(index: int, request: Request) -> None:
        body = {**body_of(request, call.salt), **name}
        async with gate:
            answer = await server.call(http, "POST", "/inference/v1/generate", body, call.limit)
        if (found := len(answer["choices"])) != request.params.n:
            raise RolloutError(f"the rollout server {server.url} gave {found} of {request.params.n} samples")
        if any(choice["finish_reason"] == "abort" for choice in answer["choices"]):
            await check_label(server, http, label)  # another run may have taken it
            raise ServerLost(
                f"the rollout server {server.url} broke completions off: it is being ended; with "
                "rollout.on_engine_failure: wait a run waits until it is back"
            )
        done(index, [completion(choice, request, server.url) for choice in answer["choices"]])

    async def watch() -> None:
        while True:
            await asyncio.sleep(server.timeout / BEATS)
            await check_label(server, http, label, server.timeout * (1 - 1 / BEATS))

    watcher = asyncio.create_task(watch())
    tasks = {asyncio.create_task(one(index, request)) for index, request in requests.items()}
    try:
        pending = tasks
        while pending:
            ended, pending = await asyncio.wait(pending | {watcher}, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
            pending = pending - {watcher}
    finally:
        for task in (watcher, *tasks):
            task.cancel()
        await asyncio.gather(watcher, *tasks, return_exceptions=True)
    await check_label(server, http, label)


def body_of(request: Request, salt: str) -> dict:
    """salt: keys and values are not shared with requests of another salt, so never with those of other weights."""
    params = request.params
    return {
        "token_ids": request.prompt_ids,
        "cache_salt": salt,
        "sampling_params": {
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "seed": request.seed,
            "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens,
            "stop_token_ids": list(request.stop_ids),
            "ignore_eos": True,  # of the configuration, which the request may not name
            "logprobs": None if params.greedy else 0,  # 0: of the drawn token only
            "detokenize": False,
            "output_kind": FINAL_ONLY,
        },
    }


def completion(choice: dict, request: Request, url: str) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise RolloutError(f"the rollout server {url} gave a request up ({choice['finish_reason']})")
    ids = choice["token_ids"]
    if request.params.greedy:
        return Completion(ids, None, choice["finish_reason"])
    return Completion(ids, [token["logprob"] for token in choice["logprobs"]["content"]], choice["finish_reason"])
