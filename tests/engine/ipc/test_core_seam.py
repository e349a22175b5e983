"""Client and core loop together, over an engine that a test controls."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot_engine.core.process import CoreLoop, CoreThread
from kvpilot_engine.errors import ChangeRefusedError, CoreUnavailableError, RequestCancelledError, StartError
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.client import CoreClient
from kvpilot_engine.ipc.framing import FrameReader, frame
from kvpilot_engine.ipc.messages import CoreStart


class Puppet:
    """Echoes the prompt of each request, one id for each step."""

    def __init__(self, start: CoreStart, fail_at: int | None = None) -> None:
        self.steps = 0
        self.closed = False
        self.idle = threading.Event()
        self.aborted: list[str] = []
        self._start = start
        self._fail_at = fail_at
        self._live: dict[str, deque[int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def submit(self, request: messages.Generate) -> None:
        self._live[request.id] = deque(request.prompt)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._live[request_id] = deque()

    def step(self) -> list[messages.Tokens | messages.Finished]:
        self.steps += 1
        if self.steps == self._fail_at:
            raise ValueError("a fault\nin the puppet")
        out: list[messages.Tokens | messages.Finished] = []
        for name, rest in list(self._live.items()):
            if rest:
                out.append(messages.Tokens(name, [rest.popleft()]))
            if not rest:
                del self._live[name]
                out.append(messages.Finished(name, "cancelled" if name in self.aborted else "length"))
        if not self._live:
            self.idle.set()
        return out

    def apply(self, change: messages.Apply) -> messages.Applied | messages.Refused:
        if change.epoch < 3:
            return messages.Refused(change.id, "stale_epoch", f"epoch: {change.epoch} is below 3")
        return messages.Applied(change.id, change.generation, change.epoch, ["numWorkers"], 5, 1, True)

    def describe(self, request_id: str, /) -> messages.Described:
        return messages.Described(
            request_id, "i", self._start.model, "cpu", 99, 1, 3, self._start.config, False, {"maxTokens": 7}
        )

    def sample(self, request_id: str, /) -> messages.Sampled:
        return messages.Sampled(request_id, {"steps": {"": self.steps}}, {}, 1, 0, 0)

    def close(self) -> None:
        self.closed = True


async def client_of(**options: Any) -> CoreClient:
    return await CoreClient.start(
        CoreStart(model="puppet"), lambda start: CoreThread(start, lambda s: Puppet(s, **options))
    )


@asynccontextmanager
async def closing(client: CoreClient) -> AsyncIterator[CoreClient]:
    try:
        yield client
    finally:
        await client.close()


def ask(name: str, prompt: list[int]) -> messages.Generate:
    return messages.Generate(name, prompt, 1)


async def test_messages_of_two_requests_reach_their_own_handles() -> None:
    async with closing(await client_of()) as client:
        assert client.described.context_length == 99
        handles = [client.generate(ask("a", [1, 2, 3])), client.generate(ask("b", [9]))]
        received: list[list[int]] = [[], []]
        for handle, ids in zip(handles, received, strict=True):
            while new := await handle.tokens():
                ids.extend(new)
            assert (await handle.result()).reason == "length"
        assert received == [[1, 2, 3], [9]]
        assert client.open_requests == 0
        assert (await client.sample()).counters["steps"][""] >= 3


async def test_change_is_applied_and_wrong_change_is_refused() -> None:
    async with closing(await client_of()) as client:
        report = await client.apply(3, 8, {"numWorkers": 4})
        assert (report.generation, report.blocks_kept, report.blocks_lost, report.converging) == (
            8,
            5,
            1,
            True,
        )
        with pytest.raises(ChangeRefusedError, match="epoch: 2 is below 3") as caught:
            await client.apply(2, 9, {})
        assert caught.value.code == "stale_epoch"


async def test_cancelled_request_is_aborted_in_the_core() -> None:
    async with closing(await client_of()) as client:
        handle = client.generate(ask("long", [7] * 200_000))
        assert await handle.tokens()
        handle.cancel()
        with pytest.raises(RequestCancelledError, match="the client closed the request"):
            await handle.result()
        while client.open_requests:
            await client.sample()


async def test_fault_in_a_step_ends_every_request_with_one_line() -> None:
    client = await client_of(fail_at=3)
    handles = [client.generate(ask(name, [1] * 100)) for name in "ab"]
    for handle in handles:
        with pytest.raises(CoreUnavailableError, match=r"^ValueError: a fault in the puppet$"):
            await handle.result()
    with pytest.raises(CoreUnavailableError, match="a fault in the puppet"):
        client.generate(ask("c", [1]))
    await client.close()


async def test_core_that_cannot_start_reports_the_reason() -> None:
    def build(start: CoreStart) -> Puppet:
        raise StartError("model: no such thing")

    with pytest.raises(StartError, match="model: no such thing"):
        await CoreClient.start(CoreStart(), lambda start: CoreThread(start, build))


async def test_stop_finishes_running_requests() -> None:
    client = await client_of()
    handle = client.generate(ask("last", [1] * 5000))
    await client.close()
    assert (await handle.result()).reason == "length"
    assert len(handle.ids) == 5000
    with pytest.raises(CoreUnavailableError, match="the engine was shut down"):
        client.generate(ask("late", [1]))


def test_front_that_does_not_read_delays_no_step_and_loses_no_message() -> None:
    front, core = socket.socketpair()
    puppet = Puppet(CoreStart())
    loop = CoreLoop(puppet, core)
    thread = threading.Thread(target=loop.run)
    thread.start()
    ids = list(range(20_000))  # far more than a socket's buffer holds
    front.sendall(frame(ask("a", ids)))
    front.settimeout(60)
    reader: FrameReader[messages.FromCore] = FrameReader(messages.FromCore)
    assert puppet.idle.wait(60), "the core steps on although nobody reads"
    assert puppet.steps == len(ids)
    got: list[int] = []
    ended = False
    while not ended:
        for message in reader.feed(front.recv(1 << 16)):
            if isinstance(message, messages.Tokens):
                got += message.ids
            ended = ended or isinstance(message, messages.Finished)
    assert got == ids
    front.close()
    thread.join(60)
    assert not thread.is_alive(), "a core whose front is gone must end"
    core.close()


@given(texts=st.lists(st.text(max_size=40), max_size=6), cuts=st.lists(st.integers(1, 30), max_size=40))
def test_frames_are_decoded_from_any_chunks(texts: list[str], cuts: list[int]) -> None:
    stream = b"".join(frame(messages.Failed(text)) for text in texts)
    reader: FrameReader[messages.FromCore] = FrameReader(messages.FromCore)
    got: list[messages.FromCore] = []
    for cut in [*cuts, len(stream)]:
        piece, stream = stream[:cut], stream[cut:]
        got += reader.feed(piece)
    assert got == [messages.Failed(text) for text in texts]
