# syntax=docker/dockerfile:1
# Two images from one file, for a CPU and for an NVIDIA GPU:
#
#   docker build --target cpu  -t prefixd:cpu .
#   docker build --target cuda -t prefixd:cuda .
#
# The server listens on all addresses inside the container, so it insists on keys (or on --insecure):
#
#   docker run --init -p 127.0.0.1:8000:8000 -e PREFIXD_ADMIN_KEY=... -e PREFIXD_API_KEY=... \
#     -v models:/models -v store:/var/lib/prefixd --read-only --tmpfs /tmp prefixd:cpu
#
# --init lets it be stopped while it still loads a model. Only the two volumes and /tmp are written. Without a
# model it serves the bundled demo and downloads nothing; PREFIXD_MODEL=org/name downloads into /models once,
# after which HF_HUB_OFFLINE=1 keeps it off the network.

ARG PYTHON=python:3.12-slim-bookworm

# ---- the project as a wheel ----------------------------------------------------------------------
FROM ${PYTHON} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY prefix_store prefix_store
COPY demo demo
COPY converter converter
COPY trainer trainer
COPY loadtest loadtest
COPY reports reports
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

# ---- environments: torch first, so that what follows finds the right build in place ---------------
FROM ${PYTHON} AS venv-cpu
ARG TORCH=torch==2.13.0
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/prefixd \
    && /opt/prefixd/bin/pip install --no-deps --index-url ${TORCH_CPU_INDEX} ${TORCH} \
    && /opt/prefixd/bin/pip install -c constraints.txt /wheels/*.whl

FROM ${PYTHON} AS venv-cuda
ARG TORCH=torch==2.13.0
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/prefixd \
    && /opt/prefixd/bin/pip install -c constraints.txt ${TORCH} /wheels/*.whl

# ---- what both images share ----------------------------------------------------------------------
FROM ${PYTHON} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="prefixd" \
      org.opencontainers.image.description="Serve many prefix-tuned tasks from one resident language model." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A named user (torch asks for the name) without a shell; new named volumes take over these directories' owner.
RUN groupadd --gid 10001 prefixd \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin prefixd \
    && install --directory --owner 10001 --group 10001 --mode 0700 /models /var/lib/prefixd
ENV PATH=/opt/prefixd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PREFIXD_HOST=0.0.0.0 \
    PREFIXD_STORE=/var/lib/prefixd
WORKDIR /tmp
USER 10001:10001
VOLUME ["/models", "/var/lib/prefixd"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Five minutes of grace: the first start may download and check a large model. No proxy: the server is in here.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --start-interval=2s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:%s/healthz' % os.environ.get('PREFIXD_PORT', '8000'), timeout=4)"]
ENTRYPOINT ["prefixd"]
CMD ["serve"]

# ---- the images; cpu stands last, so that a build without --target makes it ------------------------
FROM runtime AS cuda
# Triton compiles a launcher in C for each kernel when it first runs, so this image, unlike the other, has
# gcc. torch's wheels bring the CUDA libraries themselves. Compiled kernels go to /tmp, which must allow
# exec: --tmpfs /tmp:exec
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/tmp/triton
COPY --from=venv-cuda /opt/prefixd /opt/prefixd

FROM runtime AS cpu
COPY --from=venv-cpu /opt/prefixd /opt/prefixd
