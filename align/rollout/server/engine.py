"""The rollout engine behind which vLLM servers stand."""

import asyncio
import logging
import secrets
import shutil
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from align.config.server_key import KEY_VARIABLE, read_key
from align.distributed.ranks import anywhere, by_first, in_all, is_first, raise_shared, shared
from align.errors import RolloutError
from align.modeling.logprobs import language_model
from align.rollout.adapters import A, B, with_adapter
from align.rollout.engine import RolloutEngine
from align.rollout.identity import Fingerprints, check_identity, texts
from align.rollout.server import client, delivery
from align.rollout.server.client import Background, Server, ServerLost, session
from align.rollout.server.completions import Answers, Call, balanced, check_label, check_not_taken, completed, sockets
from align.rollout.server.fitting import check_as_before, check_fit, takes_adapter
from align.rollout.server.folder import new_folder, remove_folder
from align.rollout.server.options import MEMORY
from align.rollout.server.transfer import Transfer, make_transfer
from align.rollout.types import Completion, OnDone, Request
from align.rollout.views import View
from align.rollout.weights import check_supported, checkpoint_shapes, checkpoint_weights

logger = logging.getLogger(__name__)

SOONER = 0.8  # of the time that a server has for an answer: a group gives up before, and the server says why


class ServerEngine(RolloutEngine):
    """Completions from servers that `align serve` started, of which each holds the whole model.

    Of several processes (DDP, FSDP2) the first pushes, and each asks for its own completions. Every push has a label of
    its own, which a server says it has, before and after each completion: so the version of a sample is that of the
    weights that made it, also where a server was started anew or another run has taken it.
    """

    name = "server"
    draws_elsewhere = tells = True

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_model_len,
        seed=0,
        max_num_seqs=256,  # of the servers, which have their own
        sync_tolerance=None,
        dtype=None,
        urls,
        api_key_env=KEY_VARIABLE,
        api_key_file=None,
        timeout=60.0,
        generation_limit=7200.0,
        on_engine_failure="stop",
        wait_limit=600.0,
        transfer="auto",
        transfer_folder=MEMORY,
    ):
        super().__init__(
            model, tokenizer, max_model_len=max_model_len, seed=seed, sync_tolerance=sync_tolerance, dtype=dtype
        )
        check_supported(model)
        self._leader = is_first()
        key = in_all(lambda: read_key(api_key_env, api_key_file))
        self._folder = Path(shared(by_first(lambda: new_folder(Path(transfer_folder)))))
        self.servers = [Server(url.rstrip("/"), key, timeout) for url in urls]
        self.generation_limit, self.waits, self.wait_limit = generation_limit, on_engine_failure == "wait", wait_limit
        self._asked = self.servers  # for completions; one alone while it is probed
        self._behind: list[Server] = []  # lost during the push that is under way
        self._anew = False  # a server was started anew, and has not been probed since
        self._transfer: Transfer | None = None  # of the leader
        self._run, self._pushes = shared(secrets.token_hex(4)), 0
        self._sent: Fingerprints = {}
        self._shapes: dict[str, list[int]] = {}  # of the adapter's matrices
        self._background = Background()
        self._finalizer = weakref.finalize(self, clean_up, self._background, self._folder, self._leader)
        try:
            in_all(lambda: self._reach(model, transfer))
            self._sums = self.servers[0].device != "cpu"
            self._start(model)
        except BaseException:
            self.close()
            raise

    @property
    def _label(self) -> str:
        return f"{self._run}:{self._pushes}"

    def _reach(self, model, transfer: str) -> None:
        """Raises `RolloutError` for servers that do not answer, or were not started for this run."""
        self._background.run(self._with_session(lambda http: self._each(http, partial(self._described, http=http))))
        self._adapts = takes_adapter(model, self.servers, self._folder, self.dtype)
        self._needs: dict[str, Any] = {  # of `check_fit`
            "names": checkpoint_shapes(model, merged=not self._adapts).keys(),
            "dtype": self.dtype,
            "longest": self.max_model_len,
            "config": language_model(model).config,
        }
        check_fit(self.servers, **self._needs)
        if self._leader:
            seconds = SOONER * self.servers[0].timeout
            device = next(model.parameters()).device
            self._transfer = make_transfer(transfer, self.servers, self._folder, self.waits, seconds, device)
            urls = ", ".join(server.url for server in self.servers)
            logger.info(
                "completions come from rollout servers at %s; weights go there by %s", urls, self._transfer.name
            )

    async def _described(self, server: Server, http: aiohttp.ClientSession) -> None:
        """With `wait`, a server that does not answer yet may still be starting."""
        end = time.monotonic() + self.wait_limit
        while True:
            try:
                return await server.describe(http)
            except ServerLost as error:
                self._check_time(end, error)
            await asyncio.sleep(min(1.0, server.timeout / 4))

    def _check_time(self, end: float, lost: ServerLost) -> None:
        if not self.waits:
            raise lost
        if time.monotonic() > end:
            raise RolloutError(f"{lost}; it did not come back in {self.wait_limit:g} seconds") from lost

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _weights(self, model, everything):
        if self._adapts:
            turn = None if everything else self._pushes
            return with_adapter(model, self.dtype, self.arrived, turn, self.servers[0].parts)
        return checkpoint_weights(model, self.dtype, self.arrived)

    def _load(self, weights) -> None:
        raise_shared(None)  # all are here: the servers give up what another process would still be drawing
        whole = not self._adapts or not self._pushes
        self._pushes += 1
        self._parcel = delivery.Parcel(
            self._label, whole, self._folder / f"adapter_{self._pushes}" if self._adapts else None
        )
        # what an adapter lies on was proved before and does not change
        self._sent = {} if whole else {name: each for name, each in self._sent.items() if name not in self._shapes}
        adapter: dict[str, Tensor] = {}

        def base():
            for name, tensor in weights:
                if name.endswith((A, B)):
                    adapter[name] = tensor
                else:
                    yield name, tensor

        stream = base()
        failure: RolloutError | None = None
        if self._transfer is not None:
            try:
                self._deliver(self._transfer, stream, adapter)
            except RolloutError as error:
                failure = type(error)(f"{error}{self._transfer.hint}")
            except (OSError, SafetensorError) as error:
                failure = RolloutError(f"the weights cannot be written to {self._folder}: {error}")
            except torch.OutOfMemoryError as error:
                failure = RolloutError(
                    f"no room on the GPU to send weights from ({error}): set rollout.transfer: files"
                )
            finally:
                self._transfer.finished()
            if failure is not None:
                self._transfer.close()
        for _ in stream:
            pass  # shards are gathered by all processes, also where the first has failed
        self._shapes = {name: list(tensor.shape) for name, tensor in adapter.items()}
        raise_shared(failure)

    def _deliver(self, transfer: Transfer, weights, adapter: dict[str, Tensor]) -> None:
        parcel, self._behind = self._parcel, []
        for old in self._folder.glob("*.safetensors") if parcel.whole else ():
            old.unlink()
        if self._pushes > 1:
            self._step(partial(self._recognise, whole=parcel.whole))
        if parcel.whole:
            transfer.meet(self.servers, self._form)
        self._step(partial(delivery.begin, parcel=parcel))
        for piece in transfer.pieces(weights) if parcel.whole else ():
            self._step(partial(delivery.send, told=piece.info), piece.beside)
        for _ in weights:
            pass  # compared, not sent again; behind them comes the adapter
        if parcel.adapter is not None:
            delivery.write_adapter(adapter, parcel.adapter)
        self._step(partial(delivery.finish, parcel=parcel))
        for server in self._behind:
            self._background.run(self._with_session(partial(self._come_back, server, had=False)))
        for old in self._folder.glob("adapter_*"):
            if old != parcel.adapter:
                shutil.rmtree(old)

    async def _recognise(self, server: Server, http: aiohttp.ClientSession, whole: bool) -> None:
        """Before a push: a server that was started anew since the last one is learned anew. Raises `ServerLost` where
        it would get an adapter without what that lies on, which the proof of one frozen tensor need not find."""
        own = (await server.label(http)).startswith(self._run)
        if not whole and (self.waits or not own):
            await check_label(server, http, f"{self._run}:{self._pushes - 1}")
        elif not own:
            await self._learn(server, http)
            if self._transfer is not None:
                self._transfer.close()  # of a group that has lost it

    async def _learn(self, server: Server, http: aiohttp.ClientSession) -> None:
        before = server.config
        await server.describe(http)
        check_fit([server], **self._needs)
        check_as_before(server, before)
        self._anew = True

    def _form(self, info: delivery.Told, beside: Callable[[], None]) -> None:
        self._step(partial(delivery.meet, told=info), beside)

    def _step(
        self,
        action: Callable[[Server, aiohttp.ClientSession], Awaitable],
        beside: Callable[[], None] | None = None,
    ) -> None:
        """One call to all servers that have followed so far, at the same time, and meanwhile `beside` here."""

        async def step(http: aiohttp.ClientSession) -> None:
            here = [server for server in self.servers if server not in self._behind]
            own = [client.beside(beside, self.servers[0].timeout)] if beside is not None else []
            outcomes = await asyncio.gather(*(action(server, http) for server in here), *own, return_exceptions=True)
            for number, outcome in enumerate(outcomes):
                if isinstance(outcome, ServerLost) and self.waits:
                    logger.warning("%s; the push goes on without it", outcome)
                    self._behind.append(here[number])
                elif isinstance(outcome, BaseException):
                    raise outcome

        self._background.run(self._with_session(step))

    def _parts(self, name: str, tensor: Tensor) -> list[Tensor]:
        if name.endswith((A, B)):
            return [tensor]
        parts = self.servers[0].parts[name]
        whole = tensor.contiguous()
        return [
            View(tuple(size), tuple(stride), offset).take(whole).to(getattr(torch, kind))
            for size, stride, offset, kind in parts
        ]

    def _prove(self, sent) -> int:
        proved = texts(sent)
        self._sent = {**self._sent, **proved}
        check = partial(self._checked, proved)

        def prove() -> None:
            if self._leader:
                self._background.run(self._with_session(lambda http: self._each(http, partial(check, http=http))))

        in_all(prove)
        return len(sent)

    async def _checked(self, sent: Fingerprints, server: Server, http: aiohttp.ClientSession) -> None:
        """`_check`; with `wait`, of a server that is lost meanwhile when it is back."""
        try:
            await self._check(sent, server, http)
        except ServerLost as error:
            if not self.waits:
                raise
            logger.warning("%s; waiting for it", error)
            await self._come_back(server, http)

    async def _check(self, sent: Fingerprints, server: Server, http: aiohttp.ClientSession) -> None:
        names = [name for name in sent if name not in self._shapes]
        adapter = {name: shape for name, shape in self._shapes.items() if name in sent}
        held = await server.fingerprints(http, names, adapter)
        check_identity(sent, held, f"vLLM server {server.url}", self.weight_version)

    def probe(self, model):
        """As for every engine, with each server in turn."""
        try:
            for server in self.servers:
                self._asked = [server]
                probe = super().probe(model)
        finally:
            self._asked = self.servers
        return probe

    def push(self, model, version):
        """As for every engine. A server that was started anew since the last push is probed: the proof is of weights,
        and says nothing of a configuration (rotary base, epsilon of norms) that is not the run's."""
        report = super().push(model, version)
        if anywhere(self._anew):
            self._anew = False
            self.probe(model)
        return report

    # ---- a server that was lost --------------------------------------------------------------------------------------

    async def _come_back(self, server: Server, http: aiohttp.ClientSession, had: bool = True) -> None:
        """Wait until a lost server answers, and give it the weights of the last push, if it has not got them. had: it
        had them, so one with another run's was taken by that."""
        end = time.monotonic() + self.wait_limit
        while True:
            try:
                async with delivery.locked(self._folder / "lock", self.wait_limit):
                    if (label := await server.label(http)) != self._label:
                        if had:
                            check_not_taken(server, label, self._run)
                        await self._learn(server, http)
                        files = sorted(self._folder.glob("*.safetensors"))
                        await delivery.deliver(server, http, files, replace(self._parcel, whole=True))
                    if self._sent:
                        await self._check(self._sent, server, http)
                logger.warning("the rollout server %s is back, with weight version %d", server.url, self.weight_version)
                return
            except ServerLost as error:
                self._check_time(end, error)
            await asyncio.sleep(min(1.0, server.timeout / 4))

    # ---- completions -------------------------------------------------------------------------------------------------

    def _complete(self, requests: list[Request], progress: bool, done: OnDone | None = None) -> list[list[Completion]]:
        return self._background.run(self._with_session(lambda http: self._answers(http, requests, progress, done)))

    async def _answers(self, http, asked: list[Request], progress: bool, told: OnDone | None) -> list:
        answers = Answers(asked, min(server.max_num_seqs for server in self.servers), told)
        requests, salt = answers.pieces, secrets.token_hex(8)  # a call does not depend on those before it
        with tqdm(total=len(requests), desc="completions", disable=not progress) as bar:

            def done(index: int, completions: list[Completion]) -> None:
                answers.take(index, completions)
                bar.update()

            try:
                async with asyncio.timeout(self.generation_limit):
                    while left := answers.left:
                        shares = balanced(requests, left, len(self._asked))
                        await self._survive(http, [{i: requests[i] for i in share} for share in shares], salt, done)
            except TimeoutError as error:
                raise RolloutError(
                    f"{len(answers.left)} of {len(requests)} requests were not answered within "
                    f"generation_limit ({self.generation_limit:g} seconds): raise it, or ask for less at a time"
                ) from error
        return [answers.whole(index) for index in range(len(asked))]

    async def _survive(self, http: aiohttp.ClientSession, shares: list[dict[int, Request]], salt: str, done) -> None:
        """Ask each server for its share; with `wait`, wait for the servers that were lost meanwhile."""
        call = Call(self._label, salt, self._adapts, self.generation_limit, sockets() // len(shares))
        pairs = zip(self._asked, shares, strict=True)
        tasks = [asyncio.ensure_future(completed(server, http, share, call, done)) for server, share in pairs]
        try:
            outcomes = await asyncio.gather(*tasks, return_exceptions=self.waits)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for server, outcome in zip(self._asked, outcomes, strict=True):
            if isinstance(outcome, ServerLost):
                logger.warning("%s; waiting for it", outcome)
                await self._come_back(server, http)
            elif isinstance(outcome, BaseException):
                raise outcome

    def interrupt(self) -> bool:
        self._background.interrupt()
        return True

    # ---- the rest ----------------------------------------------------------------------------------------------------

    async def _each(self, http: aiohttp.ClientSession, action: Callable[[Server], Awaitable]) -> None:
        await asyncio.gather(*(action(server) for server in self.servers))

    async def _with_session(self, action: Callable[[aiohttp.ClientSession], Awaitable]) -> Any:
        async with session() as http:
            return await action(http)

    def _free(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
        self._finalizer()


def clean_up(background: Background, folder: Path, leader: bool) -> None:
    background.close()
    if leader:
        remove_folder(str(folder))
