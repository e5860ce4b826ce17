"""Our kernels on rows in OpenVINO graphs: where they are used, and where a graph computes something else."""

from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from kernel_cases import HEADS, THETA, Case, first_rows
from kernel_in_openvino import compare_rows, own_rows, rounded, written_and_read
from openvino import opset15 as op
from openvino.utils.node_factory import NodeFactory

from ettin.artifacts.errors import EttinError
from ettin.export.targets.openvino_ops import OpenVinoOps
from ettin.graph import ModelShape
from ettin.runtimes import load
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime
from ettin.runtimes.engines.openvino_fusion import use_kernels
from ettin.runtimes.engines.openvino_kernels import SWITCH, compiled, problem, row_kernels, runnable
from ettin.runtimes.machine import has_bf16

Artifacts = dict[tuple[str, str], Path]
OURS = ("AddedNorm", "FirstAttention", "GatedGelu", "RaggedAttention")


@pytest.fixture
def usable() -> None:
    unusable = problem()
    if unusable:
        pytest.skip(f"the kernels can't run here: {unusable.why}")


@pytest.mark.parametrize("floats", ["f32", "bf16"])
def test_rows_in_a_graph(floats: str, usable: None) -> None:
    if row_kernels(floats) is None:
        pytest.skip(f"this processor has no kernels for rows of {floats}")
    compare_rows(floats)


@pytest.mark.parametrize("floats", ["f32", "bf16"])
@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
def test_rows_where_they_are_as_exact(
    floats: str, precision: str, usable: None, demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each residual, norm and gate that is rounded to int8, or all in bf16. OpenVINO's nodes are more exact in f32."""
    if floats == "f32":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    elif not has_bf16() or precision == "fp32":
        pytest.skip("there is no arithmetic in bf16")
    else:
        monkeypatch.setenv(SWITCH, "bf16")
    with load(demo_artifacts["openvino", precision], allow_unverified=True) as runtime:
        assert isinstance(runtime, OpenVinoRuntime) and runtime.precision_hint == floats
        counts = Counter(node.get_type_name() for node in runtime.model_for(64).get_ops())
        layers = ModelShape.from_json(runtime.manifest.source.shape).num_layers
        # The first layer has no norm before attention, and the final norm is not rounded.
        norms = {"f32": {"int8": 2 * layers - 1}, "bf16": {"int8": 2 * layers, "bf16": 2 * layers}}[floats]
        assert counts["AddedNorm"] == norms.get(precision, 0)
        assert counts["GatedGelu"] == (layers if precision in norms else 0)
        assert counts["FirstAttention"] == 1 and counts["RaggedAttention"] == layers - 1
        # Of what remains: the first tokens before the last layer, and what they attend to.
        assert counts["FakeQuantize"] == (2 if precision == "int8" else 0)
        # What follows a product multiplies it by the scales; only the final norm may not be ours.
        readers = readers_of_scales(runtime.model_for(64))
        others = readers - Counter({name: readers[name] for name in OURS})
        assert others == Counter({"Multiply": 1} if precision == "int8" and floats == "f32" else {})
        assert readers["RaggedAttention"] == (layers - 2 if precision == "int8" else 0)


def readers_of_scales(model: ov.Model) -> Counter[str]:
    """What reads the scales of rows that our kernels round, by type; a conversion counts as what reads it."""
    found: Counter[str] = Counter()
    for node in model.get_ops():
        if node.get_type_name() in ("AddedNorm", "GatedGelu") and node.get_output_element_type(0) == ov.Type.i8:
            waiting = list(node.outputs()[-1].get_target_inputs())
            while waiting:
                reader = waiting.pop().get_node()
                if reader.get_type_name() == "Convert":
                    waiting += reader.output(0).get_target_inputs()
                else:
                    found[reader.get_type_name()] += 1
    return found


def normed(x: ov.Node, axis: int = -1, variance: bool = True, eps_mode: str = "inside_sqrt") -> ov.Node:
    return op.mvn(x, op.constant(np.array([axis])), variance, 1e-5, eps_mode)


def with_ours(result: ov.Node, *inputs: ov.Node) -> tuple[ov.Model, list[str]]:
    """The graph that ends with `result` after the rewriting, and the types of our nodes in it."""
    model = ov.Model([result], list(inputs))
    use_kernels(model, next(each for each in runnable() if "f32" in each.floats), "f32")
    return model, own_rows(model)


def tensors(size: int = 64, *rows: int) -> list[ov.Node]:
    return [op.parameter([1, count, size], ov.Type.f32) for count in rows or (-1, -1)]


NORMS = {
    "as it is": (lambda a, b: rounded(normed(op.add(a, b))), True),
    "over another axis": (lambda a, b: rounded(normed(op.add(a, b), axis=1)), False),
    "without variance": (lambda a, b: rounded(normed(op.add(a, b), variance=False)), False),
    "eps outside": (lambda a, b: rounded(normed(op.add(a, b), eps_mode="outside_sqrt")), False),
    "of no sum": (lambda a, b: rounded(normed(op.multiply(a, b))), False),
    "not rounded": (lambda a, b: normed(op.add(a, b)), False),
    "255 levels": (lambda a, b: rounded(normed(op.add(a, b)), levels=255), False),
    "unsigned": (lambda a, b: rounded(normed(op.add(a, b)), low=0.0), False),
    "symmetric range": (lambda a, b: rounded(normed(op.add(a, b)), high=4.0), False),
    "scaled": (lambda a, b: rounded(normed(op.add(a, b)), wider=2.0), False),
    "read by others": (lambda a, b: op.add(rounded(norm := normed(op.add(a, b))), norm), False),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms(usable: None, kind: str) -> None:
    """Only what our kernel computes is replaced."""
    build, is_fused = NORMS[kind]
    inputs = tensors()
    assert with_ours(build(*inputs), *inputs)[1] == ["AddedNorm"] * is_fused


@pytest.mark.parametrize("inputs", [tensors(48), tensors(64, -1, 1), tensors(-1)], ids=["48", "one row", "any size"])
def test_rows_that_the_kernels_do_not_take(usable: None, inputs: list[ov.Node]) -> None:
    assert with_ours(rounded(normed(op.add(*inputs))), *inputs)[1] == []
    assert with_ours(rounded(op.multiply(op.gelu(inputs[0], "erf"), inputs[1])), *inputs)[1] == []


def test_gates(usable: None) -> None:
    up, gate = tensors()
    assert with_ours(rounded(op.multiply(op.gelu(up, "erf"), gate)), up, gate)[1] == ["GatedGelu"]
    assert with_ours(rounded(op.multiply(gate, op.gelu(up, "erf"))), up, gate)[1] == ["GatedGelu"]
    assert with_ours(rounded(op.multiply(op.gelu(up, "tanh"), gate)), up, gate)[1] == []
    assert with_ours(op.multiply(op.gelu(up, "erf"), gate), up, gate)[1] == []
    assert with_ours(rounded(op.add(op.gelu(up, "erf"), gate)), up, gate)[1] == []
    activated = op.gelu(up, "erf")
    assert with_ours(rounded(op.multiply(activated, activated)), up)[1] == []
    activated = op.gelu(up, "erf")
    assert with_ours(op.add(rounded(op.multiply(activated, gate)), activated), up, gate)[1] == []


@pytest.mark.parametrize("chosen", [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("axis", [1, -1])
def test_halves_of_one_tensor(usable: None, axis: int, chosen: tuple[int, int]) -> None:
    """Whichever half is which, the result is that of OpenVINO's nodes, rounded."""

    def graph(is_rounded: bool) -> tuple[ov.Node, ov.Node]:
        joint = op.parameter([1, 64, 64], ov.Type.f32)
        both = op.split(joint, op.constant(np.int64(axis)), 2).outputs()
        gated = op.multiply(op.gelu(both[chosen[0]], "erf"), both[chosen[1]])
        return (rounded(gated) if is_rounded else gated), joint

    ours, names = with_ours(*graph(True))
    result, joint = graph(False)
    assert names == ["GatedGelu"]
    x = np.random.default_rng(0).standard_normal((1, 64, 64), np.float32)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    found, exact = (
        ov.Core().compile_model(model, "CPU", options)([x])[0] for model in (ours, ov.Model([result], [joint]))
    )
    assert (abs(found - exact) <= 0.51 * abs(exact).max(-1, keepdims=True) / 127).all()


# From rounded rows and weights [in, out].
READERS = {
    "a product": lambda rows, weights: op.matmul(rows, weights, False, False),
    "a product of the other factor": lambda rows, weights: op.matmul(weights, rows, False, True),
    "a product of columns": lambda rows, weights: op.matmul(rows, rows, True, False),
    "several": lambda rows, weights: op.add(
        op.matmul(product := op.matmul(rows, weights, False, False), weights, False, False), op.add(product, rows)
    ),
    "a product with a vector": lambda rows, weights: op.matmul(
        rows, op.reduce_sum(weights, op.constant(np.array([0]))), False, False
    ),
    "no product": lambda rows, weights: op.abs(rows),
}


@pytest.mark.parametrize("kind", READERS)
def test_whatever_reads_rounded_rows_has_their_scales(usable: None, kind: str) -> None:
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.integers(-2, 3, (1, 64, 1))  # a step for all rows would lose the small ones
    x, gate = (random.standard_normal((1, 64, 64), np.float32) for _ in range(2))
    weights = np.eye(64, dtype=np.float32)  # so that rows stay apart

    def graph(is_rounded: bool) -> tuple[ov.Node, list[ov.Node]]:
        inputs = tensors(64, 64, 64)
        gated = op.multiply(op.gelu(inputs[0], "erf"), inputs[1])
        return READERS[kind](rounded(gated) if is_rounded else gated, op.constant(weights)), inputs

    result, inputs = graph(True)
    ours, names = with_ours(result, *inputs)
    result, inputs = graph(False)
    assert names == ["GatedGelu"]
    data = [x, (gate * sizes).astype(np.float32)]
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    found, exact = (
        ov.Core().compile_model(model, "CPU", options)(data)[0] for model in (ours, ov.Model([result], inputs))
    )
    axes = {"a product of the other factor": -2, "a product of columns": None}  # in which magnitudes differ
    largest = sizes[..., 0] if kind == "a product with a vector" else abs(exact).max(axes.get(kind, -1), keepdims=True)
    room = 0.02 * largest * (8 if kind == "a product with a vector" else 1)
    assert (abs(found - exact) <= room).all()


def test_what_is_multiplied_by_another_result_of_ours(usable: None) -> None:
    """A gated product that is not rounded is no scale."""
    if row_kernels("bf16") is None:
        pytest.skip("this processor has no kernels for rows of bf16")
    up, gate, other = tensors(64, -1, -1, -1)
    gated = op.multiply(op.gelu(up, "erf"), gate)
    residual = op.add(other, op.multiply(other, gated))
    model = ov.Model([rounded(normed(residual))], [up, gate, other])
    use_kernels(model, next(each for each in runnable() if "bf16" in each.floats), "bf16")
    assert own_rows(model) == ["AddedNorm", "GatedGelu"]
    (norm,) = [node for node in model.get_ops() if node.get_type_name() == "AddedNorm"]
    assert norm.get_input_size() == 2


def attention_request(heads: int, first_only: bool) -> ov.InferRequest:
    """Attention of any batch. It takes queries, keys and what values are made of, [batch, tokens, 64], and bounds."""
    q, k, x = (op.parameter([-1, -1, 64], ov.Type.f32) for _ in range(3))
    bounds = op.parameter([-1], ov.Type.i64)
    values = op.matmul(x, op.constant(np.ones((64, 64), np.float32)), False, True)
    mixed = OpenVinoOps({}, op.constant).ragged_attention(q, k, values, bounds, heads, -1, THETA, first_only, "")
    core, model = written_and_read(ov.Model([mixed], [q, k, x, bounds]))
    use_kernels(model, next(each for each in runnable() if each.products == "f32"), "f32")
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()


@pytest.mark.parametrize("first_only", [False, True])
def test_batches_of_none_that_a_damaged_graph_may_give(usable: None, first_only: bool) -> None:
    """Rows were read from tensors that have none."""
    request = attention_request(2, first_only)
    nothing = np.ones((0, 4, 64), np.float32)
    queries = np.ones((1, 1, 64), np.float32) if first_only else nothing
    request.start_async([queries, nothing, nothing, np.array([0, 4])])
    with pytest.raises(RuntimeError, match=r"Attention: keys are \[0,4,64\]"):
        request.wait()


def test_scales_that_a_damaged_graph_may_have(usable: None) -> None:
    """They would be read beyond their end."""
    factory = NodeFactory()
    factory.add_extension(str(compiled()))
    q, k, v = tensors(64, -1, -1, -1)
    bounds, scales = op.parameter([-1], ov.Type.i64), op.parameter([-1], ov.Type.f32)
    attributes = {"heads": 2, "window": -1, "theta": THETA, "first_only": False, "variant": "", "step": 0.0}
    attributes["variant"] = next(each.name for each in runnable() if each.products == "f32")
    inputs = [q, k, v, bounds, scales]
    attention = factory.create("RaggedAttention", [each.output(0) for each in inputs], attributes)
    core = ov.Core()
    core.add_extension(str(compiled()))
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(ov.Model([attention], inputs), "CPU", options).create_infer_request()
    rows = np.ones((1, 4, 64), np.float32)
    request.start_async([rows, rows, rows, np.array([0, 4], np.int64), np.ones(3, np.float32)])
    with pytest.raises(RuntimeError, match=r"RaggedAttention: 4 scales are expected, found \[3\]"):
        request.wait()


@pytest.mark.parametrize("threads", [1, 2])
def test_what_goes_wrong_in_a_node_is_said(usable: None, demo_artifacts: Artifacts, threads: int) -> None:
    """OpenVINO returned what memory held, on one thread."""
    with load(demo_artifacts["openvino", "int8"], allow_unverified=True, threads=threads) as runtime:
        assert isinstance(runtime, OpenVinoRuntime)
        assert runtime._kernel
        runtime._kernel = runtime._kernel._replace(name="nothing")
        runtime._forms.clear()  # compiled again
        with pytest.raises(EttinError, match="RaggedAttention: 'nothing' can't run here"):
            runtime.predict([("query", "document")])


def nothing_of(x: ov.Node) -> ov.Node:
    """0, computed from x."""
    return op.multiply(op.reduce_sum(x, op.constant(np.array([0, 1, 2]))), op.constant(np.float32(0)))


# From rows, x and weights [out, in].
PROJECTIONS = {
    "constants": lambda rows, x, weights: op.matmul(rows, op.constant(weights), False, True),
    "another way round": lambda rows, x, weights: op.matmul(rows, op.constant(weights.T.copy()), False, False),
    "with a bias": lambda rows, x, weights: op.add(
        op.matmul(rows, op.constant(weights), False, True), op.constant(np.zeros(len(weights), np.float32))
    ),
    "computed": lambda rows, x, weights: op.matmul(rows, op.add(op.constant(weights), nothing_of(x)), False, True),
    "keys of something else": lambda rows, x, weights: op.matmul(rows, op.constant(weights), False, True),
}


@pytest.mark.parametrize("is_int8", [True, False])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_values_are_projected_last(usable: None, kind: str, is_int8: bool) -> None:
    """Only where the projection is a product with constants alone, and keys have its scales; as the formula has it."""
    case = Case(32, 5, True, (9, 1, 4))
    width, tokens, random = HEADS * case.head_dim, sum(case.lengths), np.random.default_rng(0)
    q, other, x, added = (op.parameter([1, -1, width], ov.Type.f32) for _ in range(4))
    bounds = op.parameter([-1], ov.Type.i64)
    rows = rounded(normed(op.add(x, added))) if is_int8 else op.add(x, added)
    weights, of_keys = (random.standard_normal((width, width), np.float32) / 8 for _ in range(2))
    values, has_own_keys = PROJECTIONS[kind](rows, x, weights), kind == "keys of something else"
    keys = op.add(other, nothing_of(x)) if has_own_keys else op.matmul(rows, op.constant(of_keys), False, True)
    mixed = OpenVinoOps({}, op.constant).ragged_attention(q, keys, values, bounds, HEADS, case.window, THETA, True, "")
    core, model = written_and_read(ov.Model([mixed], [q, other, x, added, bounds]))
    use_kernels(model, next(each for each in runnable() if each.products == "f32"), "f32")
    names = [node.get_type_name() for node in model.get_ops()]
    assert names.count("FirstAttention") == (kind == "constants" or (has_own_keys and not is_int8))

    arrays = [random.standard_normal((tokens, width), np.float32) for _ in range(4)]
    data = [arrays[0][case.bounds[:-1]], *arrays[1:]]
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        [*(each[None] for each in data), case.bounds]
    )
    total = arrays[2] + arrays[3]
    if is_int8:  # the norm, rounded with a scale for each row
        total = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + 1e-5)
        step = abs(total).max(-1, keepdims=True) / 127
        total = np.round(total / step) * step
    of_keys = arrays[1] if has_own_keys else total @ of_keys.T
    of_values = (total @ weights.T).astype(np.float64)
    wanted = first_rows(case, arrays[0], of_keys, of_values).reshape(-1, HEADS, HEADS, case.head_dim)
    wanted = np.stack([wanted[:, head, head] for head in range(HEADS)], 1).reshape(-1, width)
    np.testing.assert_allclose(found[0][0], wanted, atol=2e-3 if is_int8 else 1e-5)


BAD_BOUNDS = {"beyond the tokens": [0, 9], "falling": [0, 3, 2], "negative": [-1, 3], "none": []}


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("kind", BAD_BOUNDS)
def test_bounds_that_a_damaged_graph_may_give(usable: None, kind: str, first_only: bool) -> None:
    """They read what is behind the tokens, or ended the process."""
    request = attention_request(2, first_only)
    rows = np.ones((1, 4, 64), np.float32)
    count = max(len(BAD_BOUNDS[kind]) - 1, 0) if first_only else 4
    request.start_async([rows[:, :count], rows, rows, np.array(BAD_BOUNDS[kind], np.int64)])
    with pytest.raises(RuntimeError, match="Attention: cu_seqlens must not decrease and must end within 4 tokens"):
        request.wait()


@pytest.mark.parametrize("heads", [0, -1, 3])
@pytest.mark.parametrize("first_only", [False, True])
def test_heads_that_a_damaged_graph_may_have(usable: None, heads: int, first_only: bool) -> None:
    """Without heads, a division by 0 ended the process."""
    with pytest.raises(RuntimeError, match=f"RaggedAttention: rows of 64 are not those of {heads} heads"):
        request = attention_request(heads, first_only)
        rows = np.ones((1, 4, 64), np.float32)
        request.start_async([rows[:, :1] if first_only else rows, rows, rows, np.array([0, 4], np.int64)])
        request.wait()
