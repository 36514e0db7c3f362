"""A deserialised TensorRT or TensorRT-RTX engine: its tensors and its execution contexts.

No GPU has run this module yet; see `tensorrt_backend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hhdeploy.bundle.manifest import EngineEntry
from hhdeploy.errors import BundleError, DeviceError, as_code
from hhdeploy.files.caches import Entry
from hhdeploy.packages import Log, import_tensorrt
from hhdeploy.runtime import cuda
from hhdeploy.runtime.kernel_cache import read_kernels, write_kernels


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine, its dtype as TensorRT names it; -1 in a shape varies."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'input' if self.is_input else 'output'} {self.name} {self.dtype} {[*self.shape]}"


class Engine:
    """A deserialised engine; use `open_engine`.

    Attributes:
        tensors: its inputs and outputs, in its order.
    """

    def __init__(self, plan: bytes, entry: EngineEntry) -> None:
        self._trt = trt = import_tensorrt(entry.backend)
        self._compiles = entry.backend == "tensorrt-rtx"
        self._title = f"{entry.backend} {entry.version}"
        self._log = Log()
        # The bindings keep no reference to a logger that Python made.
        self._logger = self._log.logger(trt)
        self._runtime = trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(
                f"{self._title} cannot load {entry.file}: {self._log.text()}\n"
                f"Build it again with: {as_code('build', 'BUNDLE', backend=entry.backend)}"
            )
        self._engine: Any = engine
        self._config: Any = None
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.tensors = [
            EngineTensor(
                name,
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_dtype(name).name,
                tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        ]

    def failure(self, what: str) -> DeviceError:
        """TensorRT gave up on something; the error quotes all it said."""
        return DeviceError(f"{self._title} {what}: {self._log.text() or 'it gives no reason.'}")

    @contextmanager
    def configured(self, kept: Entry | None, *, cuda_graphs: bool) -> Iterator[None]:
        """TensorRT-RTX compiles kernels while it runs: keep them in ``kept``; None: in memory.

        For the same reason it records CUDA graphs itself, once a shape's own kernels are there;
        recorded from outside, a graph would replay the slower ones of the first run for ever.
        Plain TensorRT compiles when it builds, has nothing to keep, and its graphs are recorded
        by the `Lane`.
        """
        if not self._compiles:
            yield
            return
        config = self._engine.create_runtime_config()
        if cuda_graphs:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        kernels = config.create_runtime_cache()
        if kept is not None and (blob := read_kernels(kept)):
            # False: of another driver, and so on. They are compiled again, which is no error.
            kernels.deserialize(blob)
            self._log.errors.clear()
        config.set_runtime_cache(kernels)
        self._config = config
        try:
            yield
        finally:
            self._config = None
            if kept is not None:
                write_kernels(kept, bytes(kernels.serialize()))

    @property
    def records_graphs(self) -> bool:
        """True if TensorRT records CUDA graphs itself when it is asked to."""
        return self._config is not None

    @property
    def scratch_size(self) -> int:
        """Bytes that an execution context needs for activations."""
        return int(self._engine.device_memory_size_v2)

    def context(
        self, stream: cuda.Stream, addresses: Mapping[str, int], scratch: int | None
    ) -> Any:
        """A ``trt.IExecutionContext`` with all tensors bound; ``scratch``: memory to share."""
        if self._config is not None:
            context = self._engine.create_execution_context(self._config)
        elif scratch is None:
            context = self._engine.create_execution_context()
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self.failure("cannot create an execution context")
        if scratch is not None:
            context.set_device_memory(scratch, self.scratch_size)
        # Only an engine's first context has the profile without asking.
        if not context.set_optimization_profile_async(0, stream.handle):
            raise self.failure("refuses its optimization profile")
        stream.synchronize()
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self.failure(f"refuses the memory of {name}")
        return context


@contextmanager
def open_engine(
    plan: bytes, entry: EngineEntry, kept: Entry | None, *, cuda_graphs: bool
) -> Iterator[Engine]:
    """Deserialise an engine.

    Args:
        plan: its file's content.
        entry: of the manifest.
        kept: where TensorRT-RTX's compiled kernels are kept; None: nowhere.
        cuda_graphs: let TensorRT-RTX record CUDA graphs.

    Raises:
        BundleError: TensorRT refused it; the message has all that it said.
    """
    opened = Engine(plan, entry)
    with opened.configured(kept, cuda_graphs=cuda_graphs):
        yield opened
