"""Open Inference Protocol v2 over gRPC: protobuf messages to ours and back.

A request has all its tensors in `raw_input_contents`, in the order of its inputs, or all of them
typed, in the inputs' `contents`. Raw tensors are views of the bytes that protobuf hands out.
Answers are raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.messages import (
    BYTES,
    REQUEST,
    VERSION,
    InferRequest,
    InferResponse,
    Tensor,
    Value,
    Wanted,
    check_datatype,
    check_parameters,
    check_tensors,
    raw_of,
    tensor_from_raw,
    tensor_from_values,
    top_of,
)

# The field of InferTensorContents that holds a type's values; FP16 has none.
_TYPED: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


def read_request(message: Any) -> InferRequest:
    """An inference request from a ``ModelInferRequest``.

    Raises:
        RequestError: what is wrong with it.
    """
    check_tensors("inputs", len(message.inputs))
    check_tensors("outputs", len(message.outputs))
    raws: list[bytes] = list(message.raw_input_contents)
    if raws and len(raws) != len(message.inputs):
        raise RequestError(
            f"raw_input_contents: expected one for each of the {len(message.inputs)} inputs, found "
            f"{len(raws)}."
        )
    inputs: dict[str, Tensor] = {}
    for index, item in enumerate(message.inputs):
        if item.name in inputs:
            raise RequestError(f"inputs: {item.name[:80]!r} is given twice.")
        _parameters(item.parameters, f"input {item.name[:80]!r}")
        inputs[item.name] = _from_raw(item, raws[index]) if raws else _from_contents(item)
    return InferRequest(
        message.model_name,
        message.model_version,
        message.id,
        inputs,
        tuple(_wanted(item) for item in message.outputs),
        _parameters(message.parameters, REQUEST),
    )


def write_response(response: InferResponse) -> Any:
    """A ``ModelInferResponse``, its tensors in ``raw_output_contents``."""
    message = service_pb2.ModelInferResponse(
        model_name=response.model,
        model_version=VERSION,
        id=response.id,
        outputs=[
            service_pb2.ModelInferResponse.InferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape
            )
            for tensor in response.outputs
        ],
        raw_output_contents=[raw_of(tensor) for tensor in response.outputs],
    )
    for name, value in response.parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "string_param"
        setattr(message.parameters[name], kind, value)
    return message


def _from_raw(item: Any, raw: bytes) -> Tensor:
    if item.contents.ListFields():
        raise RequestError(
            f"input {item.name[:80]!r}: expected contents or raw_input_contents, found both."
        )
    return tensor_from_raw(item.name, item.datatype, list(item.shape), memoryview(raw))


def _from_contents(item: Any) -> Tensor:
    check_datatype(item.name, item.datatype)
    expected = _TYPED.get(item.datatype)
    if expected is None:
        raise RequestError(
            f"input {item.name[:80]!r}: {item.datatype} has no typed contents: send it in "
            "raw_input_contents."
        )
    others = [field.name for field, _ in item.contents.ListFields() if field.name != expected]
    if others:
        raise RequestError(
            f"input {item.name[:80]!r}: {item.datatype} is in contents.{expected}, found "
            f"{others[0]}."
        )
    values = list(getattr(item.contents, expected))
    return tensor_from_values(item.name, item.datatype, list(item.shape), values)


def _wanted(item: Any) -> Wanted:
    where = f"output {item.name[:80]!r}"
    return Wanted(item.name, top_of(_parameters(item.parameters, where), where))


def _parameters(found: Mapping[str, Any], where: str) -> dict[str, Value]:
    chosen = {key: parameter.WhichOneof("parameter_choice") for key, parameter in found.items()}
    values = {key: getattr(found[key], c) if c is not None else None for key, c in chosen.items()}
    return check_parameters(values, where)
