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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
from hhdeploy.packages import check_version
from hhdeploy.runtime.backends import BackendOptions, Bank, Ids, Images, side_by_side
from hhdeploy.runtime.openvino_cache import blob_entry, map_blob, write_blob

_CPU: Final = "CPU"
_NAME: Final = "FULL_DEVICE_NAME"
_BFLOAT16: Final = "bfloat16"
# Flags of x86 processors whose 8-bit products are added in 32 bits.
_EXACT_INT8: Final = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})


class OpenVinoBackend:
    """One compiled model; each thread has an infer request with the bank bound once."""

    def __init__(
        self, ov: ModuleType, model: Any, bank: Bank | None, name: str, memory: Any = None
    ) -> None:
        """``memory``: what the model's weights lie in, if not its own."""
        self.name = name
        self._ov = ov
        self._model = model
        self._bank = bank
        self._requests = threading.local()
        # Held here as the bank is, see `run`. Last, so that it goes after all that reads it;
        # `close` leaves it, as a run may be under way.
        self._memory = memory

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`. Raises `DeviceError` if OpenVINO fails, e.g. out of memory."""
        request = getattr(self._requests, "it", None)
        # OpenVINO reads the arrays where they are and holds no reference: they live until the
        # end of this call. Read-only ones, which it does not take, are copied.
        images = np.require(images, requirements=["C", "W"])
        try:
            if request is None:
                request = self._requests.it = self._request()
            request.set_tensor("images", self._ov.Tensor(images, shared_memory=True))
            if ids is not None:
                request.set_tensor("adapter_ids", self._ov.Tensor(ids, shared_memory=True))
            request.infer()
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {error}") from error
        outputs = [request.get_output_tensor(i).data for i in range(len(self._model.outputs))]
        return side_by_side(outputs) if len(outputs) > 1 else side_by_side([outputs[0].copy()])

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: the bank is shared memory."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._requests = threading.local()
        self._model = None

    def _request(self) -> Any:
        request = self._model.create_infer_request()
        if self._bank is not None:
            request.set_tensor("adapter_bank", self._ov.Tensor(self._bank, shared_memory=True))
        return request


def open_openvino(bundle: Bundle, bank: Bank | None, options: BackendOptions) -> OpenVinoBackend:
    """Compile a bundle's graph for the CPU, or take it out of the cache.

    Raises:
        BundleError: no graph of the precision, one that was changed, or that does not compile.
        SessionError: this processor does not compute in the precision.
        MissingDependencyError: OpenVINO is not installed, or too old.
    """
    graph = "float32" if options.precision == _BFLOAT16 else options.precision
    # The files are hashed beside the import of OpenVINO and, as blobs are found by the same
    # hashes, beside loading one. Nothing is compiled before they are right, or answers.
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(bundle.graph, graph)
        ov = import_openvino("device='openvino'")
        core = shared_core()
        if options.precision == _BFLOAT16:
            _check_bfloat16(core)
        low = options.precision == _BFLOAT16 or (
            options.precision == "int8" and _has_bfloat16(core)
        )
        config = _config(options, low)
        digest = bundle.manifest.graph_digest(graph)
        model = memory = entry = None
        if options.cache is not None and digest:
            entry = blob_entry(options.cache, digest, *_facts(ov, core), json.dumps(config))
            memory = map_blob(entry)
        if memory is not None:
            model = _loaded(ov, core, memory, config)
        path = checked.result()
    if model is None:
        model = _compiled(core, path, config)
        if entry is not None:
            write_blob(entry, model.export_model().getbuffer())
    name = f"openvino CPU{' bfloat16' if low else ''}"
    if options.precision == "int8" and not adds_int8_exactly():
        name += " without VNNI: sums of INT8 products may overflow"
    return OpenVinoBackend(ov, model, bank, name, memory)


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
    ov = import_openvino("device='openvino'")

    def load() -> Any:
        core = ov.Core()
        core.get_property(_CPU, _NAME)  # loads the plugin
        return core

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load).result()


def adds_int8_exactly(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """False on x86 processors that add pairs of 8-bit products in 16 bits, which overflows.

    OpenVINO has no other kernels for them. What cannot be read counts as exact.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return True
    flags = {
        word for line in text.splitlines() if line.startswith("flags") for word in line.split()
    }
    return not flags or not flags.isdisjoint(_EXACT_INT8)


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


def _compiled(core: Any, path: Path, config: Mapping[str, Any]) -> Any:
    try:
        return core.compile_model(str(path), _CPU, config)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot compile {path}: {error}") from error


def _loaded(ov: ModuleType, core: Any, blob: Any, config: Mapping[str, Any]) -> Any | None:
    """The compiled model in a blob, which must stay where it is; None if OpenVINO refuses it."""
    try:
        return core.import_model(ov.Tensor(blob, shared_memory=True), _CPU, config)
    except (RuntimeError, TypeError):  # TypeError: a version that does not read from memory
        return None
