# Two images from one file: `operator` (small, no torch) and `engine`. `make images` builds both.
#
# The dependencies come from uv.lock, in a layer that changes only with them; the product follows as a wheel, so that
# a change of source rebuilds only that. BASE is any Debian-like image with Python 3.11 or newer as `python3`.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --quiet uv==0.13.9 hatchling==1.27.0

FROM build AS lock
COPY pyproject.toml uv.lock /lock/
RUN for extra in engine operator; do \
      /opt/build/bin/uv export --project /lock --frozen --offline --quiet --no-dev --no-emit-project --extra $extra \
        --output-file /lock/$extra.txt; \
    done

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
WORKDIR /tmp

FROM runtime AS engine
COPY --from=lock /lock/engine.txt /opt/requirements.txt
RUN python3 -m venv /opt/kvpilot && PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --require-hashes -r /opt/requirements.txt \
    && pip uninstall --quiet --yes pip
COPY --from=product /opt/kvpilot /opt/kvpilot
USER 65532:65532
ENTRYPOINT ["python", "-m", "kvpilot_engine"]

FROM runtime AS operator
COPY --from=lock /lock/operator.txt /opt/requirements.txt
RUN python3 -m venv /opt/kvpilot && PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --require-hashes -r /opt/requirements.txt \
    && pip uninstall --quiet --yes pip setuptools
COPY --from=product /opt/kvpilot /opt/kvpilot
USER 65532:65532
ENTRYPOINT ["kvpilot", "operator"]
