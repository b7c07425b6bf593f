# syntax=docker/dockerfile:1

# Loramux's server with the embedded base on a CPU. For a GPU build with
#   --build-arg TORCH_INDEX=     (PyPI's own CUDA wheel), and run with --gpus all.

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/loramux/bin:$PATH
RUN python -m venv /opt/loramux
WORKDIR /src
# torch in a layer of its own: it is most of the image and changes least.
COPY constraints.txt ./
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-deps --requirement torch.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    && grep '^hatchling==' constraints.txt > build.txt \
    && pip install --constraint constraints.txt --requirement build.txt
COPY . .
RUN pip install --no-build-isolation -c constraints.txt ".[serve,train]"

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="Loramux" \
      org.opencontainers.image.description="Multi-tenant LoRA serving over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
# A C compiler: at its first start the server compiles its CPU kernels for the processor it finds itself on. Without a
# version, since any gcc of this Debian will do and its security updates are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home loramux \
    && install -d -o loramux -g loramux /data
COPY --from=build /opt/loramux /opt/loramux
ENV PATH=/opt/loramux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    LORAMUX_DATA_DIR=/data/loramux \
    LORAMUX_LISTEN=0.0.0.0:50051 \
    LORAMUX_METRICS_LISTEN=0.0.0.0:9464
USER 10001
WORKDIR /home/loramux
VOLUME ["/data"]
# gRPC; Prometheus metrics.
EXPOSE 50051 9464
# A large base takes minutes to load and quantize: failures within the start period do not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["loramux", "health"]
ENTRYPOINT ["loramux"]
CMD ["serve"]
