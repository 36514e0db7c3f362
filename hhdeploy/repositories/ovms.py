"""``hhdeploy ovms``: a bundle as a model of an OpenVINO Model Server repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhdeploy.bundle.store import Progress
from hhdeploy.choices import PRECISIONS, Precision, one_of
from hhdeploy.errors import WriteError
from hhdeploy.exporters.triton import ADAPTERS_FILE, adapters_json, check_model_name
from hhdeploy.files.directories import Replaceable, atomic_directory, check_target, strangers
from hhdeploy.files.scratch import alone_in
from hhdeploy.files.writing import write_json
from hhdeploy.repositories.graphs import (
    VERSION,
    ServedModel,
    open_servable,
    served_facts,
    write_graph,
)

__all__ = ["OvmsOptions", "write_ovms_repository"]

_CONFIG, _GRAPH, _MODELS = "config.json", "model.onnx", "model_config_list"
_SERVER = "OpenVINO Model Server"


@dataclass(frozen=True)
class OvmsOptions:
    """How a bundle becomes a model of OpenVINO Model Server.

    Attributes:
        name: of the model; None: the bundle's directory's.
        precision: of the graph; bfloat16 is the float32 graph, computed in bfloat16, as everywhere
            in OpenVINO.
        target_device: OpenVINO's name of what runs it: CPU, GPU, NPU, AUTO ...
    """

    name: str | None = None
    precision: Precision = "float32"
    target_device: str = "CPU"


def _foreign(path: Path) -> str | None:
    """Why a directory is not a model that `write_ovms_repository` wrote, or None."""
    graph = f"{VERSION}/{_GRAPH}"
    if not all((path / name).is_file() for name in (graph, ADAPTERS_FILE)):
        return f"it has no {graph} with {ADAPTERS_FILE}"
    return strangers(path, {graph, f"{graph}.data", ADAPTERS_FILE}, "no such model has")


_MODEL = Replaceable("a model", _foreign)


def write_ovms_repository(
    path: str | Path,
    out: str | Path,
    options: OvmsOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> ServedModel:
    """Write OUT/NAME/ (adapters.json and version 1 of the model) and enter it in OUT/config.json.

    The bank as it is now is baked into the graph: after ``adapter add`` or ``remove`` write the
    model again. The configuration's other models and settings stay as they are. It is written
    last: a crash before leaves a model that no configuration names.

    Args:
        path: the bundle.
        out: the repository; made if it does not exist.
        options: see `OvmsOptions`.
        overwrite: replace a model of the same name, and its entry.
        progress: called with a few words at each step.

    Raises:
        BundleError: no adapter, no such graph, or a damaged file.
        PlanError: a name that is none, or a bundle that gives more than logits.
        MissingDependencyError: the ``export`` extra is not installed (onnx_ir, no torch).
        WriteError: OUT/NAME exists, OUT/config.json is none of the server's, or the file system
            refused.
    """
    options, out = options or OvmsOptions(), Path(out)
    one_of(PRECISIONS, options.precision, "precision")
    bundle = open_servable(path, out, _SERVER)
    name = check_model_name(options.name or bundle.path.resolve().name, _SERVER)
    manifest = bundle.manifest
    # A new repository appears whole; in one that exists, the model does.
    exists = out.is_dir()
    target = out / name if exists else out
    check_target(target, _MODEL, overwrite=overwrite)
    _read_config(out / _CONFIG)  # refused before any work is
    with atomic_directory(target, overwrite=overwrite, kind=_MODEL) as scratch:
        root = scratch if exists else scratch / name
        (root / VERSION).mkdir(parents=True)
        graph: Precision = "float32" if options.precision == "bfloat16" else options.precision
        write_graph(bundle, graph, root / VERSION / _GRAPH, _SERVER, progress)
        progress("writing the configuration")
        write_json(root / ADAPTERS_FILE, adapters_json(name, manifest))
        if not exists:
            write_json(scratch / _CONFIG, _entered({_MODELS: []}, name, options))
        files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    if exists:
        with alone_in(out):  # another model may be entered at the same time
            write_json(out / _CONFIG, _entered(_read_config(out / _CONFIG), name, options))
    written = (_CONFIG, *(f"{name}/{file}" for file in files))
    return ServedModel(out, name, written, **served_facts(manifest))


def _read_config(path: Path) -> dict[str, Any]:
    """A configuration that is there, or an empty one. Raises `WriteError` where it is neither."""
    if not path.exists():
        return {_MODELS: []}
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        for entry in content[_MODELS]:
            str(entry["config"]["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise WriteError(
            f"{path}: expected a configuration of {_SERVER}, an object with {_MODELS}, each of it "
            'an object {"config": {"name": ...}}; found something else '
            f"({type(error).__name__}: {error}). Mend it, or choose another directory."
        ) from error
    return content


def _entered(config: Mapping[str, Any], name: str, options: OvmsOptions) -> dict[str, Any]:
    """The configuration with a model, in the place of one of its name."""
    # Unsaid, some processors would compute float32 in bfloat16.
    hint = "bf16" if options.precision == "bfloat16" else "f32"
    model = {
        "name": name,
        "base_path": name,  # relative to the configuration
        "target_device": options.target_device,
        "plugin_config": {"INFERENCE_PRECISION_HINT": hint},
    }
    others = [entry for entry in config[_MODELS] if entry["config"]["name"] != name]
    return {**config, _MODELS: [*others, {"config": model}]}
