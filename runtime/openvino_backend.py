"""OpenVINO behind the `Backend` protocol: the fast runtime on a CPU.

OpenVINO decides by itself what it computes in, and on some processors its default for a float32
graph is bfloat16. Here the precision that was asked for decides:

    float32                     the float32 graph, in float32
    bfloat16                    the float32 graph, in bfloat16; the bundle needs no bfloat16 graph
    int8                        the Q/DQ graph: quantised products in INT8, all else in bfloat16
                                where the processor has it, else in float32
    fp8, int8-weights           the Q/DQ graph, computed in float32
    float16                     the float16 graph, its rounded weights computed in float32

bfloat16 from the float32 graph: OpenVINO then chooses what stays float32, and fuses more than
around the Casts of a typed graph. `OpenVinoBackend.name` tells what is computed in it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.errors import (
    BundleError,
    DeviceError,
    MissingDependencyError,
    SessionError,
    require,
)
from hhdeploy.files.caches import Entry
from hhdeploy.packages import check_version
from hhdeploy.runtime.backends import (
    BackendOptions,
    Bank,
    Ids,
    Images,
    check_tensors,
    closed,
    side_by_side,
)
from hhdeploy.runtime.openvino_cache import blob_entry, map_blob, write_blob
from hhdeploy.runtime.processor import overflows_in_int8

_CPU: Final = "CPU"
_NAME: Final = "FULL_DEVICE_NAME"
_BFLOAT16: Final = "bfloat16"
# Up to these bytes of graph and weights a single image has a compiled model of its own.
_SMALL: Final = 32 << 20


@dataclass(frozen=True)
class Compiled:
    """A compiled model.

    Attributes:
        model: OpenVINO's.
        memory: what its weights lie in, if not its own; it must outlive the model.
    """

    model: Any
    memory: Any = None


class OpenVinoBackend:
    """A compiled model; each thread has an infer request with the bank bound once.

    A small model is compiled once more when its first single image comes, for a batch of exactly
    one: OpenVINO then fuses what it leaves apart where a dimension is open, and in a small model
    a node costs as much as its arithmetic.
    """

    def __init__(
        self,
        ov: ModuleType,
        general: Compiled,
        bank: Bank | None,
        name: str,
        one_image: Callable[[], Compiled | None] = lambda: None,
    ) -> None:
        """``one_image`` compiles for a batch of one; None where that is not worth it."""
        self.name = name
        self._ov = ov
        self._bank = bank
        self._compile_one = one_image
        self._one: Any = None
        self._one_tried = False
        self._compiling = threading.Lock()
        self._requests = threading.local()
        self._model = general.model
        # Held here as the bank is, see `run`. Last, so that it goes after all that reads it;
        # `close` leaves it, as a run may be under way.
        self._memory = [general.memory]

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`. Raises `DeviceError` if OpenVINO fails, e.g. out of memory;
        `SessionError` where it is closed."""
        # OpenVINO reads the arrays where they are and holds no reference: they live until the
        # end of this call. Read-only ones, which it does not take, are copied.
        images = np.require(images, requirements=["C", "W"])
        try:
            request = self._request(single=len(images) == 1)
            request.set_tensor("images", self._ov.Tensor(images, shared_memory=True))
            if ids is not None:
                request.set_tensor("adapter_ids", self._ov.Tensor(ids, shared_memory=True))
            outputs = list(request.infer().values())  # copies
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {error}") from error
        return side_by_side(outputs)

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: the bank is shared memory."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._requests = threading.local()
        self._model = self._one = None

    def _request(self, *, single: bool) -> Any:
        """This thread's request for one image, or for any number of them."""
        local, model = self._requests, self._model
        if model is None:
            raise closed()
        if single:
            request = getattr(local, "one", None)
            if request is None:
                own = self._for_one_image()
                request = local.one = self._bound(own) if own else self._request(single=False)
            return request
        if not hasattr(local, "it"):
            local.it = self._bound(model)
        return local.it

    def _for_one_image(self) -> Any:
        with self._compiling:  # the other threads wait: one answers in the same bits as the next
            if not self._one_tried:
                own = self._compile_one()
                if own is not None:
                    self._one = own.model
                    self._memory.append(own.memory)
                self._one_tried = True
        return self._one

    def _bound(self, model: Any) -> Any:
        request = model.create_infer_request()
        if self._bank is not None:
            request.set_tensor("adapter_bank", self._ov.Tensor(self._bank, shared_memory=True))
        return request


def open_openvino(bundle: Bundle, bank: Bank | None, options: BackendOptions) -> OpenVinoBackend:
    """Compile a bundle's graph for the CPU, or take it out of the cache.

    Raises:
        BundleError: no graph of the precision, one that was changed, that does not compile, or
            takes or gives others than the manifest tells.
        SessionError: this processor does not compute in the precision.
        MissingDependencyError: OpenVINO is not installed, or too old.
    """
    graph = "float32" if options.precision == _BFLOAT16 else options.precision
    # The files are hashed beside the import of OpenVINO and, as blobs are found by the same
    # hashes, beside loading one. Nothing is compiled before they are right, or answers.
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(bundle.graph, graph)
        ov = import_openvino("`device='openvino'`")
        core = shared_core()
        if options.precision == _BFLOAT16:
            _check_bfloat16(core)
        low = options.precision == _BFLOAT16 or (
            options.precision == "int8" and _has_bfloat16(core)
        )
        config = _config(options, low)
        digest = bundle.manifest.graph_digest(graph)

        def entry_of(*facts: str) -> Entry | None:
            if options.cache is None or not digest:
                return None
            facts = (digest, *_facts(ov, core), json.dumps(config), *facts)
            return blob_entry(options.cache, *facts)

        entry = entry_of()
        found = _loaded(ov, core, entry, config)
        path = checked.result()
    if found is None:
        found = _compiled(core, path, config)
        _keep(entry, found)
    takes, gives = (
        {_name(value, bundle.manifest.tensors): _sizes(value.partial_shape) for value in values}
        for values in (found.model.inputs, found.model.outputs)
    )
    check_tensors(path, takes, gives, bundle.manifest)

    small = _size(path) <= _SMALL

    def one_image() -> Compiled | None:
        if not small:
            return None
        shapes = _one_image_shapes(bundle, bank)
        entry = entry_of(json.dumps(shapes))
        found = _loaded(ov, core, entry, config)
        if found is not None:
            return found
        # It is only speed: a bundle that went or was replaced since it was opened, or a graph
        # that takes no fixed batch, is no error.
        try:
            found = _compiled(core, bundle.graph(graph), config, shapes)
        except BundleError:
            return None
        _keep(entry, found)
        return found

    name = f"openvino CPU{' bfloat16' if low else ''}"
    # It has no other kernels for them.
    if options.precision == "int8" and overflows_in_int8():
        name += " without VNNI: sums of INT8 products may overflow"
    return OpenVinoBackend(ov, found, bank, name, one_image)


def import_openvino(purpose: str) -> ModuleType:
    """OpenVINO, new enough.

    Raises:
        MissingDependencyError: it is not installed, or older than the extra's bound.
    """
    ov = require("openvino", "openvino", purpose)
    check_version("openvino", "openvino", ov.__version__)
    return ov


@cache
def shared_core() -> Any:
    """The one `openvino.Core` of this process.

    OpenVINO's CPU plugin gives the thread that loads it an alternate signal stack, which it
    unmaps when the last that holds it goes, in whatever thread and order: of two cores, the
    second puts the first's stack back. The next signal then ends the process, or is written into
    what lies there by then, a model's weights. So there is one, for good, loaded in a thread that
    ends at once.
    """
    ov = import_openvino("`device='openvino'`")

    def load() -> Any:
        core = ov.Core()
        core.get_property(_CPU, _NAME)  # loads the plugin
        # Else weights stay the file: what is written into it is answered with, and the process
        # ends where it becomes shorter.
        core.set_property({"ENABLE_MMAP": False})
        return core

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load).result()


def computes_bfloat16() -> bool:
    """True if OpenVINO is installed and computes in bfloat16 on this processor."""
    try:
        import_openvino("bfloat16 on a CPU")
        _check_bfloat16(shared_core())
    except (MissingDependencyError, SessionError):
        return False
    return True


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property(_CPU, "OPTIMIZATION_CAPABILITIES")


def _check_bfloat16(core: Any) -> None:
    if not _has_bfloat16(core):
        there = core.get_property(_CPU, "OPTIMIZATION_CAPABILITIES")
        raise SessionError(
            f"bfloat16: OpenVINO does not compute in it on {core.get_property(_CPU, _NAME)} "
            f"(it has {', '.join(sorted(there))}). Open the session with `precision='float32'`."
        )


def _config(options: BackendOptions, low: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
        "PERFORMANCE_HINT": options.hint.upper(),
    }
    if options.threads is not None:
        config["INFERENCE_NUM_THREADS"] = options.threads
    return config


def _facts(ov: ModuleType, core: Any) -> tuple[str, ...]:
    """What compiling depends on beside graph and configuration."""
    capabilities = ",".join(sorted(core.get_property(_CPU, "OPTIMIZATION_CAPABILITIES")))
    return ov.get_version(), core.get_property(_CPU, _NAME), capabilities


def _one_image_shapes(bundle: Bundle, bank: Bank | None) -> dict[str, list[int]]:
    """The shape of every input for a batch of one."""
    shapes = {"images": [1, *bundle.manifest.input_size]}
    if bundle.manifest.layout is not None:
        shapes["adapter_ids"] = [1]
    if bank is not None:
        shapes["adapter_bank"] = list(bank.shape)
    return shapes


def _name(value: Any, told: Collection[str]) -> str:
    """Of an OpenVINO's input or output, which keeps those of Casts that it took away, too."""
    return str(min(value.names, key=lambda name: (name not in told, name)))


def _sizes(shape: Any) -> list[int | None]:
    """Of OpenVINO's shape; None: an open one."""
    return [d.get_length() if d.is_static else None for d in shape]


def _size(path: Path) -> int:
    """Bytes of a graph and its weights."""
    weights = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def _compiled(
    core: Any,
    path: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, list[int]] | None = None,
) -> Compiled:
    """A graph compiled, for inputs of these shapes alone if given."""
    try:
        model = core.read_model(str(path))
        if shapes is not None:
            model.reshape(dict(shapes))
        return Compiled(core.compile_model(model, _CPU, config))
    except RuntimeError as error:
        if path.with_name(f"{path.name}.data").is_symlink():  # as in the cache of the hub
            raise BundleError(
                f"{path}: its weights are a link, which OpenVINO does not follow out of a folder. "
                "Copy the bundle with what its links lead to (cp -rL), or take it with `pull()`."
            ) from error
        raise BundleError(f"OpenVINO cannot compile {path}: {error}") from error


def _loaded(
    ov: ModuleType, core: Any, entry: Entry | None, config: Mapping[str, Any]
) -> Compiled | None:
    """The compiled model in a cache; None if there is none, or OpenVINO refuses it."""
    memory = None if entry is None else map_blob(entry)
    if memory is None:
        return None
    try:
        tensor = ov.Tensor(memory, shared_memory=True)
        return Compiled(core.import_model(tensor, _CPU, config), memory)
    except (RuntimeError, TypeError):  # TypeError: a version that does not read from memory
        return None


def _keep(entry: Entry | None, compiled: Compiled) -> None:
    if entry is not None:
        write_blob(entry, compiled.model.export_model().getbuffer())
