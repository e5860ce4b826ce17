# ettin-serve with an OpenVINO artifact, for CPUs. Build in the repository's root:
#   docker build -f deploy/serve.Dockerfile -t ettin-serve .
#   docker run --rm -p 8080:8080 --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     --memory 4g --pids-limit 512 --ulimit nofile=4096:4096 \
#     -v "$PWD/ettin-reranker-68m-v1/openvino-int8:/artifact:ro" ettin-serve
# Tags move. For a build that can be repeated, pass the digests that your registry shows:
#   --build-arg BUILD_IMAGE=python:3.12@sha256:… --build-arg IMAGE=python:3.12-slim@sha256:…
ARG BUILD_IMAGE=python:3.12
ARG IMAGE=python:3.12-slim

# With a compiler, for the attention kernel; the image itself needs none.
FROM ${BUILD_IMAGE} AS wheel
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${IMAGE}
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[openvino,gateway]" && useradd --system --no-create-home --uid 10001 ettin
# A number, so that Kubernetes can check that it is not root.
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health/live', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ettin-serve", "/artifact", "--host", "0.0.0.0", "--port", "8080"]
