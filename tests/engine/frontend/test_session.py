"""The path of a request through a session: two ways of admission, one account, one configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.metrics import Outcome, Stage
from kvpilot_engine.errors import (
    CoreUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)
from kvpilot_engine.frontend import session as session_module
from kvpilot_engine.frontend.completion import Prompt, RequestFields
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.client import RequestHandle

CONFIG = KVCacheConfig(num_workers=1, max_queue=1)
PROMPT = Prompt("one two", "text", 4, "max_length")


class FakeCore:
    """The part of CoreClient that a session uses."""

    def __init__(self) -> None:
        self.described = messages.Described(
            id="d",
            instance="i",
            model="m",
            device="cpu",
            context_length=100,
            generation=1,
            epoch=1,
            config={"numWorkers": 1, "maxQueue": 1},
            converging=False,
            ceilings={},
        )
        self.loss: str | None = None
        self.aborted: list[str] = []
        self.left: dict[str, Callable[[], None]] = {}

    def next_id(self) -> str:
        return str(len(self.left))

    def generate(self, message: messages.Generate, left: Callable[[], None]) -> RequestHandle:
        if self.loss is not None:
            raise CoreUnavailableError(self.loss)
        self.left[message.id] = left
        return RequestHandle(message.id, lambda handle: self.aborted.append(handle.id), left)

    def finish(self, handle: RequestHandle) -> None:
        handle.arrived([65, 66], 1.0)
        handle.ended(messages.Finished(handle.id, "length", stages={Stage.DECODE: 0.5}))
        handle.left()


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def session(core: FakeCore) -> Session:
    session = Session("builtin/tiny-llama", CONFIG, load_tokenizer("builtin/tiny-llama"))
    session.attach(core)  # type: ignore[arg-type]
    return session


async def test_request_is_answered_and_accounted_once(session: Session, core: FakeCore) -> None:
    ticket = session.arrive()
    ticket.enter_or_shed()
    handle = ticket.send(session.compose(PROMPT, RequestFields()))
    core.finish(handle)
    assert await session.answer(handle).whole() == "AB"
    done = ticket.succeed()
    ticket.fail(RuntimeError("the connection broke after the last byte"))
    assert done.stages == {Stage.DECODE: 0.5, Stage.ADMISSION_WAIT: 0.0}
    account = session.account
    assert (account.arrivals, account.outcomes[Outcome.OK], account.outcomes[Outcome.ERROR]) == (1, 1, 0)
    assert (session.queue.admitted, core.aborted) == (0, [])


async def test_http_sheds_where_python_waits(session: Session, core: FakeCore) -> None:
    handles = []
    for _ in range(2):
        ticket = session.arrive()
        ticket.enter_or_shed()
        handles.append(ticket.send(session.compose(PROMPT, RequestFields())))
    shed = session.arrive()
    with pytest.raises(
        QueueFullError, match="overloaded: 1 request waits and max_queue is 1; retry after 1 s"
    ):
        shed.enter_or_shed()
    waiting = asyncio.create_task(session.arrive().wait(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    core.finish(handles[0])
    await waiting


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (asyncio.CancelledError(), Outcome.CANCELLED),
        (RequestCancelledError("x"), Outcome.CANCELLED),
        (RequestTimeoutError("x"), Outcome.TIMEOUT),
        (QueueFullError(1, 1, 1), Outcome.SHED),
        (InvalidRequestError("x"), Outcome.INVALID),
        (CoreUnavailableError("x"), Outcome.ERROR),
        (RuntimeError("x"), Outcome.ERROR),
    ],
)
async def test_failed_request_is_aborted_and_counted_by_its_error(
    session: Session, core: FakeCore, error: BaseException, outcome: Outcome
) -> None:
    ticket = session.arrive()
    ticket.enter_or_shed()
    handle = ticket.send(session.compose(PROMPT, RequestFields()))
    ticket.fail(error)
    ticket.fail(RuntimeError("again"))
    assert core.aborted == [handle.id]
    assert {kind for kind, count in session.account.outcomes.items() if count} == {outcome}
    assert session.account.outcomes[outcome] == 1


async def test_request_to_a_core_that_hangs_ends_after_its_time_limit(
    session: Session, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "GRACE_S", 0.0)
    session.config = CONFIG.model_copy(update={"request_timeout_s": 0.01})
    ticket = session.arrive()
    ticket.enter_or_shed()
    handle = ticket.send(session.compose(PROMPT, RequestFields()))
    with pytest.raises(RequestTimeoutError, match=r"no answer within request_timeout_s of 0\.01 s"):
        await session.answer(handle).whole()
    assert core.aborted == [handle.id]


async def test_request_that_cannot_be_sent_returns_its_place(session: Session, core: FakeCore) -> None:
    message = session.compose(PROMPT, RequestFields())
    ticket = session.arrive()
    ticket.enter_or_shed()
    core.loss = "the core died"
    with pytest.raises(CoreUnavailableError, match="the core died"):
        ticket.send(message)
    assert session.queue.admitted == 0


def test_request_has_the_session_id_of_the_body_before_that_of_the_header(session: Session) -> None:
    assert session.compose(PROMPT, RequestFields(session_id="body"), "header").session_id == "body"
    assert session.compose(PROMPT, RequestFields(), "header").session_id == "header"


def test_token_id_outside_the_vocabulary_is_refused(session: Session) -> None:
    bound = session.tokenizer.vocab_size - 1
    with pytest.raises(InvalidRequestError, match=f"prompt: token ids must lie between 0 and {bound}"):
        session.compose(Prompt([bound + 1], "prompt", 1, "max_tokens"), RequestFields())


def test_readiness_names_loading_draining_and_a_lost_core(core: FakeCore) -> None:
    session = Session("builtin/tiny-llama", CONFIG, load_tokenizer("builtin/tiny-llama"))
    assert session.not_ready == "the model is still loading"
    session.attach(core)  # type: ignore[arg-type]
    assert session.not_ready is None
    session.draining = True
    assert session.not_ready == "draining"
    core.loss = "the core died"
    assert (session.not_ready, session.fatal) == ("the core died", "the core died")
