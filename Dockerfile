# syntax=docker/dockerfile:1
# Two images of one version:
#   docker build --target api -t mergeyard-api .          the service: no torch, no compiler
#   docker build --target worker -t mergeyard-worker .    what computes on a GPU: the pinned torch with CUDA, and Triton
# Both run as the user 10001, hold no secret, and keep everything in /srv/mergeyard.

# Pinned by tag: no digest could be looked up where this was written. Pin your own with --build-arg PYTHON=python:…@sha256:…
ARG PYTHON=python:3.11.13-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON} AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app ./app
COPY mergeyard ./mergeyard
COPY migrations ./migrations
COPY worker ./worker
COPY deploy/install.sh ./deploy/install.sh

FROM source AS build-api
RUN deploy/install.sh api

FROM source AS build-worker
# An index with another build of torch, such as CPU's; empty takes pip's own, which is CUDA's.
ARG TORCH_INDEX=
RUN deploy/install.sh worker

# hadolint ignore=DL3006
FROM ${PYTHON} AS runtime
RUN useradd --uid 10001 --create-home --home-dir /home/mergeyard mergeyard \
    && install --directory --owner=mergeyard --group=mergeyard /srv/mergeyard
ENV PATH=/opt/mergeyard/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MERGEYARD_DATA_DIR=/srv/mergeyard \
    MERGEYARD_LOG_FORMAT=json
WORKDIR /srv/mergeyard
STOPSIGNAL SIGTERM
ENTRYPOINT ["mergeyard"]

FROM runtime AS worker
# Triton compiles its launchers with a C compiler when a kernel first runs. Debian keeps one version of each package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-worker /opt/mergeyard /opt/mergeyard
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 CMD ["python", "-m", "worker.health"]
CMD ["worker"]

FROM runtime AS api
COPY --from=build-api /opt/mergeyard /opt/mergeyard
# Others can reach a container only so; without keys the API refuses to.
ENV MERGEYARD_HOST=0.0.0.0
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "app.alive"]
CMD ["api"]
