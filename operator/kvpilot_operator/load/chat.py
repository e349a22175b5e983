"""Multi-turn chats over a few shared system prompts, with open-loop arrivals."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpilot_operator.load.text import text_of
from kvpilot_operator.load.workload import (
    Arrival,
    LoadError,
    LoadFeedback,
    LoadPhase,
    LoadRequest,
    Rise,
    poisson,
)

PROBES = 9
"""Requests that measure the latency of the machine before a load that is sized to it."""


@dataclass(frozen=True)
class ChatShape:
    """Sizes of a chat in tokens; user and answer lengths are uniform within +-``spread`` of their mean.

    Attributes:
        think_s: minimum time between two turns of a session.
    """

    system_prompts: int = 4
    system_tokens: int = 256
    turns: int = 4
    user_tokens: int = 64
    output_tokens: int = 32
    spread: float = 0.25
    think_s: float = 3.0

    def __post_init__(self) -> None:
        for name in ("system_prompts", "turns", "user_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise LoadError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.system_tokens < 0:
            raise LoadError(f"system_tokens: must be at least 0, got {self.system_tokens}")
        if not self.think_s >= 0:  # nor NaN
            raise LoadError(f"think: must be at least 0, got {self.think_s:g}")


@dataclass
class _Session:
    """One conversation; ``last_at`` is when its last turn was sent, s from the start of the load."""

    id: int
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0
    last_at: float = 0.0
    expected_tokens: int = 0  # length of the next answer


class ChatWorkload:
    """Chats whose requests arrive as a Poisson process with the rate of the phase.

    Times, sessions and sizes depend on the seed only. If a turn is due before the previous answer has
    arrived, generated text of the same length replaces that answer, so a slow server cannot slow the load.
    """

    def __init__(
        self, phases: Sequence[LoadPhase | Rise], shape: ChatShape | None = None, seed: int = 1
    ) -> None:
        if not phases:
            raise LoadError("phases: at least one is required")
        self.phases = tuple(phases)
        self.shape = shape or ChatShape()
        self.seed = seed
        self._waiting: list[_Session] = []  # sessions with turns left, oldest first
        self._sessions = 0

    @property
    def title(self) -> str:
        """One line that describes the load."""
        shape = self.shape
        return (
            f"chat: {shape.system_prompts} shared system prompts of {shape.system_tokens} tokens, "
            f"{shape.turns} turns, ~{shape.user_tokens} in and ~{shape.output_tokens} out"
        )

    @property
    def seconds(self) -> float:
        """How long requests are sent, s."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def probes(self) -> tuple[LoadRequest, ...]:
        """First turns of separate sessions, if a phase is sized to the machine; otherwise none."""
        if not any(phase.sized for phase in self.phases):
            return ()
        sizes = random.Random(self.seed + 2)
        other = ChatWorkload([LoadPhase("probe", 1.0, rate=1.0)], self.shape, self.seed + 1)
        return tuple(other._turn(0.0, "probe", sizes).request() for _ in range(PROBES))

    def arrivals(self, feedback: LoadFeedback) -> Iterator[Arrival]:
        """The schedule; a phase that is sized to the machine computes its rate when it begins."""
        times, sizes = random.Random(self.seed), random.Random(self.seed + 1)
        begin = before = 0.0
        for phase in self.phases:
            for seconds, rate in phase.steps(feedback, before):
                for offset in poisson(rate, seconds, times):
                    yield self._turn(begin + offset, phase.name, sizes)
                begin, before = begin + seconds, rate

    def _turn(self, at: float, phase: str, sizes: random.Random) -> Arrival:
        session = self._next_session(at)
        turn, shape = session.turns, self.shape
        user = text_of(
            f"user {self.seed} {session.id} {turn}", _varied(shape.user_tokens, shape.spread, sizes)
        )
        output = _varied(shape.output_tokens, shape.spread, sizes)
        session.turns += 1
        session.last_at = at
        if session.turns < shape.turns:
            self._waiting.append(session)

        def request() -> LoadRequest:
            if session.messages and session.messages[-1]["role"] == "user":  # not answered yet
                generated = text_of(f"answer {self.seed} {session.id} {turn}", session.expected_tokens)
                session.messages.append({"role": "assistant", "content": generated})
            session.messages.append({"role": "user", "content": user})
            session.expected_tokens = output
            body: dict[str, Any] = {
                "messages": list(session.messages),
                "max_tokens": output,
                "temperature": 0,
                "user": f"session-{session.id}",
            }
            return LoadRequest("/v1/chat/completions", body)

        def answered(text: str) -> None:
            last = session.messages[-1]
            if last["role"] == "user" and last["content"] is user:
                session.messages.append({"role": "assistant", "content": text})

        return Arrival(at, phase, request, answered)

    def _next_session(self, at: float) -> _Session:
        if self._waiting and at - self._waiting[0].last_at >= self.shape.think_s:
            return self._waiting.pop(0)
        session = _Session(self._sessions)
        self._sessions += 1
        if self.shape.system_tokens:
            prompt = text_of(
                f"system {self.seed} {session.id % self.shape.system_prompts}", self.shape.system_tokens
            )
            session.messages.append({"role": "system", "content": prompt})
        return session


def _varied(mean: int, spread: float, rng: random.Random) -> int:
    return max(1, round(mean * rng.uniform(1 - spread, 1 + spread)))
