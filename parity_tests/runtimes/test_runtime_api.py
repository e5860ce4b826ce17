"""`predict` and `rank`: CrossEncoder's arguments and semantics."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ettin.artifacts.errors import Closed, DamagedArtifact, EttinError, HardwareError, InputError, UsageError
from ettin.export.proof_pairs import natural_pairs
from ettin.runtimes import Batch, Runtime, load
from ettin.runtimes.batch import cut

QUERY = "Which planet is known as the Red Planet?"
PLANETS = (Path(__file__).parents[2] / "examples" / "planets.txt").read_text().splitlines()
PAIRS = [(QUERY, planet) for planet in PLANETS] + [("", "no query"), ("no document", ""), ("", "")]


@pytest.fixture(scope="module", params=["onnx", "openvino", "transformers"])
def runtime(request: pytest.FixtureRequest, demo_artifacts: dict[tuple[str, str], Path]) -> Any:
    with load(demo_artifacts[request.param, "fp32"]) as loaded:
        yield loaded


def test_predict_equals_cross_encoder(runtime: Runtime, demo_gold: Any) -> None:
    demo_gold.max_seq_length = 7999
    scores = runtime.predict(PAIRS)
    assert scores.dtype == np.float32 and scores.shape == (len(PAIRS),)
    np.testing.assert_allclose(scores, demo_gold.predict([list(pair) for pair in PAIRS]), atol=1e-4)


def test_rank_equals_cross_encoder(runtime: Runtime, demo_gold: Any) -> None:
    for arguments in (
        {},
        {"top_k": 2},
        {"return_documents": True},
        {"top_k": 0},
        {"top_k": 99, "return_documents": True},
    ):
        ours, theirs = runtime.rank(QUERY, PLANETS, **arguments), demo_gold.rank(QUERY, PLANETS, **arguments)
        assert [(hit["corpus_id"], hit.get("text")) for hit in ours] == [
            (hit["corpus_id"], hit.get("text")) for hit in theirs
        ]
        np.testing.assert_allclose([hit["score"] for hit in ours], [hit["score"] for hit in theirs], atol=1e-4)
    assert "Mars" in PLANETS[runtime.rank(QUERY, PLANETS)[0]["corpus_id"]]


def test_many_pairs_keep_their_order(runtime: Runtime, demo_gold: Any) -> None:
    """Over several windows of tokenising and many batches."""
    pairs = [(pair.query, pair.document[: 40 + index]) for index, pair in enumerate(natural_pairs()[:60])]
    expected = runtime.predict(pairs)
    generator = np.random.default_rng(0)
    order = generator.integers(0, len(pairs), 2500)
    np.testing.assert_allclose(
        runtime.predict([pairs[at] for at in order], max_length=7999), expected[order], atol=1e-4
    )
    demo_gold.max_seq_length = 7999
    np.testing.assert_allclose(expected, demo_gold.predict([list(pair) for pair in pairs]), atol=2e-4)


@pytest.mark.parametrize(
    "inputs",
    [
        [list(pair) for pair in PAIRS],
        tuple(PAIRS),
        np.array(PAIRS),
        np.array(PAIRS, dtype=object),
        (pair for pair in PAIRS),
        [np.array(pair) for pair in PAIRS],
        dict.fromkeys(PAIRS).keys(),
    ],
    ids=["lists", "tuples", "array", "object array", "generator", "list of arrays", "keys view"],
)
def test_what_users_pass(demo_artifacts: dict[tuple[str, str], Path], inputs: Any) -> None:
    with load(demo_artifacts["openvino", "fp32"]) as runtime:
        np.testing.assert_allclose(runtime.predict(inputs), runtime.predict(PAIRS), atol=1e-5)


@pytest.mark.parametrize("pair", [(QUERY, PLANETS[1]), [QUERY, PLANETS[1]], np.array([QUERY, PLANETS[1]])])
def test_one_pair_is_one_scalar(runtime: Runtime, pair: Any) -> None:
    score = runtime.predict(pair)
    assert isinstance(score, np.float32)
    assert score == pytest.approx(float(runtime.predict([tuple(pair)])[0]), abs=1e-5)


def test_nothing_gives_nothing(runtime: Runtime) -> None:
    assert runtime.predict([]).shape == (0,) and runtime.predict([]).dtype == np.float32
    assert runtime.predict(iter(())).shape == (0,)
    assert runtime.rank(QUERY, []) == []


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batch_size_does_not_change_scores(runtime: Runtime, batch_size: int) -> None:
    np.testing.assert_allclose(runtime.predict(PAIRS, batch_size=batch_size), runtime.predict(PAIRS), atol=1e-5)


def test_batch_size_bounds_batches(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        sizes: list[int] = []
        original = runtime.score
        monkeypatch.setattr(runtime.scheduler, "_score", lambda batch: (sizes.append(len(batch)), original(batch))[1])
        runtime.predict(PAIRS, batch_size=2)
    assert max(sizes) <= 2 and sum(sizes) == len(PAIRS)


def test_activations(runtime: Runtime) -> None:
    logits = runtime.predict(PAIRS)
    expected = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for activation in ("sigmoid", torch.nn.Sigmoid()):
        np.testing.assert_allclose(runtime.predict(PAIRS, activation_fn=activation), expected, rtol=1e-5)
    for activation in ("identity", torch.nn.Identity(), None):
        np.testing.assert_array_equal(runtime.predict(PAIRS, activation_fn=activation), logits)
    np.testing.assert_allclose(runtime.predict(PAIRS, activation_fn=lambda logits: logits * 2), logits * 2)
    with pytest.raises(UsageError, match="expected one of: identity, sigmoid, calibrated, or a function"):
        runtime.predict(PAIRS, activation_fn="softmax")
    with pytest.raises(UsageError, match="expected the same shape"):
        runtime.predict(PAIRS, activation_fn=lambda logits: logits[:1])


def test_sigmoid_breaks_no_ties_and_does_not_overflow() -> None:
    from ettin.runtimes.arguments import sigmoid

    scores = sigmoid(np.array([-1000, -12.5, -12.25, 0, 12, 1000], np.float32))
    assert scores[0] == 0 and scores[-1] == 1 and len(set(scores.tolist())) == 6 and scores.dtype == np.float32


def test_max_length_truncates_like_cross_encoder(demo_artifacts: dict[tuple[str, str], Path], demo_gold: Any) -> None:
    pairs = [(QUERY, " ".join(PLANETS * 5)), (" ".join(PLANETS), "short")]
    demo_gold.max_seq_length = 40
    expected = demo_gold.predict([list(pair) for pair in pairs])
    demo_gold.max_seq_length = 7999
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        np.testing.assert_allclose(runtime.predict(pairs, max_length=40), expected, atol=1e-4)
        assert runtime.rank(*pairs[0][:1], [pairs[0][1]], max_length=40)[0]["score"] == pytest.approx(
            expected[0], abs=1e-4
        )
        assert abs(runtime.predict(pairs) - expected).max() > 1e-2
        for wrong in (2, 8000, 0, "512"):
            with pytest.raises(UsageError, match="expected 3 to 7999 tokens"):
                runtime.predict(pairs, max_length=wrong)  # type: ignore[arg-type]
    with load(demo_artifacts["onnx", "fp32"], max_length=40) as runtime:
        np.testing.assert_allclose(runtime.predict(pairs), expected, atol=1e-4)
    with pytest.raises(UsageError, match="max_length is 8000"):
        load(demo_artifacts["onnx", "fp32"], max_length=8000)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "found str 'text'"),
        (7, "found int 7"),
        ({"query": "a"}, "found a dict"),
        ([("a", "b"), ("a",)], "pair 1: expected 2 texts (query, document), found 1"),
        ([("a", "b", "c")], "pair 0: expected 2 texts (query, document), found 3"),
        ([("a", "b"), ("a", 3)], "pair 1, document: expected a string, found int 3"),
        ([(None, "b")], "pair 0, query: expected a string, found NoneType"),
        ([("a", b"bytes")], "pair 0, document: expected a string, found bytes"),
        (("a", "b", "c"), "the pair: expected 2 texts"),
        (["a", "b", "c"], "the pair: expected 2 texts"),
        ([("a", "b"), "text"], "pair 1: expected (query, document), found str"),
        ([("a", "\ud800")], "not valid Unicode"),
        (np.array([1.0, 2.0]), "expected a string, found float"),
    ],
)
def test_what_is_no_pair_is_named(demo_artifacts: dict[tuple[str, str], Path], inputs: Any, message: str) -> None:
    with load(demo_artifacts["openvino", "fp32"]) as runtime, pytest.raises(InputError) as error:
        runtime.predict(inputs)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_arguments_of_rank(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="documents: expected a list of strings, found str"):
        runtime.rank(QUERY, "one document")
    with pytest.raises(InputError, match="document 1: expected a string, found NoneType"):
        runtime.rank(QUERY, ["a", None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="query: expected a string"):
        runtime.rank(3, ["a"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="top_k is -1"):
        runtime.rank(QUERY, ["a"], top_k=-1)
    with pytest.raises(UsageError, match="batch_size is 0"):
        runtime.rank(QUERY, ["a"], batch_size=0)
    with pytest.raises(UsageError, match=r"torch\.from_numpy"):
        runtime.predict([("a", "b")], convert_to_tensor=True)


def test_progress_bar_goes_to_stderr(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    runtime.predict(PAIRS, show_progress_bar=True)
    assert capsys.readouterr().out == ""


def test_several_threads_get_their_own_scores(runtime: Runtime) -> None:
    expected = {at: runtime.predict([PAIRS[at]] * 3) for at in range(len(PAIRS))}
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(6):
            at = (worker + turn) % len(PAIRS)
            np.testing.assert_allclose(runtime.predict([PAIRS[at]] * 3), expected[at], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_closed_runtime_says_so(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    runtime = load(demo_artifacts["openvino", "fp32"])
    runtime.close()
    runtime.close()
    with pytest.raises(EttinError, match="this runtime is closed"):
        runtime.predict(PAIRS)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_close_ends_predict_in_other_threads(demo_artifacts: dict[tuple[str, str], Path], target: str) -> None:
    """Finding 3: of 48 threads, 28 with ONNX Runtime and 39 with OpenVINO waited for ever, or saw a RuntimeError."""
    outcomes: list[str] = []

    def ask(runtime: Runtime) -> None:
        try:
            runtime.predict(PAIRS * 100)
            outcomes.append("scored")
        except Closed as error:
            assert "this runtime is closed. Load it again" in str(error)
            outcomes.append("closed")

    for delay_s in (0.0, 0.01, 0.05, 0.2):
        runtime = load(demo_artifacts[target, "fp32"])
        threads = [threading.Thread(target=ask, args=(runtime,), daemon=True) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(delay_s)
        runtime.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert len(outcomes) == 48 and "closed" in outcomes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("target", "precision"), [("onnx", "int8"), ("openvino", "int8"), ("transformers", "fp32")])
def test_a_forked_child_is_refused_at_once(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, target: str, precision: str
) -> None:
    """Finding 4: the engine's threads do not survive a fork; a child that used it, or freed it, waited for ever."""
    program = tmp_path / "forks.py"
    program.write_text(FORKS)
    command = [sys.executable, "-W", "ignore", program, demo_artifacts[target, precision]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "Closed: this runtime was loaded in process" in done.stdout and "engines do not survive a fork" in done.stdout
    )
    assert done.stdout.splitlines()[-2:] == ["child ended with 0", "parent scores"]


FORKS = """
import gc, multiprocessing, os, signal, sys
from ettin.runtimes import load
runtime = load(sys.argv[1])
runtime.predict([("a", "b")] * 50)
sys.stdout.flush()
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        runtime.predict([("a", "b")])
    except Exception as error:
        print(type(error).__name__ + ":", error)
    runtime.close()
    del runtime
    gc.collect()
    with load(sys.argv[1]) as fresh:
        fresh.predict([("a", "b")])
    sys.exit(0)
print("child ended with", os.waitpid(child, 0)[1])
runtime.predict([("a", "b")] * 50)
print("parent scores")
"""


def test_a_runtime_pickles_to_its_path_and_settings(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["onnx", "int8"], artifact)
    with load(artifact, threads=1, max_length=40) as runtime:
        scores, pickled = runtime.predict(PAIRS), pickle.dumps(runtime)
    assert len(pickled) < 4096
    with pickle.loads(pickled) as again:  # noqa: S301 (our own)
        np.testing.assert_array_equal(again.predict(PAIRS), scores)
        assert again.max_length == 40 and again.limits.concurrency == 1
    shutil.rmtree(artifact)
    shutil.copytree(demo_artifacts["onnx", "fp32"], artifact)
    with pytest.raises(DamagedArtifact, match="another artifact than the one whose runtime was pickled"):
        pickle.loads(pickled)  # noqa: S301


def test_an_error_in_a_batch_reaches_the_caller(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(demo_artifacts["onnx", "fp32"]) as runtime:

        def fail(batch: Batch) -> Any:
            raise HardwareError("the engine is gone")

        monkeypatch.setattr(runtime.scheduler, "_score", fail)
        with pytest.raises(HardwareError, match="the engine is gone"):
            runtime.predict(PAIRS * 10)


def test_device_is_never_replaced(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(UsageError, match="target 'onnx' does not run on device 'tpu', expected one of: cpu, cuda"):
        load(demo_artifacts["onnx", "fp32"], device="tpu")
    with pytest.raises(UsageError, match="target 'openvino' does not run on device 'cuda', expected one of: cpu$"):
        load(demo_artifacts["openvino", "fp32"], device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match=r"CUDAExecutionProvider.*onnx-gpu"):
            load(demo_artifacts["onnx", "fp32"], device="cuda")
        with pytest.raises(HardwareError, match="torch finds no CUDA device"):
            load(demo_artifacts["transformers", "fp32"], device="cuda")


def test_threads_are_checked(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        load(demo_artifacts["onnx", "fp32"], threads=0)
    with load(demo_artifacts["openvino", "fp32"], threads=1) as runtime:
        assert runtime.limits.concurrency == 1


def test_description_says_what_runs(runtime: Runtime) -> None:
    assert runtime.manifest.precision in repr(runtime) and runtime.description in repr(runtime)


def test_cut_uses_every_index_once_within_budget() -> None:
    lengths = [5, 900, 17, 64, 64, 63, 1, 0, 300, 12]
    batches = list(cut(lengths, max_tokens=256, multiple=8, max_pairs=4))
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    for batch in batches:
        width = -(-max(lengths[at] for at in batch) // 8) * 8
        assert len(batch) == 1 or width * len(batch) <= 256
        assert len(batch) <= 4
    assert batches[0] == [1]


def test_batch_pads_to_a_multiple() -> None:
    batch = Batch.of([np.array([1, 2, 3], np.int32), np.array([4], np.int32)], pad_token_id=9)
    ids, mask = batch.padded(4)
    assert ids.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]] and mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64 and len(batch) == 2 and batch.longest == 3
    assert batch.padded()[0].shape == (2, 3)
