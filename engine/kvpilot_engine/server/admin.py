"""The admin API, on its own port, behind a bearer token: read and change the configuration of this engine."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from kvpilot_engine.contract import ConfigPatch
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.server.errors import ApiError, install, validation_error
from kvpilot_engine.server.openai import read_body

PATH = "/admin/config"


def build_admin(session: Session, token: Callable[[], str | None]) -> FastAPI:
    """The application of the admin port.

    Args:
        session: shared with the main port.
        token: returns the current bearer token (a mounted file may be renewed); None refuses every request.
    """
    app = FastAPI(title="kvpilot engine admin", docs_url=None, redoc_url=None, openapi_url=None)
    install(app)

    def authorise(request: Request) -> None:
        expected = token()
        if not expected:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "the admin API is off: this engine was started without a token",
                kind="permission_error",
                code="no_token",
            )
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode(), expected.encode())
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "Authorization: must be Bearer and this engine's token",
                kind="authentication_error",
                code="invalid_token",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @app.get(PATH)
    async def read(request: Request) -> Response:
        """The live configuration."""
        authorise(request)
        body = (await session.describe()).model_dump_json(by_alias=True)
        return Response(body, media_type="application/json")

    @app.patch(PATH)
    async def change(request: Request) -> Response:
        """Change hot fields, whole or not at all."""
        authorise(request)
        try:
            patch = ConfigPatch.model_validate_json(await read_body(request))
        except ValidationError as error:
            raise validation_error(error) from None
        report = await session.apply(patch.epoch, patch.generation, patch.values)
        return Response(report.model_dump_json(by_alias=True), media_type="application/json")

    return app
