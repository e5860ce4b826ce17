# Triton Inference Server with what the models of ettin-triton need in its Python. Build in the repository's root:
#   docker build -f deploy/triton.Dockerfile --build-arg RELEASE=26.08 -t ettin-triton .
#   docker run --rm --shm-size=1g --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     -p 8000-8002:8000-8002 -v "$PWD/models:/models:ro" ettin-triton
# RELEASE decides the TensorRT version: build engines with the trtexec of the same image, see deploy/README.md.
# Tags move. For a build that can be repeated, pass the digests that your registries show:
#   --build-arg BUILD_IMAGE=python:3.12@sha256:… --build-arg IMAGE=nvcr.io/nvidia/tritonserver:26.08-py3@sha256:…
ARG RELEASE=26.08
ARG BUILD_IMAGE=python:3.12
ARG IMAGE=nvcr.io/nvidia/tritonserver:${RELEASE}-py3

# With a compiler, for the attention kernel; the image itself needs none.
FROM ${BUILD_IMAGE} AS wheel
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${IMAGE}

# The server's Python is Ubuntu's, which otherwise refuses packages of pip's.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --break-system-packages "$(ls /wheels/*.whl)[onnx,openvino]"
# The image's own user without rights; a number, so that Kubernetes can check that it is not root.
USER 1000
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=poll", "--repository-poll-secs=30"]
