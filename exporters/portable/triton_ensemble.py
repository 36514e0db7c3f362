"""Triton's configurations of an ensemble: pictures in, what an adapter says of them out. Pure.

Three steps: a picture becomes the model's images, the model runs (there requests of all ensembles
and clients gather in batches), and its logits get their meaning. An ensemble takes one picture a
request, since pictures differ in size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hhdeploy.bundle.manifest import Manifest
from hhdeploy.exporters.portable.ensemble import (
    IDS,
    IMAGES,
    LABEL,
    LOGITS,
    PICTURES,
    SCORES,
)
from hhdeploy.exporters.triton import parameters, quoted

# What clients call the picture.
IMAGE = "image"


@dataclass(frozen=True)
class TensorConfig:
    """A tensor of a configuration: ``dims`` without the batch, -1 for any size."""

    name: str
    kind: str
    dims: tuple[int, ...]

    def text(self) -> str:
        """An element of ``input`` or ``output``."""
        dims = ", ".join(map(str, self.dims))
        lines = (f"name: {quoted(self.name)}", f"data_type: TYPE_{self.kind}", f"dims: [ {dims} ]")
        return "  {\n" + "".join(f"    {line}\n" for line in lines) + "  }"


@dataclass(frozen=True)
class Ensemble:
    """Models by name, and what passes between them.

    Attributes:
        name: of the ensemble; ``preprocess`` and ``answer`` are its first and last step's.
        model: the model's own name.
        manifest: of the bundle.
        facts: what clients can read from the server: ``parameters``.
    """

    name: str
    preprocess: str
    answer: str
    model: str
    manifest: Manifest
    facts: Mapping[str, str]

    def configs(self) -> dict[str, str]:
        """Name of a model -> its config.pbtxt: the steps beside the model, and the ensemble."""
        picture = TensorConfig(PICTURES, "UINT8", (-1, -1, 3))
        images = TensorConfig(IMAGES, "FP32", self.manifest.input_size)
        width = self.manifest.classes
        logits, scores = (
            TensorConfig(LOGITS, "FP32", (width,)),
            TensorConfig(SCORES, "FP32", (width,)),
        )
        label = TensorConfig(LABEL, "STRING", (1,))
        ids = () if self.manifest.layout is None else (TensorConfig(IDS, "INT64", (1,)),)
        image = TensorConfig(IMAGE, picture.kind, picture.dims)
        return {
            self.preprocess: _graph(self.preprocess, (picture, *ids), (images,)),
            self.answer: _graph(self.answer, (logits, *ids), (scores, label)),
            self.name: self._ensemble((image, *ids), (logits, scores, label)),
        }

    def _ensemble(self, inputs: Iterable[TensorConfig], outputs: Iterable[TensorConfig]) -> str:
        ids = {} if self.manifest.layout is None else {IDS: IDS}
        steps = (
            _step(self.preprocess, {PICTURES: IMAGE, **ids}, {IMAGES: IMAGES}),
            _step(self.model, {IMAGES: IMAGES, **ids}, {LOGITS: LOGITS}),
            _step(self.answer, {LOGITS: LOGITS, **ids}, {SCORES: SCORES, LABEL: LABEL}),
        )
        return (
            f'name: {quoted(self.name)}\nplatform: "ensemble"\nmax_batch_size: 1\n'
            f"{_tensors('input', inputs)}{_tensors('output', outputs)}"
            f"ensemble_scheduling {{\n{''.join(steps)}}}\n{parameters(self.facts)}"
        )


def _graph(name: str, inputs: Iterable[TensorConfig], outputs: Iterable[TensorConfig]) -> str:
    """A small graph: on the CPU, where strings are, and where a wrong row is an error."""
    return (
        f'name: {quoted(name)}\nplatform: "onnxruntime_onnx"\nbackend: "onnxruntime"\n'
        f"max_batch_size: 1\n{_tensors('input', inputs)}{_tensors('output', outputs)}"
        "instance_group [\n  {\n    count: 1\n    kind: KIND_CPU\n  }\n]\n"
    )


def _tensors(field: str, tensors: Iterable[TensorConfig]) -> str:
    listed = ",\n".join(tensor.text() for tensor in tensors)
    return f"{field} [\n{listed}\n]\n"


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    """A step; maps go from the model's tensors to the ensemble's."""
    maps = "".join(
        f"    {field} {{ key: {quoted(key)} value: {quoted(value)} }}\n"
        for field, pairs in (("input_map", inputs), ("output_map", outputs))
        for key, value in pairs.items()
    )
    return f"  step {{\n    model_name: {quoted(model)}\n    model_version: -1\n{maps}  }}\n"
