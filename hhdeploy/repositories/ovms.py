"""``hhdeploy ovms``: a bundle as a model of an OpenVINO Model Server repository."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhdeploy.bundle.store import Progress
from hhdeploy.choices import PRECISIONS, Precision, listener, one_of, options_of, text, yes_or_no
from hhdeploy.errors import PlanError, WriteError
from hhdeploy.exporters.triton import ADAPTERS_FILE, adapters_json, check_model_name
from hhdeploy.files.directories import Replaceable, atomic_directory, check_target, strangers
from hhdeploy.files.plain import read_plain
from hhdeploy.files.scratch import alone_in
from hhdeploy.files.writing import as_path, is_folder, write_json
from hhdeploy.repositories.graphs import (
    VERSION,
    ServedModel,
    open_servable,
    served_facts,
    write_graph,
)

__all__ = ["OvmsOptions", "write_ovms_repository"]

_CONFIG, _GRAPH, _MODELS = "config.json", "model.onnx", "model_config_list"
# Lists whose names the server serves beside models' names.
_GRAPHS = ("mediapipe_config_list", "pipeline_config_list")
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

    def __post_init__(self) -> None:
        text(self.target_device, "target_device", "OpenVINO's name of a device")


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
    model again. The configuration's other models and settings stay as they are, also those of the
    model's own entry. It is written last: a crash before leaves a model that no configuration
    names.

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
        WriteError: OUT/NAME exists, OUT/config.json is none of the server's or names another model
            so, or the file system refused.
    """
    progress = listener(progress)
    options, out = options_of(options, OvmsOptions, "options"), as_path(out, "out")
    overwrite = yes_or_no(overwrite, "overwrite")
    one_of(PRECISIONS, options.precision, "precision")
    bundle = open_servable(path, out, _SERVER)
    name = check_model_name(options.name or bundle.path.resolve().name, _SERVER)
    if name == _CONFIG:
        raise PlanError(
            f"`name`: {name} is the file that the server is configured by. Choose another name."
        )
    manifest = bundle.manifest
    # A new repository appears whole; in one that exists, the model does.
    exists = is_folder(out, WriteError)
    target = out / name if exists else out
    check_target(target, _MODEL, overwrite=overwrite)
    _check_name(out, _read_config(out / _CONFIG), name, overwrite)  # before any work is done
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
            config = _read_config(out / _CONFIG)
            _check_name(out, config, name, overwrite=True)  # OUT/NAME is this one by now
            write_json(out / _CONFIG, _entered(config, name, options))
    written = (_CONFIG, *(f"{name}/{file}" for file in files))
    return ServedModel(out, name, written, **served_facts(manifest))


def _read_config(path: Path) -> dict[str, Any]:
    """A configuration that is there, or an empty one. Raises `WriteError` where it is neither."""
    if not os.path.lexists(path):
        return {_MODELS: []}
    try:
        content: dict[str, Any] = json.loads(read_plain(path))
        for entry in content[_MODELS]:
            str(entry["config"]["name"])
    except FileNotFoundError as error:
        raise WriteError(
            f"{path} is a link to {os.readlink(path)}, which does not exist. Restore what it leads "
            "to, or remove the link."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WriteError(
            f"{path}: expected a configuration of {_SERVER}, an object with {_MODELS}, each of it "
            'an object {"config": {"name": ...}}; found something else '
            f"({type(error).__name__}: {error}). Mend it, or choose another directory."
        ) from error
    return content


def _check_name(out: Path, config: Mapping[str, Any], name: str, overwrite: bool) -> None:
    """Compare a model's name with those that the server serves already.

    Raises:
        WriteError: it is that of a graph, of a model elsewhere, or of OUT/NAME itself, which
            ``overwrite`` alone renews.
    """
    where = f"{out / _CONFIG} names {name!r} already"
    for key in _GRAPHS:
        if any(isinstance(e, dict) and e.get("name") == name for e in config.get(key) or ()):
            raise WriteError(f"{where}, in {key}. Choose another name with `name`.")
    place = Path(os.path.realpath(out))
    for model in (entry["config"] for entry in config[_MODELS]):
        if model["name"] != name:
            continue
        base = place / str(model.get("base_path"))
        if Path(os.path.realpath(base.parent)) / base.name != place / name:
            raise WriteError(
                f"{where}, with base_path {model.get('base_path')!r}; expected {name!r}, which "
                "alone `overwrite=True` renews. Choose another name with `name`, or remove that "
                "entry yourself."
            )
        if not overwrite:
            raise WriteError(
                f"{where}. Choose another name with `name`, or pass `overwrite=True` to renew the "
                "model."
            )


def _entered(config: Mapping[str, Any], name: str, options: OvmsOptions) -> dict[str, Any]:
    """The configuration with a model; what else its entry says already is its operator's."""
    entries = [dict(entry) for entry in config[_MODELS]]
    entry = next((e for e in entries if e["config"]["name"] == name), None)
    if entry is None:
        entries.append(entry := {"config": {}})
    there = entry["config"].get("plugin_config")
    # Unsaid, some processors would compute float32 in bfloat16.
    hint = "bf16" if options.precision == "bfloat16" else "f32"
    entry["config"] = {
        **entry["config"],
        "name": name,
        "base_path": name,  # relative to the configuration
        "target_device": options.target_device,
        "plugin_config": {
            **(there if isinstance(there, dict) else {}),
            "INFERENCE_PRECISION_HINT": hint,
        },
    }
    return {**config, _MODELS: entries}
