# Two images from one file: `operator` (small, no torch) and `engine`. `make images` builds both.
#
# BASE is any Debian-like image with Python 3.11 or newer and its venv module as `python3`.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Builds the environments. The dependencies come from uv.lock in a layer that changes only with it; the product
# itself follows as a wheel, so that a change of source rebuilds only that.
FROM ${BASE} AS build
ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --quiet uv==0.13.9 hatchling==1.27.0
WORKDIR /src

FROM build AS operator-dependencies
COPY pyproject.toml uv.lock ./
RUN UV_PROJECT_ENVIRONMENT=/opt/kvpilot /opt/build/bin/uv sync --frozen --no-dev --no-install-project \
    --compile-bytecode --extra operator --python "$(command -v python3)"

FROM build AS engine-dependencies
COPY pyproject.toml uv.lock ./
RUN UV_PROJECT_ENVIRONMENT=/opt/kvpilot /opt/build/bin/uv sync --frozen --no-dev --no-install-project \
    --extra engine --python "$(command -v python3)"

# The same place in the file system as the dependencies, holding the product alone: one copy is merged over the other.
FROM build AS product
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY operator operator
RUN /opt/build/bin/python -m hatchling build -t wheel -d /dist \
    && python3 -m venv --without-pip /opt/kvpilot \
    && /opt/build/bin/uv pip install --offline --no-deps --compile-bytecode --python /opt/kvpilot/bin/python /dist/*.whl

# The user has a passwd entry, because libraries ask for its name. Nothing is written below the root directory, so
# the root file system can be read-only.
FROM ${BASE} AS runtime
RUN useradd --uid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin kvpilot
ENV PATH=/opt/kvpilot/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /tmp
USER 65532:65532

FROM runtime AS engine
COPY --from=engine-dependencies /opt/kvpilot /opt/kvpilot
COPY --from=product /opt/kvpilot /opt/kvpilot
ENTRYPOINT ["python", "-m", "kvpilot_engine"]

FROM runtime AS operator
COPY --from=operator-dependencies /opt/kvpilot /opt/kvpilot
COPY --from=product /opt/kvpilot /opt/kvpilot
ENTRYPOINT ["kvpilot", "operator"]
