"""Lanes: what runs one batch at a time on a TensorRT engine.

A lane is a stream, buffers on the GPU for the largest batch, page-locked staging memory and
execution contexts. No GPU has run this module yet; see `tensorrt_backend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle.manifest import Range
from hhdeploy.runtime import cuda
from hhdeploy.runtime.tensorrt_engine import Engine

# Of the graph contract's tensors.
_DTYPES = {"FLOAT": np.float32, "INT64": np.int64}


@dataclass(frozen=True)
class DeviceBank:
    """The bank on the GPU, shared by all lanes."""

    address: int
    shape: tuple[int, ...]


def fill(target: NDArray[Any], values: NDArray[Any], size: int) -> None:
    """Copy ``values`` to the front of a staging array, zeros behind them up to ``size``.

    Zeros are black images, and the row of the backbone, which every bank has.
    """
    target[: len(values)] = values
    target[len(values) : size] = 0


class Lane:
    """Runs one batch at a time; use `open_lane`."""

    def __init__(
        self, engine: Engine, bank: DeviceBank | None, batch: Range, record: bool, stack: ExitStack
    ) -> None:
        self._engine = engine
        self._bank = bank
        self._stack = stack
        self._stream = stack.enter_context(cuda.open_stream())
        self._staged: dict[str, NDArray[Any]] = {}
        self._addresses: dict[str, int] = {}
        for tensor in engine.tensors:
            if bank is not None and tensor.name == "adapter_bank":
                self._addresses[tensor.name] = bank.address
                continue
            array = stack.enter_context(
                cuda.pinned_array((batch[2], *tensor.shape[1:]), _DTYPES[tensor.dtype])
            )
            self._staged[tensor.name] = array
            self._addresses[tensor.name] = stack.enter_context(cuda.device_memory(array.nbytes))
        self._inputs = [t.name for t in engine.tensors if t.is_input and t.name in self._staged]
        self._record = record and not engine.records_graphs
        # A context must not change once a graph was recorded from it, so each recorded size has
        # its own; they never run at the same time and share their activations.
        self._scratch = (
            stack.enter_context(cuda.device_memory(engine.scratch_size)) if self._record else None
        )
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[int, Any] = {}
        # Before the memory they use, even if the traceback of an error still holds the lane.
        stack.callback(self._contexts.clear)
        stack.callback(self._graphs.clear)
        # Now: what does not fit into memory shows when the session opens, not in a request.
        self._context(batch[1])

    def run(
        self, images: NDArray[np.float32], ids: NDArray[np.int64] | None, size: int
    ) -> NDArray[np.float32]:
        """Logits of a batch that is padded to ``size``, a batch of the engine's profile."""
        fill(self._staged["images"], images, size)
        if ids is not None:
            fill(self._staged["adapter_ids"], ids, size)
        if size in self._graphs:
            self._stream.replay(self._graphs[size])
        else:
            context = self._context(size)
            self._queue(context, size)
            if self._record:
                # The first run of a shape adapts the context, which cannot be recorded.
                self._stream.synchronize()
                recorded = self._stream.captured(lambda: self._queue(context, size))
                self._graphs[size] = self._stack.enter_context(recorded)
        self._stream.synchronize()
        logits: NDArray[np.float32] = self._staged["logits"][: len(images)].copy()
        return logits

    def _queue(self, context: Any, size: int) -> None:
        for name in self._inputs:
            self._stream.upload(self._addresses[name], self._staged[name][:size])
        if not context.execute_async_v3(self._stream.handle):
            raise self._engine.failure(f"cannot run a batch of {size}")
        self._stream.download(self._staged["logits"][:size], self._addresses["logits"])

    def _context(self, size: int) -> Any:
        """The context to run a batch with, its shapes set."""
        key = size if self._record else 0
        if key not in self._contexts:
            self._contexts[key] = self._engine.context(self._stream, self._addresses, self._scratch)
        context = self._contexts[key]
        shapes = {name: (size, *self._staged[name].shape[1:]) for name in self._inputs}
        if self._bank is not None:
            shapes["adapter_bank"] = self._bank.shape
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._engine.failure(f"refuses {name} of shape {list(shape)}")
        logits = tuple(context.get_tensor_shape("logits"))
        if logits != (size, *self._staged["logits"].shape[1:]):
            # The buffer would not hold them.
            raise self._engine.failure(f"gives logits of shape {list(logits)} for {size} images")
        return context


@contextmanager
def open_lane(
    engine: Engine, bank: DeviceBank | None, batch: Range, *, cuda_graphs: bool
) -> Iterator[Lane]:
    """A lane for the engine's range of batches; frees all it holds at the end."""
    with ExitStack() as stack:
        yield Lane(engine, bank, batch, cuda_graphs, stack)
