# ettin-serve with an OpenVINO artifact, for CPUs. Build in the repository's root:
#   docker build -f deploy/serve.Dockerfile -t ettin-serve .
#   docker run --rm -p 8080:8080 -v "$PWD/ettin-reranker-68m-v1/openvino-int8:/artifact:ro" ettin-serve

# With a compiler, for the attention kernel; the image itself needs none.
FROM python:3.12 AS wheel
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[openvino,gateway]" && useradd --system --create-home ettin
USER ettin
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["ettin-serve", "/artifact", "--host", "0.0.0.0", "--port", "8080"]
