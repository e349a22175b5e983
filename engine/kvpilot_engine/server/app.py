"""The application of the main port."""

from __future__ import annotations

from http import HTTPStatus

import prometheus_client
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

import kvpilot_engine
from kvpilot_engine.server import errors, openai
from kvpilot_engine.server.front import Front


def build_app(front: Front) -> FastAPI:
    """OpenAI's endpoints, probes and metrics over one front."""
    app = FastAPI(
        title="kvpilot engine",
        version=kvpilot_engine.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    errors.install(app)
    openai.install(app, front)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Alive: false once the core is gone."""
        return _probe(front.fatal)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Ready for traffic: the model is loaded, no termination was asked for."""
        return _probe(front.not_ready())

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(await front.metrics_text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


def _probe(trouble: str | None) -> JSONResponse:
    if trouble is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": trouble}, HTTPStatus.SERVICE_UNAVAILABLE)
