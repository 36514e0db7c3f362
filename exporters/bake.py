"""The bank baked into a side-branch graph, for servers that keep no inputs between requests."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.errors import PlanError
from hhdeploy.exporters.inserter import BANK, IDS, Inserter, become_output

_PREFIX = "branch/bank"


def baked(model: ir.Model, bank: NDArray[np.float32]) -> ir.Model:
    """A new graph that has the bank inside; ``model`` is not changed, the bank is copied.

    1. The input ``adapter_bank`` becomes an initializer of the same name.
    2. Its Gather reads ids clipped to [0, slots): TensorRT reads past the bank without a word,
       ONNX Runtime fails the whole batch, and -1 is the last row.
    3. An image whose id was outside gets NaN logits, since no caller can check it; the other
       images of the batch get the bits that the graph with an input bank gives them.

    Args:
        model: any side-branch graph of a bundle: float32, typed, quantised; traced or loaded.
        bank: float32 [slots, row], slots >= 1.

    Requires: ``adapter_bank`` is read by Gathers of ``adapter_ids`` alone, the graph has one
    output (float32 logits).

    Raises:
        PlanError: not such a graph, or not a bank of its rows.
    """
    clone = model.clone()
    graph = clone.graph
    source, ids = _input(graph, BANK), _input(graph, IDS)
    gathers = _gathers(source, ids)
    _check_bank(source, bank)
    slots = len(bank)
    insert = Inserter(graph, _PREFIX, before=gathers[0])
    first = insert.constant("first", np.asarray(0, np.int64))
    last = insert.constant("last", np.asarray(slots - 1, np.int64))
    clip = insert("Clip", "clip", [ids, first, last], dtype=ir.DataType.INT64, shape=["batch"])
    for gather in gathers:
        gather.replace_input_with(1, clip)
    graph.inputs.remove(source)
    source.shape = ir.Shape(bank.shape)
    source.const_value = ir.tensor(np.array(bank, np.float32, order="C"), name=BANK)
    graph.register_initializer(source)
    _poison_bad_ids(graph, ids, slots)
    return clone


def _input(graph: ir.Graph, name: str) -> ir.Value:
    for value in graph.inputs:
        if value.name == name:
            return value
    found = ", ".join(str(value.name) for value in graph.inputs)
    raise PlanError(
        f"this graph has no input {name} (its inputs: {found}), so no bank can be baked into it. "
        "Expected a side-branch graph exported without `fold=True` and without "
        "`bank_as_constant=True`."
    )


def _gathers(bank: ir.Value, ids: ir.Value) -> list[ir.Node]:
    """The Gathers of bank rows, in the graph's order."""
    uses = list(bank.uses())
    strange = [
        node
        for node, index in uses
        if node.op_type != "Gather"
        or index != 0
        or node.inputs[1] is not ids
        or node.attributes.get_int("axis", 0) != 0
    ]
    if strange or not uses:
        names = ", ".join(f"{node.op_type} {node.name}" for node in strange) or "nothing"
        raise PlanError(
            f"{BANK} is read by {names}; expected Gathers of its rows by {IDS} alone. Export the "
            "bundle again."
        )
    readers = {node for node, _ in uses}
    assert bank.graph is not None
    return [node for node in bank.graph if node in readers]


def _check_bank(source: ir.Value, bank: NDArray[np.float32]) -> None:
    row = source.shape[1] if source.shape is not None and len(source.shape) == 2 else "row"
    fits = bank.ndim == 2 and len(bank) > 0 and row == bank.shape[1]
    if bank.dtype != np.float32 or not fits:
        raise PlanError(
            f"bank: expected float32 [slots, {row}] with at least one slot, found {bank.dtype} "
            f"{list(bank.shape)}."
        )


def _poison_bad_ids(graph: ir.Graph, ids: ir.Value, slots: int) -> None:
    """NaN logits for ids outside [0, slots), selected last: no quantisation scale sees the NaN."""
    logits = graph.outputs[0]
    producer = logits.producer()
    assert producer is not None
    insert = Inserter(graph, f"{_PREFIX}/check", after=producer)

    def flag(op: str, what: str, *inputs: ir.Value, rank: int = 1) -> ir.Value:
        shape: list[int | str] = ["batch", 1]
        return insert(op, what, inputs, dtype=ir.DataType.BOOL, shape=shape[:rank])

    below = flag("Less", "below", ids, insert.constant("zero", np.asarray(0, np.int64)))
    end = insert.constant("slots", np.asarray(slots, np.int64))
    bad = flag("Or", "bad", below, flag("GreaterOrEqual", "above", ids, end))
    column = flag("Unsqueeze", "bad_column", bad, insert.ints("axis", 1), rank=2)
    nan = insert.constant("nan", np.asarray(np.nan, np.float32))
    become_output(graph, insert("Where", "checked", [column, nan, logits], shape=logits.shape))
