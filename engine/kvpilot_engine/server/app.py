"""The application of the main port."""

from __future__ import annotations

from http import HTTPStatus

import prometheus_client
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from kvpilot_engine.contract import VERSION
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.server import errors, openai
from kvpilot_engine.server.metrics import MetricsPage


def build_app(session: Session) -> FastAPI:
    """OpenAI's endpoints, probes and metrics over one session."""
    app = FastAPI(
        title="kvpilot engine",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    errors.install(app)
    openai.install(app, session)
    page = MetricsPage(session)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Liveness: fails once the core is gone."""
        return _probe(session.fatal)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Readiness: the model is loaded and no termination was asked for."""
        return _probe(session.not_ready)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(await page.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


def _probe(trouble: str | None) -> JSONResponse:
    if trouble is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": trouble}, HTTPStatus.SERVICE_UNAVAILABLE)
