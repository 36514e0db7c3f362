"""A model of Triton Inference Server as text: config.pbtxt, labels.txt, adapters.json. Pure.

Triton batches requests of all adapters together, each with its own ``adapter_ids``: the bank is
inside the graph or engine, since Triton keeps no inputs between requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.bundle.manifest import AdapterEntry, Manifest
from hhdeploy.errors import OptionError

Backend = Literal["onnxruntime", "tensorrt"]
Kind = Literal["auto", "gpu", "cpu"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
LABELS_FILE, ADAPTERS_FILE, CONFIG_FILE = "labels.txt", "adapters.json", "config.pbtxt"
# The names that the backends look for in a version's directory.
MODEL_FILES: dict[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

_PLATFORMS: dict[Backend, str] = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Serving:
    """How Triton batches and places a model.

    Attributes:
        max_batch: images of one run at most.
        preferred_batch: sizes that are run as soon as they are reached.
        max_queue_delay_us: how long a request may wait for company; 0 adds no latency: while
            an instance is busy, requests gather all the same.
        instances: that run at once, per GPU.
        kind: ``auto`` takes the GPUs if there are any.
    """

    max_batch: int
    preferred_batch: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    instances: int = 1
    kind: Kind = "auto"


def check_model_name(name: str) -> str:
    """A model's name, a directory's and part of an address. Raises `OptionError`."""
    if not _MODEL_NAME.fullmatch(name):
        raise OptionError(
            f"Triton model name {name!r}: expected letters, digits, '.', '-' and '_' (at most "
            "128, first a letter or digit). Give one with --name."
        )
    return name


def check_serving(serving: Serving) -> None:
    """Raises `OptionError` naming the option that is out of range."""
    least = {
        "--max-batch": (serving.max_batch, 1),
        "--max-queue-delay-us": (serving.max_queue_delay_us, 0),
        "--instances": (serving.instances, 1),
    }
    for option, (found, minimum) in least.items():
        if found < minimum:
            raise OptionError(f"{option} {found}: expected {minimum} or more.")
    for size in serving.preferred_batch:
        if not 1 <= size <= serving.max_batch:
            raise OptionError(
                f"--preferred-batch {size}: expected 1 to --max-batch, which is "
                f"{serving.max_batch}."
            )


def requestable(manifest: Manifest) -> tuple[AdapterEntry, ...]:
    """All that requests may ask for: the adapters, and the backbone if its classifier was kept."""
    if not manifest.backbone_classes:
        return manifest.adapters
    preprocess = manifest.backbone.preprocess
    backbone = AdapterEntry(BACKBONE, 0, manifest.backbone_classes, None, preprocess, True)
    return (backbone, *manifest.adapters)


def config_pbtxt(
    name: str, manifest: Manifest, backend: Backend, serving: Serving, facts: Mapping[str, str]
) -> str:
    """config.pbtxt.

    Args:
        name: of the model, its directory's too.
        manifest: of the bundle; its precision and bank are in the model's file.
        backend: what runs the model.
        serving: checked by `check_serving`.
        facts: what clients and operators can read from the server: ``parameters``.
    """
    size = ", ".join(map(str, manifest.input_size))
    inputs = [f'    name: "images"\n    data_type: TYPE_FP32\n    dims: [ {size} ]\n']
    if manifest.layout is not None:
        inputs.append(
            '    name: "adapter_ids"\n    data_type: TYPE_INT64\n    dims: [ 1 ]\n'
            "    # Clients send [batch, 1], the model takes [batch].\n"
            "    reshape { shape: [ ] }\n"
        )
    listed = ",\n".join(f"  {{\n{text}  }}" for text in inputs)
    preferred = ", ".join(map(str, sorted(set(serving.preferred_batch))))
    batching = f"  preferred_batch_size: [ {preferred} ]\n" if preferred else ""
    parameters = "".join(
        f"parameters {{\n  key: {quoted(key)}\n  value {{ string_value: {quoted(value)} }}\n}}\n"
        for key, value in facts.items()
    )
    return (
        f"name: {quoted(name)}\n"
        f"platform: {quoted(_PLATFORMS[backend])}\n"
        f"backend: {quoted(backend)}\n"
        f"max_batch_size: {serving.max_batch}\n"
        f"input [\n{listed}\n]\n"
        "output [\n"
        '  {\n    name: "logits"\n    data_type: TYPE_FP32\n'
        f"    dims: [ {manifest.classes} ]\n    label_filename: {quoted(LABELS_FILE)}\n  }}\n"
        "]\n"
        "instance_group [\n"
        f"  {{\n    count: {serving.instances}\n    kind: KIND_{serving.kind.upper()}\n  }}\n"
        "]\n"
        "dynamic_batching {\n"
        f"{batching}"
        f"  max_queue_delay_microseconds: {serving.max_queue_delay_us}\n"
        "}\n"
        f"{parameters}"
    )


def labels_txt(manifest: Manifest) -> str:
    """One line a column of the logits, for Triton's classification extension.

    A folded bundle: the class's name. Side branches: a column means another class for each
    adapter, so ``adapter=label`` of all that have it, joined by ``|``. Line breaks in a name
    become spaces; the exact names are in adapters.json.
    """
    if manifest.layout is None:
        (only,) = manifest.adapters
        lines = [_one_line(only.label(column)) for column in range(manifest.classes)]
    else:
        lines = [
            "|".join(
                f"{entry.name}={_one_line(entry.label(column))}"
                for entry in requestable(manifest)
                if column < entry.classes
            )
            for column in range(manifest.classes)
        ]
    return "".join(f"{line}\n" for line in lines)


def adapters_json(name: str, manifest: Manifest) -> dict[str, Any]:
    """What a client needs to ask and to understand the answer.

    ``adapters``: name -> row (what ``adapter_ids`` takes; None in a folded bundle), classes
    (columns past them are -inf), class names, preprocessing.
    """
    entries = {entry.name: entry.to_json() for entry in requestable(manifest)}
    return {
        "model": name,
        "kind": manifest.kind,
        "backbone": manifest.backbone.model,
        "classes": manifest.classes,
        "adapters": {
            key: {field: value for field, value in entry.items() if field != "name"}
            for key, entry in entries.items()
        },
    }


def quoted(text: str) -> str:
    r"""A string of protobuf's text format: bytes outside printable ASCII in octal.

    >>> print(quoted('say "é"\n'))
    "say \"\303\251\"\n"
    """
    named = {0x22: '\\"', 0x5C: "\\\\", 0x0A: "\\n"}
    return '"{}"'.format(
        "".join(
            named.get(byte) or (chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}")
            for byte in text.encode()
        )
    )


def _one_line(label: str) -> str:
    """Line breaks as spaces; the lone surrogates that JSON allows are no text that a file holds."""
    return " ".join(label.splitlines()).encode("utf-8", "replace").decode()
