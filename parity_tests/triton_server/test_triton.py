"""A real tritonserver on a repository that `ettin-triton` wrote, called over HTTP and gRPC."""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ettin.artifacts.errors import InputError, ServerError
from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import Engine, Manifest, ShapeRange
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.targets.to_onnx import packed_onnx
from ettin.export.writer import PACKED, rewrite
from ettin.runtimes import LongDocuments, load
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.backends import TritonBackend
from ettin.runtimes.triton.repository import TritonOptions, publish
from ettin.runtimes.triton.server import TritonServer

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        importlib.util.find_spec("pytriton") is None, reason='needs a server: pip install "ettin-export[triton]"'
    ),
]
Artifacts = dict[tuple[str, str], Path]

SERVED = [("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "bf16"),
          ("openvino", "int8")]  # fmt: skip
DOCUMENTS = ["Mars is the red planet.", "Venus", "", "Nobody knows " * 90, "The red planet is called Mars. " * 20]
QUERY = "Which planet is red?"


def name_of(variant: tuple[str, str]) -> str:
    return "-".join(variant)


def http_client(server: TritonServer, **options: Any) -> Any:
    import tritonclient.http

    return tritonclient.http.InferenceServerClient(server.url.removeprefix("http://"), **options)


def grpc_client(server: TritonServer) -> Any:
    import tritonclient.grpc

    return tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")


def tensors(kind: Any, query: str, documents: Sequence[Any]) -> list[Any]:
    inputs = []
    for name, texts in (("query", [query]), ("documents", documents)):
        tensor = kind(name, [1, len(texts)], "BYTES")
        array = np.array([[text if isinstance(text, bytes) else text.encode() for text in texts]], np.object_)
        tensor.set_data_from_numpy(array.reshape(1, len(texts)))
        inputs.append(tensor)
    return inputs


def ask(client: Any, model: str, query: str, documents: Sequence[Any], **options: Any) -> list[float]:
    import tritonclient.grpc
    import tritonclient.http

    kind = tritonclient.http if "http" in type(client).__module__ else tritonclient.grpc
    result = client.infer(model, tensors(kind.InferInput, query, documents), **options)
    scores, tokens = result.as_numpy("scores"), result.as_numpy("tokens")
    assert scores.shape == tokens.shape == (1, len(documents))
    return [float(score) for score in scores[0]]


@pytest.fixture(scope="module")
def repository(demo_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    for variant in SERVED:
        artifact = demo_artifacts[variant]
        publish(artifact, folder, name_of(variant), TritonOptions())
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as running:
        yield running


def tolerance(artifact: Path) -> float:
    """How far a pair's score in one batch may be from that in another: what the export saw, and a margin."""
    seen = Manifest.read(artifact).parity.batch_max_abs_error
    assert seen is not None
    return 2 * seen + 1e-4


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("variant", SERVED, ids=name_of)
def test_scores(server: TritonServer, demo_artifacts: Artifacts, variant: tuple[str, str], protocol: str) -> None:
    client = http_client(server) if protocol == "http" else grpc_client(server)
    model, artifact = name_of(variant), demo_artifacts[variant]
    with load(artifact) as runtime, client:
        alone = [ask(client, model, QUERY, [document])[0] for document in DOCUMENTS]
        expected = [float(runtime.predict((QUERY, document))) for document in DOCUMENTS]
        if variant[1] == "fp32":
            assert alone == expected
        np.testing.assert_allclose(alone, expected, atol=tolerance(artifact))
        np.testing.assert_allclose(ask(client, model, QUERY, DOCUMENTS), expected, atol=tolerance(artifact))
        assert ask(client, model, QUERY, []) == []


def test_clients_get_their_own(server: TritonServer, demo_artifacts: Artifacts) -> None:
    """32 at once, each with other texts, one document or many."""
    requests = [
        (
            f"query {index}",
            [f"document {index} {number} " + "word " * ((index * 7 + number * 13) % 90) for number in range(count)],
        )
        for index, count in enumerate([1, 100, 1, 17] * 8)
    ]
    with grpc_client(server) as client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda request: ask(client, "onnx-fp32", *request), requests))
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        for (query, documents), scores in zip(requests, answers, strict=True):
            expected = runtime.predict([(query, document) for document in documents])
            np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_requests_of_many_rows(server: TritonServer, demo_artifacts: Artifacts) -> None:
    import tritonclient.grpc as client_module

    queries, documents = [["a"], ["b"]], [["a b", "c", "b"], ["b b", "a", "x y z"]]
    inputs = []
    for name, texts in (("query", queries), ("documents", documents)):
        tensor = client_module.InferInput(name, [2, len(texts[0])], "BYTES")
        tensor.set_data_from_numpy(np.array(texts, np.object_))
        inputs.append(tensor)
    with grpc_client(server) as client, load(demo_artifacts["onnx", "fp32"]) as runtime:
        scores = client.infer("onnx-fp32", inputs).as_numpy("scores")
        pairs = [(query[0], text) for query, row in zip(queries, documents, strict=True) for text in row]
        np.testing.assert_allclose(scores, runtime.predict(pairs).reshape(2, 3), atol=1e-5)


def test_bad_requests_are_said_and_others_served(server: TritonServer) -> None:
    import tritonclient.http
    from tritonclient.utils import InferenceServerException

    with http_client(server) as client:
        good = ask(client, "onnx-fp32", QUERY, DOCUMENTS)
        with pytest.raises(InferenceServerException, match="document 1: not UTF-8"):
            ask(client, "onnx-fp32", QUERY, [b"fine", b"\xff\xfe"])
        wrong = tritonclient.http.InferInput("documents", [1, 1], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 1), np.float32))
        with pytest.raises(InferenceServerException, match="data-type"):
            client.infer("onnx-fp32", [tensors(tritonclient.http.InferInput, QUERY, [])[0], wrong])
        with pytest.raises(InferenceServerException, match="expected 2 inputs"):
            client.infer("onnx-fp32", tensors(tritonclient.http.InferInput, QUERY, [])[:1])
        assert ask(client, "onnx-fp32", QUERY, DOCUMENTS) == pytest.approx(good, abs=1e-4)


def test_truncation_is_refused_before_anything_is_scored(server: TritonServer) -> None:
    async def ask_backend() -> None:
        backend = TritonBackend(f"127.0.0.1:{server.grpc_port}", "onnx-fp32")
        try:
            scored = await backend.score(QUERY, DOCUMENTS, {}, refuse_truncated=True)
            assert len(scored.logits) == len(DOCUMENTS)
            with pytest.raises(InputError, match="document 1 has, with its query, more than 7999 tokens"):
                await backend.score(QUERY, ["short", "word " * 9000], {}, refuse_truncated=True)
        finally:
            await backend.close()

    asyncio.run(ask_backend())


def test_long_documents(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact, document = demo_artifacts["onnx", "fp32"], "Nothing happens here. " * 90 + "Mars is the red planet."
    policy = LongDocuments("chunks", chunk_overlap=8, top_chunks=2)
    with load(artifact, max_length=64) as runtime:
        pairs = [(QUERY, document), (QUERY, "Venus")]
        plain, chunks = (runtime.predict(pairs, long_documents=each) for each in (None, policy))
    assert abs(chunks[0] - plain[0]) > 0.1
    publish(artifact, tmp_path, "short", TritonOptions(runtime={"max_length": "64"}))
    published = {"long_documents": "chunks", "chunk_overlap": "8", "top_chunks": "2"}
    publish(artifact, tmp_path, "chunks", TritonOptions(runtime={"max_length": "64", **published}))

    async def ask_backend(model: str, long_documents: dict[str, Any]) -> Scored:
        backend = TritonBackend(f"127.0.0.1:{server.grpc_port}", model)
        try:
            return await backend.score(QUERY, [document, "Venus"], long_documents)
        finally:
            await backend.close()

    with TritonServer(tmp_path) as server:
        scored = asyncio.run(ask_backend("short", {}))
        np.testing.assert_allclose(scored.logits, plain, atol=1e-4)
        assert scored.truncated.tolist() == [True, False]
        for model, long_documents in (("short", published), ("chunks", {})):
            scored = asyncio.run(ask_backend(model, long_documents))
            np.testing.assert_allclose(scored.logits, chunks, atol=1e-4)
            assert scored.truncated.tolist() == [False, False]
        with (
            grpc_client(server) as client,
            pytest.raises(Exception, match="top_chunks is 'x', expected a whole number"),
        ):
            ask(client, "short", QUERY, DOCUMENTS, parameters={"top_chunks": "x"})


def test_large_requests_do_not_hold_up_others(server: TritonServer) -> None:
    many = [f"document {index}" for index in range(10_000)]
    book = "A word of a very long book. " * (5_000_000 // 28)
    with grpc_client(server) as client, ThreadPoolExecutor(3) as pool:
        large = [pool.submit(ask, client, "onnx-fp32", QUERY, texts) for texts in (many, [book])]
        time.sleep(0.2)
        started = time.monotonic()
        ask(client, "onnx-fp32", QUERY, DOCUMENTS[:1])
        small_s = time.monotonic() - started
        many_scores, book_scores = (future.result(120) for future in large)
        large_s = time.monotonic() - started
    assert len(many_scores) == 10_000 and np.isfinite(many_scores).all() and np.isfinite(book_scores).all()
    assert small_s < large_s


def test_a_client_that_hangs_up(server: TritonServer) -> None:
    body = b'{"inputs":[{"name":"query","shape":[1,1],"datatype":"BYTES","data":["q"]},{"name":"documents",'
    body += b'"shape":[1,4000],"datatype":"BYTES","data":[' + b",".join([b'"' + b"word " * 60 + b'"'] * 4000) + b"]}]}"
    head = f"POST /v2/models/onnx-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)
    with http_client(server) as client:
        assert ask(client, "onnx-fp32", QUERY, DOCUMENTS[:1]) == pytest.approx(
            ask(client, "onnx-fp32", QUERY, DOCUMENTS[:1])
        )
        deadline = time.monotonic() + 20
        while pending(client, "onnx-fp32") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert pending(client, "onnx-fp32") == 0


def pending(client: Any, model: str) -> int:
    """Requests without an answer."""
    counts = client.get_inference_statistics(model)["model_stats"][0]["inference_stats"]
    return -sum(int(counts[key]["count"]) for key in ("success", "fail")) + int(counts["queue"]["count"])


# Loading.


def test_damaged_model_leaves_the_others(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    for name in ("good", "bad"):
        publish(artifact, tmp_path, name, TritonOptions())
    entry = tmp_path / "bad" / "1" / "artifact" / Manifest.read(artifact).entry
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    with pytest.raises(ServerError, match="sha256 differs|failed to load"), TritonServer(tmp_path):
        pass
    with (
        TritonServer(tmp_path, arguments=["--exit-on-error=false", "--strict-readiness=false"]) as running,
        http_client(running) as client,
    ):
        assert not client.is_model_ready("bad")
        reason = next(model for model in client.get_model_repository_index() if model["name"] == "bad")["reason"]
        assert "sha256 differs from manifest.json" in reason
        assert ask(client, "good", QUERY, DOCUMENTS[:1])


def test_new_version_takes_over_without_a_gap(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    first, second = demo_artifacts["onnx", "fp32"], demo_artifacts["onnx", "int8"]
    publish(first, tmp_path / "models", "reranker", TritonOptions())
    arguments = ["--model-control-mode=explicit", "--load-model=reranker"]
    stop, answers, errors = threading.Event(), [], []
    with TritonServer(tmp_path / "models", arguments=arguments) as running, grpc_client(running) as client:

        def keep_asking() -> None:
            while not stop.is_set():
                try:
                    answers.append(ask(client, "reranker", QUERY, DOCUMENTS[:2]))
                except Exception as error:  # what a user would see
                    errors.append(error)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        time.sleep(0.3)
        publish(second, tmp_path / "models", "reranker", TritonOptions())
        client.load_model("reranker")
        time.sleep(0.3)
        stop.set()
        asking.join()
        after = ask(client, "reranker", QUERY, DOCUMENTS[:2])
    assert not errors
    for artifact, scores in ((first, answers[0]), (second, after)):
        with load(artifact) as runtime:
            expected = runtime.predict([(QUERY, document) for document in DOCUMENTS[:2]])
            np.testing.assert_allclose(scores, expected, atol=tolerance(artifact))
    assert answers[0] != after


def test_response_cache_and_stop_leaves_nothing(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    publish(artifact, tmp_path, "reranker", TritonOptions(response_cache=True))
    with (
        TritonServer(tmp_path, arguments=["--cache-config=local,size=1048576"]) as running,
        http_client(running) as client,
    ):
        pid, scratch = running.pid, running.log.parent
        assert pid and scratch.exists()
        answers = [ask(client, "reranker", QUERY, DOCUMENTS) for _ in range(3)]
        assert answers[0] == answers[1] == answers[2] != ask(client, "reranker", QUERY + "?", DOCUMENTS)
        counts = client.get_inference_statistics("reranker")["model_stats"][0]["inference_stats"]
        assert int(counts["cache_hit"]["count"]) == 2
        with pytest.raises(Exception, match="response cache does not tell requests with other parameters apart"):
            ask(client, "reranker", "another query", DOCUMENTS, parameters={"long_documents": "chunks"})

        async def ask_backend() -> None:
            backend = TritonBackend(f"127.0.0.1:{running.grpc_port}", "reranker")
            try:
                with pytest.raises(InputError, match="from a cache that ignores parameters. Leave out top_chunks"):
                    await backend.score(QUERY, DOCUMENTS, {"top_chunks": 2})
            finally:
                await backend.close()

        asyncio.run(ask_backend())
    assert not scratch.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def test_what_waits_is_a_metric(server: TritonServer) -> None:
    with grpc_client(server) as client:
        ask(client, "onnx-fp32", QUERY, DOCUMENTS)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        text = answer.read().decode()
    for name in ("ettin_waiting_pairs", "ettin_queue_seconds"):
        assert f"# TYPE {name} gauge" in text
        assert f'{name}{{model="onnx-fp32",version="1"}} 0' in text


def test_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="tritonserver did not start: "), TritonServer(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_command_serves_and_takes_its_server_along(
    demo_artifacts: Artifacts, tmp_path: Path, sent: signal.Signals
) -> None:
    ports = []
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    options = [f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    code = "from ettin.runtimes.commands.triton import main; main()"
    artifact = str(demo_artifacts["onnx", "fp32"])
    words = [sys.executable, "-c", code, artifact, "--repository", str(tmp_path / "models"), "--serve", *options]

    def hear_interrupts() -> None:  # what a shell starts in the background, it starts deaf to them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509
    ) as process:
        try:
            assert process.stderr
            lines = [next(process.stderr) for _ in range(3)]
            assert f"serving on http://127.0.0.1:{ports[0]}" in lines[-1], lines
            servers = psutil.Process(process.pid).children(recursive=True)
            assert any(process.name() == "tritonserver" for process in servers)
            process.send_signal(sent)
            assert process.wait(60) == 0
        finally:
            process.terminate()  # or `with` would wait for ever for one that did not end
    assert not psutil.wait_procs(servers, 10)[1]


# The engine in a backend of Triton's own. None of those is here: Triton reads the configuration and looks for the
# backend; a stand-in of that name, in Python, shows that batches and scores find their way.

STAND_IN = """
import json
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = f"{args['model_repository']}/{args['model_version']}/{config['default_model_filename']}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # those of several instances would wait for each other, at full speed
        self.session = onnxruntime.InferenceSession(folder, options)
        self.names = [tensor["name"] for tensor in config["input"]]
    def execute(self, requests):
        responses = []
        for request in requests:
            feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.names}
            logits = self.session.run(["logits"], feeds)[0]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)]))
        return responses
"""


class WithStandIn(TritonServer):
    def _backends(self) -> Path:
        folder = super()._backends()
        for name in ("onnxruntime", "tensorrt"):
            (folder / name).mkdir()
            (folder / name / "model.py").write_text(STAND_IN)
        return folder


def test_native_configuration_is_read(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    variants = [("onnx", "fp32"), ("openvino", "bf16")]
    for variant in variants:
        publish(demo_artifacts[variant], tmp_path, name_of(variant), TritonOptions(native=True))
    arguments = ["--exit-on-error=false", "--strict-readiness=false", "--disable-auto-complete-config"]
    with TritonServer(tmp_path, arguments=arguments) as running, http_client(running) as client:
        index = {model["name"]: model for model in client.get_model_repository_index()}
        for variant in variants:
            assert "unable to find backend library" in index[f"{name_of(variant)}-engine"]["reason"], index


def test_native_engine(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    publish(artifact, tmp_path, "reranker", TritonOptions(native=True))
    requests = [
        (f"query {index}", [f"text {number} " * (number * index % 70) for number in range(20)]) for index in range(12)
    ]
    with WithStandIn(tmp_path) as running, grpc_client(running) as client, load(artifact) as runtime:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda request: ask(client, "reranker", *request), requests))
        for (query, documents), scores in zip(requests, answers, strict=True):
            expected = runtime.predict([(query, document) for document in documents])
            np.testing.assert_allclose(scores, expected, atol=1e-4)
        # The next version of both.
        publish(artifact, tmp_path, "reranker", TritonOptions(native=True))
    with WithStandIn(tmp_path) as running, grpc_client(running) as client:
        assert ask(client, "reranker", *requests[3]) == pytest.approx(answers[3], abs=1e-4)
        assert client.get_model_metadata("reranker").versions == ["2"]


def test_packed_engine(demo: Checkpoint, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    """What a TensorRT plan is asked for: batches within its limits, by an ONNX model with the plan's interface."""
    manifest = Manifest.read(demo_artifacts["onnx", "fp32"])
    profiles = tuple({name: ShapeRange(min=(1,), opt=(2,), max=(4,)) for name in ("input_ids", "cu_seqlens", "longest")}
                     for _ in range(2))  # fmt: skip
    plan = manifest.model_copy(
        update={
            "target": "trt", "precision": "bf16", "entry": "engine/model.engine", "interface": PACKED,
            "graph": manifest.graph.model_copy(update={"batch_tokens": 512, "batch_pairs": 8}),
            "engine": Engine(arch="sm_90", profiles=profiles, fused_attentions=None),
        }
    )  # fmt: skip
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    packed_onnx(rewrite(demo), "float32", artifact / "engine" / "model.engine")
    shutil.copy2(demo_artifacts["onnx", "fp32"] / "tokenizer.json", artifact)
    plan = plan.model_copy(update={"files": list_files(artifact)})
    (artifact / "manifest.json").write_bytes(plan.to_bytes())
    publish(artifact, tmp_path / "models", "reranker", TritonOptions(native=True))
    config = (tmp_path / "models" / "reranker-engine" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in config and 'profile: "0"' in config and 'profile: "1"' in config
    assert [path.name for path in (tmp_path / "models" / "reranker-engine" / "1").iterdir()] == ["model.engine"]
    requests = [
        (f"query {index}", [f"text {number} " * (number * index % 70) for number in range(20)]) for index in range(12)
    ]
    with WithStandIn(tmp_path / "models") as running, grpc_client(running) as client:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda request: ask(client, "reranker", *request), requests))
        stats = client.get_inference_statistics("reranker-engine", as_json=True)["model_stats"][0]
        assert 12 * 20 / 8 <= int(stats["inference_stats"]["success"]["count"]) < 12 * 20
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        for (query, documents), scores in zip(requests, answers, strict=True):
            expected = runtime.predict([(query, document) for document in documents])
            np.testing.assert_allclose(scores, expected, atol=1e-4)
