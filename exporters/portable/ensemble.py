"""Graphs around a model, for servers whose pipelines hold no constants.

One makes the model's images of a picture, one tells what its logits mean.

A request brings a picture and a row of the bank. The numbers of every adapter's transform and the
names of its classes are tables inside of the graphs, looked up by that row; a row that no adapter
has fails the request, and so do logits that are no numbers. A folded bundle's tables have one line,
and its graphs take no row.

All take and give one request: [1, ...], though the first dimension has a name, as servers that
batch want it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.bundle.manifest import AdapterEntry

PICTURES, IDS = "pictures", "adapter_ids"
IMAGES, LOGITS, SCORES, LABEL = "images", "logits", "scores", "label"
_KINDS = (CLASSES, LABELS, VALUES)


def preprocessing(graph: bytes, adapters: Sequence[AdapterEntry]) -> onnx.ModelProto:
    """A bundle's graph for pictures with the numbers of all ``adapters`` in it.

    Inputs: ``pictures`` uint8 [1, h, w, 3], upright RGB, and ``adapter_ids`` int64 [1, 1].
    Output: ``images`` float32 [1, channels, H, W], normalised.

    Args:
        graph: of the crop mode and the filter that all of them have.
        adapters: at least one; all are at rows, or the only one is at none.
    """
    model = onnx.load_from_string(graph)
    inner = model.graph
    nodes, tables = _place(adapters)
    for name, (dtype, _) in adapters[0].preprocess.graph_inputs.items():
        numbers = [adapter.preprocess.graph_inputs[name][1] for adapter in adapters]
        values = np.asarray(numbers, dtype)
        tables.append(numpy_helper.from_array(values, f"{name}_by_adapter"))
        nodes.append(helper.make_node("Gather", [f"{name}_by_adapter", "place"], [name]))
    nodes.append(helper.make_node("Squeeze", [PICTURES, "batch_axis"], ["image"]))
    # The dimension of one is called as the input's again: runtimes would infer that it is one, and
    # Triton takes no model for one that batches then. By Expand: of a Reshape of known size ONNX
    # Runtime infers it all the same, where a folded bundle's transform crops nothing.
    inner.node[-1].output[0] = "of_any_size"
    named = [
        helper.make_node("Reshape", ["of_any_size", "one_image_size"], ["one_image"]),
        helper.make_node("Shape", [PICTURES], ["batch_size"], start=0, end=1),
        helper.make_node("Concat", ["batch_size", "image_size"], ["images_size"], axis=0),
        helper.make_node("Expand", ["one_image", "images_size"], [inner.output[0].name]),
    ]
    size = adapters[0].preprocess.input_size
    tables += [
        numpy_helper.from_array(np.asarray([0], np.int64), "batch_axis"),
        numpy_helper.from_array(np.asarray([1, *size], np.int64), "one_image_size"),
        numpy_helper.from_array(np.asarray(size, np.int64), "image_size"),
    ]
    taken = [helper.make_tensor_value_info(PICTURES, TensorProto.UINT8, ["batch", "h", "w", 3])]
    inner.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return _model(
        "pictures",
        [*nodes, *inner.node, *named],
        [*taken, *_ids(adapters)],
        list(inner.output),
        [*tables, *inner.initializer],
        model,
    )


def answering(classes: int, adapters: Sequence[AdapterEntry], like: bytes) -> onnx.ModelProto:
    """What a model's logits mean, by the row that was asked.

    Inputs: ``logits`` float32 [1, classes] and ``adapter_ids`` int64 [1, 1].
    Outputs: ``scores`` float32 [1, classes], of classes softmax, of labels sigmoid, of values
    themselves (columns past the adapter's own: 0, and of values -inf); ``label`` string [1, 1], the
    name of the largest; of values "". Neither of logits that are no numbers.

    Args:
        classes: columns of the logits.
        adapters: at least one; see `preprocessing`.
        like: any of the bundle's graphs for pictures: opset and IR version are its.
    """
    nodes, tables = _place(adapters)
    kinds = [_KINDS.index(adapter.problem_type) for adapter in adapters]
    tables += [
        numpy_helper.from_array(np.asarray(kinds, np.int64), "kind_by_adapter"),
        _names(classes, adapters),
        numpy_helper.from_array(np.asarray(classes, np.int64), "width"),
        numpy_helper.from_array(np.asarray(_KINDS.index(LABELS), np.int64), "labels_kind"),
        numpy_helper.from_array(np.asarray(_KINDS.index(VALUES), np.int64), "values_kind"),
    ]
    checking, limits = _answered(classes, adapters)
    tables += limits
    nodes += [
        *checking,
        helper.make_node("Gather", ["kind_by_adapter", "answered"], ["kind"]),
        helper.make_node("Equal", ["kind", "labels_kind"], ["of_labels"]),
        helper.make_node("Equal", ["kind", "values_kind"], ["of_values"]),
        helper.make_node("Softmax", [LOGITS], ["shares"], axis=-1),
        helper.make_node("Sigmoid", [LOGITS], ["each"]),
        helper.make_node("Where", ["of_labels", "each", "shares"], ["probabilities"]),
        helper.make_node("Where", ["of_values", LOGITS, "probabilities"], [SCORES]),
        helper.make_node("ArgMax", [LOGITS], ["best"], axis=1, keepdims=1),
        # One by one: of several strings in a row ONNX Runtime's Gather copies the first.
        helper.make_node("Mul", ["answered", "width"], ["first_name"]),
        helper.make_node("Add", ["first_name", "best"], ["which_name"]),
        helper.make_node("Gather", ["names_by_adapter", "which_name"], [LABEL]),
    ]
    logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes])
    outputs = [
        helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["batch", classes]),
        helper.make_tensor_value_info(LABEL, TensorProto.STRING, ["batch", 1]),
    ]
    inputs = [logits, *_ids(adapters)]
    return _model("answers", nodes, inputs, outputs, tables, onnx.load_from_string(like))


def _place(
    adapters: Sequence[AdapterEntry],
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and tables that make ``place`` of the row: which of ``adapters`` it is.

    A row that none of them has leads past the end of every table, where ONNX Runtime stops.
    """
    rows = _rows(adapters)
    if not rows:
        return [], [numpy_helper.from_array(np.asarray(0, np.int64), "place")]
    places: NDArray[np.int64] = np.full(max(rows) + 1, len(rows), np.int64)
    places[rows] = np.arange(len(rows))
    tables = [
        numpy_helper.from_array(places, "places"),
        numpy_helper.from_array(np.asarray([], np.int64), "scalar"),
        numpy_helper.from_array(np.asarray(0, np.int64), "first_row"),
        numpy_helper.from_array(np.asarray(len(places), np.int64), "no_row"),
    ]
    nodes = [
        # Not Squeeze: of a batch of any size nobody could tell what rank that leaves.
        helper.make_node("Reshape", [IDS, "scalar"], ["row"]),
        # Gather counts from the end where an index is negative.
        helper.make_node("Less", ["row", "first_row"], ["is_negative"]),
        helper.make_node("Where", ["is_negative", "no_row", "row"], ["row_or_none"]),
        helper.make_node("Gather", ["places", "row_or_none"], ["place"]),
    ]
    return nodes, tables


def _answered(
    classes: int, adapters: Sequence[AdapterEntry]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and tables that make ``answered`` of ``place``: itself where the logits are numbers, as
    `hhdeploy.bundle.answers.are_numbers` has it, else past the end of every table.

    Of NaN no comparison holds. Values are numbers in all own columns, classes and labels in one.
    """
    least = [a.classes if a.problem_type == VALUES else 1 for a in adapters]
    tables = [
        numpy_helper.from_array(np.asarray(np.inf, np.float32), "infinity"),
        numpy_helper.from_array(np.asarray(-np.inf, np.float32), "minus_infinity"),
        numpy_helper.from_array(np.asarray(least, np.int64), "least_by_adapter"),
        numpy_helper.from_array(np.asarray(classes, np.int64), "all_columns"),
        numpy_helper.from_array(np.asarray(len(adapters), np.int64), "nowhere"),
    ]
    nodes = [
        helper.make_node("Less", [LOGITS, "infinity"], ["is_below"]),
        helper.make_node("Greater", [LOGITS, "minus_infinity"], ["is_above"]),
        helper.make_node("Cast", ["is_below"], ["below"], to=TensorProto.INT64),
        helper.make_node("Cast", ["is_above"], ["above"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["below"], ["columns_below"], keepdims=0),
        helper.make_node("ReduceSum", ["above"], ["columns_above"], keepdims=0),
        helper.make_node("Gather", ["least_by_adapter", "place"], ["least"]),
        helper.make_node("Equal", ["columns_below", "all_columns"], ["none_is_more"]),
        helper.make_node("GreaterOrEqual", ["columns_above", "least"], ["enough"]),
        helper.make_node("And", ["none_is_more", "enough"], ["are_numbers"]),
        helper.make_node("Where", ["are_numbers", "place", "nowhere"], ["answered"]),
    ]
    return nodes, tables


def _rows(adapters: Sequence[AdapterEntry]) -> list[int]:
    return [a.row for a in adapters if a.row is not None]


def _ids(adapters: Sequence[AdapterEntry]) -> list[onnx.ValueInfoProto]:
    """The input that chooses, if there is a choice."""
    info = helper.make_tensor_value_info(IDS, TensorProto.INT64, ["batch", 1])
    return [info] if _rows(adapters) else []


def _names(classes: int, adapters: Sequence[AdapterEntry]) -> onnx.TensorProto:
    """strings [adapters * classes]: names of classes and labels; of values none. (JSON allows lone
    surrogates, which UTF-8 does not.)"""
    names = [
        adapter.label(column) if column < adapter.classes and adapter.problem_type != VALUES else ""
        for adapter in adapters
        for column in range(classes)
    ]
    texts = [name.encode("utf-8", "replace") for name in names]
    return TensorProto(
        name="names_by_adapter",
        data_type=TensorProto.STRING,
        dims=[len(texts)],
        string_data=texts,
    )


def _model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    tables: Sequence[onnx.TensorProto],
    like: onnx.ModelProto,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, name, inputs, outputs, tables)
    for index, node in enumerate(graph.node):
        node.name = f"{index}/{node.op_type}"
    model = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model
