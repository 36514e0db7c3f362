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
from hhdeploy.choices import PRECISIONS, Precision, listed, one_of, whole, yes_or_no
from hhdeploy.errors import OptionError

TritonBackend = Literal["onnxruntime", "tensorrt"]
BACKENDS: tuple[TritonBackend, ...] = get_args(TritonBackend)
LABELS_FILE, ADAPTERS_FILE, CONFIG_FILE = "labels.txt", "adapters.json", "config.pbtxt"
# The names that the backends look for in a version's directory.
MODEL_FILES: dict[TritonBackend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

_PLATFORMS: dict[TritonBackend, str] = {
    "onnxruntime": "onnxruntime_onnx",
    "tensorrt": "tensorrt_plan",
}
_KINDS = {None: "AUTO", True: "GPU", False: "CPU"}
_DEFAULT_MAX_BATCH = 32
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class TritonOptions:
    """How a bundle becomes a model of Triton, and how Triton is to run it.

    Attributes:
        name: of the model; None: the bundle's directory's.
        precision: of the graph or engine.
        backend: ``onnxruntime`` or ``tensorrt`` (an engine of the bundle).
        gpu_arch: ``sm89`` ...: which engine, if the bundle has several that fit.
        max_batch: images of one run at most; None: 32, or the most that the engine takes.
        preferred_batch: sizes that are run as soon as they are reached.
        max_queue_delay_us: how long a request may wait for company; 0 adds no latency: while
            an instance is busy, requests gather all the same.
        instances: that run at once, per GPU.
        gpu: place instances on GPUs (True) or the CPU (False); None: GPUs if there are any.
        ensemble: also a model that takes pictures: one step makes the model's images of them, on
            the CPU, and one says what its logits mean.
    """

    name: str | None = None
    precision: Precision = "float32"
    backend: TritonBackend = "onnxruntime"
    gpu_arch: str | None = None
    max_batch: int | None = None
    preferred_batch: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    instances: int = 1
    gpu: bool | None = None
    ensemble: bool = False

    def __post_init__(self) -> None:
        sizes = listed(self.preferred_batch, "preferred_batch", "numbers of images")
        found: dict[str, Any] = {
            "preferred_batch": tuple(whole(size, "preferred_batch", 1) for size in sizes),
            "max_queue_delay_us": whole(self.max_queue_delay_us, "max_queue_delay_us", 0),
            "instances": whole(self.instances, "instances", 1),
            "ensemble": yes_or_no(self.ensemble, "ensemble"),
        }
        if self.max_batch is not None:
            found["max_batch"] = whole(self.max_batch, "max_batch", 1)
        if self.gpu is not None:
            found["gpu"] = yes_or_no(self.gpu, "gpu")
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def batch(self) -> int:
        """``max_batch``, or what it is when nobody says."""
        return _DEFAULT_MAX_BATCH if self.max_batch is None else self.max_batch


def check_model_name(name: str, server: str = "Triton") -> str:
    """A model's name, a directory's and part of an address. Raises `OptionError`."""
    if not isinstance(name, str) or not _MODEL_NAME.fullmatch(name):
        raise OptionError(
            f"{server} model name {name!r}: expected letters, digits, '.', '-' and '_' (at most "
            "128, first a letter or digit). Give one as `name`."
        )
    return name


def check_triton_options(options: TritonOptions) -> None:
    """What no bundle could make right. Raises `OptionError` naming the option."""
    if options.name is not None:
        check_model_name(options.name)
    hint = " (Triton's tensorrt backend runs TensorRT's engines, not TensorRT-RTX's.)"
    one_of(BACKENDS, options.backend, "backend", hint)
    one_of(PRECISIONS, options.precision, "precision")
    cpu, engine = options.gpu is False, options.backend == "tensorrt"
    if cpu and engine:
        raise OptionError(
            "`gpu=False`: TensorRT engines run on GPUs alone. Use `backend='onnxruntime'`."
        )
    if options.gpu_arch is not None and not engine:
        raise OptionError("`gpu_arch` chooses an engine: it goes with `backend='tensorrt'` alone.")
    if cpu and options.precision == "bfloat16":
        raise OptionError(
            "`gpu=False`: ONNX Runtime has no bfloat16 kernels on CPUs, so the model would not "
            "load. Use `precision='float32'`, or `gpu=True`."
        )
    if not engine:  # else the engine says how large a batch may be
        check_numbers(options)


def check_numbers(options: TritonOptions) -> None:
    """Preferred batches are none that is never run. Raises `OptionError` naming the option."""
    for size in options.preferred_batch:
        if size > options.batch:
            raise OptionError(
                f"`preferred_batch=[{size}]`: expected 1 to `max_batch`, which is {options.batch}."
            )


def requestable(manifest: Manifest) -> tuple[AdapterEntry, ...]:
    """All that requests may ask for: the adapters, and the backbone if its classifier was kept."""
    if not manifest.backbone_classes:
        return manifest.adapters
    preprocess = manifest.backbone.preprocess
    backbone = AdapterEntry(BACKBONE, 0, manifest.backbone_classes, None, preprocess, True)
    return (backbone, *manifest.adapters)


def config_pbtxt(
    name: str, manifest: Manifest, options: TritonOptions, facts: Mapping[str, str]
) -> str:
    """config.pbtxt.

    Args:
        name: of the model, its directory's too.
        manifest: of the bundle; its precision and bank are in the model's file.
        options: checked; its name may be None.
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
    preferred = ", ".join(map(str, sorted(set(options.preferred_batch))))
    batching = f"  preferred_batch_size: [ {preferred} ]\n" if preferred else ""
    return (
        f"name: {quoted(name)}\n"
        f"platform: {quoted(_PLATFORMS[options.backend])}\n"
        f"backend: {quoted(options.backend)}\n"
        f"max_batch_size: {options.batch}\n"
        f"input [\n{listed}\n]\n"
        "output [\n"
        '  {\n    name: "logits"\n    data_type: TYPE_FP32\n'
        f"    dims: [ {manifest.classes} ]\n    label_filename: {quoted(LABELS_FILE)}\n  }}\n"
        "]\n"
        "instance_group [\n"
        f"  {{\n    count: {options.instances}\n    kind: KIND_{_KINDS[options.gpu]}\n  }}\n"
        "]\n"
        "dynamic_batching {\n"
        f"{batching}"
        f"  max_queue_delay_microseconds: {options.max_queue_delay_us}\n"
        "}\n"
        f"{parameters(facts)}"
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


def adapters_json(
    name: str, manifest: Manifest, ensembles: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a client needs to ask and to understand the answer.

    ``adapters``: name -> row (what ``adapter_ids`` takes; None in a folded bundle), classes
    (columns past them are -inf), class names, preprocessing, and ``ensemble``, if there is a model
    that takes pictures for it.

    Args:
        name: of the model.
        manifest: of the bundle.
        ensembles: adapter -> its ensemble; adapters without one are left out. None: there are no
            ensembles, and all adapters.
    """
    entries = {
        entry.name: entry.to_json() | ({"ensemble": ensembles[entry.name]} if ensembles else {})
        for entry in requestable(manifest)
        if not ensembles or entry.name in ensembles
    }
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


def parameters(facts: Mapping[str, str]) -> str:
    """``parameters`` of config.pbtxt."""
    return "".join(
        f"parameters {{\n  key: {quoted(key)}\n  value {{ string_value: {quoted(value)} }}\n}}\n"
        for key, value in facts.items()
    )


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
