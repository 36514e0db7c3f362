"""Look at the inputs of a graph's sites while it runs in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.calibration.feeds import Feed
from hhdeploy.errors import BundleError, DeviceError, require
from hhdeploy.graph import GraphLinear


class Probe:
    """The float32 graph with the input of every site as a further output, in memory.

    Runs on the CPU in ONNX Runtime, one feed after the other.
    """

    def __init__(self, graph_path: Path, sites: Mapping[str, GraphLinear]) -> None:
        onnx = require("onnx", "calibrate", "looking into a graph")
        self._inputs = {name: str(site.input.name) for name, site in sites.items()}
        proto = onnx.load(str(graph_path), load_external_data=False)
        there = {output.name for output in proto.graph.output}
        # q, k and v read one value; a type is all that ONNX Runtime asks for.
        self._values = [v for v in dict.fromkeys(self._inputs.values()) if v not in there]
        proto.graph.output.extend(onnx.ValueInfoProto(name=value) for value in self._values)
        self._session = CpuSession(proto.SerializeToString(), graph_path)

    def inputs(self, feeds: Iterable[Feed]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """For every feed: site name -> its input as [rows, in] (sites may share an array)."""
        for feed in feeds:
            found = dict(zip(self._values, self._session.run(self._values, feed), strict=True))
            yield {
                name: found[value].reshape(-1, found[value].shape[-1])
                for name, value in self._inputs.items()
            }


class CpuSession:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(self, serialized: bytes, graph_path: Path) -> None:
        """Load a graph whose large weights are those beside ``graph_path``.

        Raises:
            BundleError: ONNX Runtime cannot load it.
        """
        ort = require("onnxruntime", "calibrate", "running a graph while calibrating")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph_path.resolve().parent)
        )
        self._path = graph_path
        try:
            self._session = ort.InferenceSession(
                serialized, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise BundleError(f"ONNX Runtime cannot load {graph_path}: {error}") from error

    def run(self, outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """The values named. Raises `DeviceError` if ONNX Runtime fails, e.g. out of memory."""
        try:
            found: list[NDArray[Any]] = self._session.run(list(outputs), feed)
        except Exception as error:
            raise DeviceError(f"ONNX Runtime failed in {self._path}: {error}") from error
        return found
