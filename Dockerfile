# Two images from one file: `operator` (small, no torch) and `engine`. `make images` builds both.
#
# The dependencies come from uv.lock, in a layer that changes only with it; the product follows as a wheel, so that
# a change of source rebuilds only that. BASE is any Debian-like image with Python 3.11 or newer as `python3`.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV UV_PYTHON_DOWNLOADS=never UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --quiet uv==0.13.9 hatchling==1.27.0

# The product alone, in the place where the images hold it: it is copied over their dependencies.
FROM build AS product
WORKDIR /src
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
COPY pyproject.toml uv.lock /opt/lock/

FROM runtime AS engine
RUN --mount=type=bind,from=build,source=/opt/build,target=/opt/build \
    UV_PROJECT_ENVIRONMENT=/opt/kvpilot SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    /opt/build/bin/uv sync --project /opt/lock --no-cache --no-python-downloads --python "$(command -v python3)" \
    --frozen --no-dev --no-install-project --extra engine
COPY --from=product /opt/kvpilot /opt/kvpilot
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["python", "-m", "kvpilot_engine"]

FROM runtime AS operator
RUN --mount=type=bind,from=build,source=/opt/build,target=/opt/build \
    UV_PROJECT_ENVIRONMENT=/opt/kvpilot SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    /opt/build/bin/uv sync --project /opt/lock --no-cache --no-python-downloads --python "$(command -v python3)" \
    --frozen --no-dev --no-install-project --extra operator --compile-bytecode
COPY --from=product /opt/kvpilot /opt/kvpilot
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["kvpilot", "operator"]
