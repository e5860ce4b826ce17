"""What the runtime changes in an OpenVINO graph before it is compiled: our own kernels instead of OpenVINO's nodes.

Where the graph rounds a norm or a gated product to int8 with one step for all, our kernels choose a scale for each row,
the largest magnitude in it. So no value lies beyond the range, and one large token costs no other token its precision.
The products of a row are multiplied by its scale, which the next kernel does as it reads them. Measured with trained
weights in the 17m shape, on 1,600 pairs of SciFact training queries with candidates of BM25: the standard deviation of
the error falls from 0.058 to 0.036.

The graph in an artifact does not depend on a processor. Here it gets the kernels that this processor runs fastest.
Measured with the 17m shape, 6 pairs of 176 tokens on one thread of a Zen 4 processor (AVX-512 with VNNI and bf16), all
that is no linear layer and no attention: 2.6 → 2.2 ms of 24.5 ms in int8, 3.9 → 2.5 ms of 41.5 ms in bf16. In int8, the
linear layers take 1.4 ms less because they need not compute the GELU. Scales for each row have since cost int8 0.5 ms.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as op
from openvino.utils.node_factory import NodeFactory

from ettin.runtimes.engines.openvino_kernels import HEAD_DIMS, OPERATION, ROW_MULTIPLE, Variant, compiled, row_kernels

_Create = Callable[..., ov.Node]  # a node of ours: name, inputs, attributes
_OTHER = {"f32": (ov.Type.bf16,), "bf16": (ov.Type.f32,)}  # what is converted for kernels that take these floats
_OF_ROWS = (ov.Type.f32, ov.Type.bf16, ov.Type.i8)  # elements of what our kernels on rows take
_ROUNDING_KERNELS = ("AddedNorm", "GatedGelu")  # whose last output has the scales of rows
_LINEAR = {"transpose_a": False, "transpose_b": True}
_MOST_BLOCKS = 2**20  # elements of a projection as one matrix for all heads


def without(model: ov.Model, names: tuple[str, ...]) -> ov.Model:
    """A copy of the graph without the nodes whose names begin with one of `names`.

    Measured with the 17m shape in int8 on two cores with AMX, without the nodes that change nothing in one block:
    5 to 8 % more SQuAD pairs/s, 3 to 6 % more of SciFact.
    """
    model = model.clone()
    for node in model.get_ordered_ops():
        if node.get_friendly_name().startswith(names):
            node.output(0).replace(node.input_value(0))
    model.validate_nodes_and_infer_types()
    return model


def widen_products(model: ov.Model) -> None:
    """Gives the products with int8 weights a fourth dimension, which changes no result.

    Without it, OpenVINO's plugin for ARM (seen with 2026.4.1) multiplies all columns by the scale of the first one: it
    merges the scales with a product of two or three dimensions.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _is_int8(node.input_value(1).get_node()):
            axis = op.constant(np.int64(0))
            wide = op.matmul(op.unsqueeze(node.input_value(0), axis), node.input_value(1), **_transposed(node))
            node.output(0).replace(op.squeeze(wide, axis).output(0))
    model.validate_nodes_and_infer_types()


def _is_int8(weights: ov.Node) -> bool:
    """Whether these are constants of int8 times a scale."""
    if weights.get_type_name() != "Multiply":
        return False
    whole = weights.input_value(0).get_node()
    return bool(whole.get_type_name() == "Convert" and whole.input_value(0).get_element_type() == ov.Type.i8)


def _transposed(product: ov.Node) -> dict[str, bool]:
    attributes = product.get_attributes()
    return {name: attributes[name] for name in ("transpose_a", "transpose_b")}


def use_kernels(model: ov.Model, attention: Variant, floats: str) -> None:
    """Makes the graph's attention run in a variant of our kernel, and what lies between the products in our others.

    Args:
        model: a ragged graph; it is changed.
        attention: the variant.
        floats: what the graph computes in between products, "f32" or "bf16".
    """
    attentions = [node for node in model.get_ordered_ops() if node.get_type_name() == OPERATION]
    for node in attentions:
        node.set_attribute("variant", attention.name)
        if floats == "f32":  # the graph has conversions to bf16 around it
            for index in range(3):
                node.input(index).replace_source_output(_without_conversion(node.input_value(index)))
    kernels = row_kernels(floats)
    create = _creator(kernels, floats) if kernels else None
    if create:
        _fuse_rows(model, floats, create)
    for node in attentions:
        if create and _project_first(node, floats, create):
            continue
        _scale_attention(node)
        if attention.rounds:
            _round_attention(node)
    model.validate_nodes_and_infer_types()


def _scale_attention(node: ov.Node) -> None:
    """Lets the kernel multiply queries, keys and values by the scales of their rows; for first tokens, no queries."""
    first = 1 if node.get_attributes()["first_only"] else 0
    inputs = node.input_values()
    scaled = [_scaled(x) for x in inputs[first:3]]
    scales = scaled[0][1]
    if not scales or any(other != scales for _, other in scaled):
        return
    inputs[first:3] = [op.convert(x, inputs[0].get_element_type()).output(0) for x, _ in scaled]
    node.set_arguments([*inputs, *scales])


def _round_attention(node: ov.Node) -> None:
    """Lets the kernel round its result to int8, where that is all that it is read for."""
    (converted,) = _readers(node.output(0))
    rounding = _rounding(converted)
    if rounding is not None:
        step = _step(rounding)
        node.set_attribute("step", step)
        node.validate_and_infer_types()
        rounding.output(0).replace(_times(node.output(0), step))


def _creator(kernels: str, floats: str) -> _Create:
    factory = NodeFactory()
    factory.add_extension(str(compiled()))

    def create(name: str, inputs: list[ov.Output], attributes: Mapping[str, object]) -> ov.Node:
        inputs = [op.convert(x, floats).output(0) if x.get_element_type() in _OTHER[floats] else x for x in inputs]
        return factory.create(name, inputs, {"kernels": kernels, "eps": 0.0, "rounds": False, **attributes})

    return create


def _project_first(node: ov.Node, floats: str, create: _Create) -> bool:
    """Attention of the first tokens before the projection of values, in place of after it; whether that was possible.

    It is the last layer's: values are then projected for a row of each head, in place of a row of each token. Measured
    with the 17m shape, this is 1.4 % of the whole.
    """
    (k, scales_of_k), (values, scales) = (_scaled(_without_conversion(node.input_value(at))) for at in (1, 2))
    product, attributes = values.get_node(), node.get_attributes()
    if not attributes["first_only"] or product.get_type_name() != "MatMul" or _transposed(product) != _LINEAR:
        return False
    heads, shape = attributes["heads"], product.get_input_partial_shape(1)
    if shape.is_dynamic or len(shape) != 2:
        return False
    outputs, size = shape.to_shape()
    if outputs not in [heads * head_dim for head_dim in HEAD_DIMS] or size % ROW_MULTIPLE:
        return False
    if heads * outputs * size > _MOST_BLOCKS or (weights := _values(product.input_value(1).get_node())) is None:
        return False
    readers, (x, step) = _readers(node.output(0)), _whole(product.input_value(0))
    is_known = x.get_element_type() in _OF_ROWS and x.get_partial_shape().rank == 3
    if not is_known or scales != scales_of_k or [reader.get_type_name() for reader in readers] != ["Convert"]:
        return False
    inputs = [_without_conversion(node.input_value(0)), k, x, node.input_value(3), *scales]
    settings = {name: attributes[name] for name in ("heads", "window", "theta")}
    mixed = _as_f32(create("FirstAttention", inputs, settings).output(0))
    blocks = np.zeros((heads, outputs // heads, heads, size), np.float32)  # each head's rows, and 0 for the others
    for head, rows in enumerate(np.split(weights, heads)):
        blocks[head, :, head] = rows * step
    projected = op.matmul(mixed, op.constant(blocks.reshape(outputs, -1)), **_LINEAR)
    projected.set_friendly_name(product.get_friendly_name())
    readers[0].output(0).replace(projected.output(0))
    return True


def _without_conversion(x: ov.Output) -> ov.Output:
    node = x.get_node()
    return node.input_value(0) if node.get_type_name() == "Convert" else x


def _values(weights: ov.Node) -> NDArray[np.float32] | None:
    """Constants, converted or multiplied by constants; None: something else."""
    if weights.get_type_name() == "Constant":
        return np.array(weights.get_data(dtype=np.float32))
    if weights.get_type_name() == "Convert":
        return _values(weights.input_value(0).get_node())
    if weights.get_type_name() != "Multiply":
        return None
    parts = [_values(value.get_node()) for value in weights.input_values()]
    return None if parts[0] is None or parts[1] is None else parts[0] * parts[1]


def _whole(x: ov.Output) -> tuple[ov.Output, float]:
    """What x is a multiple of, and by what: int8 and its step (see `_times`), or x."""
    node = x.get_node()
    if node.get_type_name() == "Multiply":
        whole, step = _without_conversion(node.input_value(0)), _values(node.input_value(1).get_node())
        if whole.get_element_type() == ov.Type.i8 and step is not None and step.size == 1:
            return whole, float(step)
    return _without_conversion(x), 1.0


def _fuse_rows(model: ov.Model, floats: str, create: _Create) -> None:
    """Residuals with the norms that follow, and gates with the GELU before them: a node of ours for each."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MVN":
            _fuse_norm(node, floats, create)
        elif node.get_type_name() == "Gelu":
            _fuse_gate(node, floats, create)


def _fuse_norm(norm: ov.Node, floats: str, create: _Create) -> None:
    residual, attributes = norm.input_value(0).get_node(), norm.get_attributes()
    rounding = _rounding(norm)
    is_layer_norm = (
        attributes["normalize_variance"] and attributes["eps_mode"].lower() == "inside_sqrt" and _is_last_axis(norm)
    )
    if residual.get_type_name() != "Add" or not is_layer_norm or not _is_fusable(norm, rounding, floats):
        return
    inputs = residual.input_values()
    if any(x.get_partial_shape() != norm.get_output_partial_shape(0) for x in inputs):
        return
    x, product = sorted(inputs, key=lambda each: bool(_scaled(each)[1]))  # one that has scales comes last
    added, scales = _scaled(product)
    fused = create("AddedNorm", [x, added, *scales], {"eps": attributes["eps"], "rounds": rounding is not None})
    residual.output(0).replace(_as_f32(fused.output(1)))
    _replace(norm, rounding, fused)


def _fuse_gate(gelu: ov.Node, floats: str, create: _Create) -> None:
    readers = _readers(gelu.output(0))
    if [reader.get_type_name() for reader in readers] != ["Multiply"]:
        return
    (gated,) = readers
    rounding = _rounding(gated)
    up = gelu.input_value(0)
    gate = next(x for x in gated.input_values() if x.get_node() != gelu)
    is_known = gelu.get_attributes()["approximation_mode"].lower() == "erf"
    if not (is_known and up.get_partial_shape() == gate.get_partial_shape() and _is_fusable(gated, rounding, floats)):
        return
    halves = up.get_node()
    are_joint = halves.get_type_name() == "Split" and _is_last_axis(halves) and halves.outputs() == [up, gate]
    inputs = [halves.input_value(0)] if are_joint else [up, gate]  # the kernel finds the halves itself
    (of_up, scales), (of_gate, scales_of_gate) = _scaled(up), _scaled(gate)
    if scales and scales == scales_of_gate:
        inputs = [of_up, of_gate, *scales]
    _replace(gated, rounding, create("GatedGelu", inputs, {"rounds": rounding is not None}))


def _is_last_axis(node: ov.Node) -> bool:
    """Whether the second input of a node, its axis or axes, is its last dimension alone."""
    axes, last = node.input_value(1).get_node(), len(node.get_output_partial_shape(0)) - 1
    return axes.get_type_name() == "Constant" and axes.data.ravel().tolist() in ([-1], [last])


def _is_fusable(node: ov.Node, rounding: ov.Node | None, floats: str) -> bool:
    """Whether our kernels take these rows and are as exact as OpenVINO's nodes, which are more exact in float32."""
    size = node.get_output_partial_shape(0)[-1]
    return (rounding is not None or floats == "bf16") and size.is_static and size.get_length() % ROW_MULTIPLE == 0


def _replace(node: ov.Node, rounding: ov.Node | None, fused: ov.Node) -> None:
    """Makes the readers of a node, or of what rounds it, read what our kernel computes."""
    if rounding is None:
        node.output(0).replace(_as_f32(fused.output(0)))
        return
    scales, readers = _as_f32(fused.outputs()[-1]), rounding.output(0).get_target_inputs()
    rounded = _times(fused.output(0), 1 / 127)
    rounding.output(0).replace(rounded)
    _scale_products(readers, rounded, scales)


def _scale_products(readers: Iterable[ov.Input], rounded: ov.Output, scales: ov.Output) -> None:
    """Multiplies what is computed of rows of int8 by their scales: products after, and for other readers the rows."""
    for port in readers:
        reader = port.get_node()
        is_product = reader.get_type_name() == "MatMul" and port.get_index() == 0
        if is_product and not _transposed(reader)["transpose_a"] and len(reader.get_input_partial_shape(1)) > 1:
            product = reader.output(0)
            further = product.get_target_inputs()
            scaled = op.multiply(product, scales).output(0)
            for each in further:
                each.replace_source_output(scaled)
        else:
            port.replace_source_output(op.multiply(rounded, scales).output(0))


def _scaled(x: ov.Output) -> tuple[ov.Output, list[ov.Output]]:
    """A product and, in a list, the scales of its rows (see `_scale_products`); or x and no scales."""
    node = _without_conversion(x).get_node()
    if node.get_type_name() == "Multiply":
        scales = _without_conversion(node.input_value(1))
        kernel = scales.get_node()
        is_ours = kernel.get_type_name() in _ROUNDING_KERNELS and kernel.get_attributes()["rounds"]
        if is_ours and scales.get_index() == kernel.get_output_size() - 1:
            return _without_conversion(node.input_value(0)), [scales]
    return x, []


def _readers(output: ov.Output) -> list[ov.Node]:
    return [port.get_node() for port in output.get_target_inputs()]


def _rounding(node: ov.Node) -> ov.Node | None:
    """The only reader of a node, if it rounds to int8: signed, symmetric, 256 levels."""
    readers = [reader for output in node.outputs() for reader in _readers(output)]
    if [reader.get_type_name() for reader in readers] != ["FakeQuantize"]:
        return None
    (rounding,) = readers
    bounds = [rounding.input_value(at).get_node().data for at in range(1, 5)]
    step = _step(rounding)
    expected = np.array([-128 * step, 127 * step] * 2)
    is_int8 = rounding.get_attributes()["levels"] == 256 and all(bound.size == 1 for bound in bounds) and step > 0
    return rounding if is_int8 and np.allclose(np.ravel(bounds), expected, rtol=1e-6, atol=0) else None


def _step(rounding: ov.Node) -> float:
    return -float(rounding.input_value(1).get_node().data.ravel()[0]) / 128


def _times(whole: ov.Output, step: float) -> ov.Output:
    """int8 times the step: OpenVINO moves that behind the int8 products."""
    return op.multiply(_as_f32(whole), op.constant(np.float32(step))).output(0)


def _as_f32(x: ov.Output) -> ov.Output:
    return op.convert(x, "f32").output(0) if x.get_element_type() != ov.Type.f32 else x
