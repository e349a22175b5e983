"""The admin port before the core is ready, and the sockets of both ports."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_engine.server.admin import build_admin
from kvpilot_engine.server.lifecycle import bind


@pytest.fixture
def session() -> Session:
    return Session("builtin/tiny-llama", KVCacheConfig(), load_tokenizer("builtin/tiny-llama"))


def admin_client(session: Session, token: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_admin(session, token))
    return httpx.AsyncClient(transport=transport, base_url="http://admin")


async def test_admin_port_without_a_token_refuses_every_request(session: Session) -> None:
    async with admin_client(session, lambda: None) as client:
        for header in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
            answer = await client.get("/admin/config", headers=header)
            assert answer.status_code == 403
            assert "started without a token" in answer.json()["error"]["message"]


async def test_renewed_token_is_used_at_once_and_loading_engine_answers_503(session: Session) -> None:
    tokens = ["old"]
    async with admin_client(session, lambda: tokens[0]) as client:
        header = {"Authorization": "Bearer old"}
        answer = await client.get("/admin/config", headers=header)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the model is still loading")
        tokens[0] = "new"
        assert (await client.get("/admin/config", headers=header)).status_code == 401


def test_small_writes_are_not_delayed() -> None:
    """asyncio disables Nagle's algorithm only for a socket that names its protocol."""
    with bind("--port", "127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
