"""The form that graphs are written in: opset, one file or two, what they say of themselves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from hhdeploy.backbones.licences import in_words
from hhdeploy.bundle.manifest import MANIFEST, Manifest
from hhdeploy.choices import yes_or_no
from hhdeploy.errors import OptionError, PlanError
from hhdeploy.exporters.inserter import Inserter
from hhdeploy.exporters.trace import OPSET
from hhdeploy.packages import own_version

OPSETS = (18, OPSET)
# Opset 20 needs no newer one, and ONNX Runtime before 1.18 reads no newer one.
IR_VERSION = 9
# Of metadata_props: which adapters there are.
ADAPTERS_KEY = "adapters"
# Bytes of a protobuf message, less room for all that is no weight.
_LARGEST = 2**31 - 2**24


@dataclass(frozen=True)
class GraphForm:
    """How the graphs of an export are written.

    Attributes:
        opset: of `OPSETS`.
        single_file: weights inside of the graph's file, not beside it.
    """

    opset: int = OPSET
    single_file: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.opset, Integral) or self.opset not in OPSETS:
            known = " or ".join(map(str, OPSETS))
            raise OptionError(f"`opset={self.opset!r}`: expected {known}.")
        object.__setattr__(self, "single_file", yes_or_no(self.single_file, "single_file"))

    def apply(self, model: ir.Model, manifest: Manifest) -> None:
        """Bring a float32 graph into this form, in place.

        Raises:
            PlanError: it is too large for one file, or an operator of it is newer than the opset.
        """
        if self.single_file:
            _check_size(model)
        if self.opset != OPSET:
            _write_out_gelu(model.graph)
            _lower(model, self.opset)
        model.ir_version = IR_VERSION
        model.metadata_props.update(described(manifest))


def _check_size(model: ir.Model) -> None:
    weights = [value.const_value for value in model.graph.initializers.values()]
    size = sum(weight.nbytes for weight in weights if weight is not None)
    if size > _LARGEST:
        raise PlanError(
            f"`single_file`: expected weights of less than 2 GB, found {size / 1e9:.1f} GB, which "
            "a protobuf file does not hold. Export without `single_file=True`."
        )


def _write_out_gelu(graph: ir.Graph) -> None:
    """Replace each Gelu, of opset 20, by what it computes, as runtimes recognise it."""
    for node in list(graph):
        if node.op_type != "Gelu":
            continue
        (x,), (old,) = node.inputs, node.outputs
        assert x is not None
        insert = Inserter(graph, str(node.name), after=node)
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        part = (_of_tanh if tanh else _of_erf)(insert, x)
        more = insert("Add", "plus_one", [part, _number(insert, "one", 1.0)], shape=old.shape)
        product = insert("Mul", "times_x", [x, more], shape=old.shape)
        new = insert("Mul", "half", [product, _number(insert, "a_half", 0.5)], shape=old.shape)
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def _of_erf(insert: Inserter, x: ir.Value) -> ir.Value:
    scaled = insert("Div", "scaled", [x, _number(insert, "root_2", math.sqrt(2))], shape=x.shape)
    return insert("Erf", "erf", [scaled], shape=x.shape)


def _of_tanh(insert: Inserter, x: ir.Value) -> ir.Value:
    """tanh(sqrt(2 / pi) (x + 0.044715 x^3)), without a cube, which would overflow sooner."""
    root = math.sqrt(2 / math.pi)
    square = insert("Mul", "square", [x, x], shape=x.shape)
    bent = insert("Mul", "bent", [square, _number(insert, "bend", 0.044715 * root)], shape=x.shape)
    slope = insert("Add", "slope", [bent, _number(insert, "root", root)], shape=x.shape)
    inner = insert("Mul", "inner", [x, slope], shape=x.shape)
    return insert("Tanh", "tanh", [inner], shape=x.shape)


def _number(insert: Inserter, what: str, value: float) -> ir.Value:
    return insert.constant(what, np.asarray(value, np.float32))


def _lower(model: ir.Model, opset: int) -> None:
    """Declare an older opset, once every node is known to be in it.

    Raises:
        PlanError: naming the operators that are not, or that use what is newer.
    """
    newer = sorted({node.op_type for node in model.graph if not _is_in(node, opset)})
    if newer:
        raise PlanError(
            f"`opset`: {opset} has no {', '.join(newer)} as this model uses it. Export with "
            f"`opset={OPSET}`."
        )
    for node in model.graph:
        node.version = None
    model.opset_imports[""] = opset


def _is_in(node: ir.Node, opset: int) -> bool:
    if node.domain:
        return True
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return set(node.attributes) <= set(schema.attributes)


def described(manifest: Manifest) -> dict[str, str]:
    """What a graph says of itself: only what no later change of the bundle makes wrong."""
    facts = manifest.backbone
    told: dict[str, Any] = {
        "input_size": facts.preprocess.input_size,
        "mean": facts.preprocess.mean,
        "std": facts.preprocess.std,
    }
    fixed = manifest.layout is None or manifest.bank_as_constant
    return {
        "hhdeploy_version": own_version(),
        "backbone": facts.model,
        "backbone_sha256": facts.sha256,
        "license": in_words(facts.license),
        **{name: json.dumps(value) for name, value in told.items()},
        ADAPTERS_KEY: fixed_adapters(manifest) if fixed else f"see {MANIFEST}",
    }


def fixed_adapters(manifest: Manifest) -> str:
    """`ADAPTERS_KEY` of a graph whose adapters are fixed: JSON, as no manifest is beside it."""
    entries = {
        entry.name: {
            "row": entry.row,
            "classes": entry.classes,
            "labels": entry.class_names,
            "problem_type": entry.problem_type,
            "license": in_words(entry.license),
        }
        for entry in manifest.adapters
    }
    return json.dumps(entries)
