"""INT8 calibration by NNCF: activation ranges, SmoothQuant factors, corrected biases.

NNCF runs on the float32 graph; what it found is read out of the graph that it wrote, and that
graph is dropped. `qdq` writes ours from the float32 graph: names and metadata stay, any site can
be left out, and other precisions use the same scales.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.calibration.scales import SiteScale
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import HhdeployError, PlanError, require
from hhdeploy.files.writing import copied, temporary_directory
from hhdeploy.graph import BRANCH, GraphLinear

if TYPE_CHECKING:
    import onnx

    from hhdeploy.calibration.data import CalibrationData

# NNCF moves a quantiser up through these: they change no value.
_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice")
# What NNCF calls the Mul of SmoothQuant.
_SMOOTH = "nncf_smooth_quant"


def calibrate_int8(
    graph_path: Path,
    sites: Mapping[str, GraphLinear],
    data: CalibrationData,
    settings: CalibrationSettings,
) -> dict[str, SiteScale]:
    """Run NNCF's post-training quantisation and read the scales of every site.

    Args:
        graph_path: the float32 graph; its weights may be in external data beside it.
        sites: of the same graph, loaded.
        data: calibration images as feeds of the graph, one image each.
        settings: ``smooth_quant`` and ``bias_correction`` are used here.

    Raises:
        MissingDependencyError: NNCF is not installed.
        PlanError: NNCF refused the graph, or chose a range that TensorRT refuses.

    Returns:
        Site name -> scales; a site that NNCF left in floating point is missing.
    """
    nncf = import_nncf()
    proto = _named_proto(graph_path)
    ignored = _ignored(proto, {site.node.name for site in sites.values()})
    try:
        with _weights_of(graph_path) as folder, _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = nncf.quantize(
                proto,
                nncf.Dataset(data),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(data),
                fast_bias_correction=True,
                ignored_scope=nncf.IgnoredScope(names=ignored),
                advanced_parameters=_advanced(nncf, folder, settings),
            )
    except HhdeployError:
        raise
    except Exception as error:
        raise PlanError(
            f"{graph_path}: NNCF {nncf.__version__} could not quantise the graph: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _read_scales(quantised, sites)


def nncf_version() -> str:
    """Version of the installed NNCF."""
    version: str = import_nncf().__version__
    return version


def import_nncf() -> ModuleType:
    """NNCF without the logger class that importing it installs. Raises `MissingDependencyError`."""
    logger_class = logging.getLoggerClass()
    try:
        with _quiet():
            return require("nncf", "calibrate", "calibrating")
    finally:
        logging.setLoggerClass(logger_class)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF logs, and shows progress bars on stdout, whose styles take numbers of the caller's
    generator; errors still raise."""
    before = random.getstate()
    # torch, if it is there, is imported too and reports that it finds no GPU.
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(before)


def _advanced(nncf: ModuleType, weights: Path, settings: CalibrationSettings) -> Any:
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    alpha = -1.0 if settings.smooth_quant is None else settings.smooth_quant
    return nncf.AdvancedQuantizationParameters(
        disable_bias_correction=not settings.bias_correction,
        # The largest value of all images. NNCF's default, the mean of the images' largest, clips:
        # on the starter models it cost 2 dB with SmoothQuant and 5 dB without.
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha),
        backend_params={
            "external_data_dir": str(weights),
            "compress_weights": False,  # the weights that it quantised are not used
        },
    )


@contextlib.contextmanager
def _weights_of(graph_path: Path) -> Iterator[Path]:
    """The folder of a graph's weights; with a copy of them where onnx would not read the file: a
    link, or one of several names (see `hhdeploy.graph.open_graph`)."""
    weights = graph_path.with_name(f"{graph_path.name}.data")
    if weights.is_symlink() or (weights.exists() and weights.stat().st_nlink > 1):
        with temporary_directory("weights") as scratch:
            copied(weights, scratch / weights.name)
            yield scratch
    else:
        yield graph_path.parent.resolve()


def _named_proto(path: Path) -> onnx.ModelProto:
    """The graph, its weights left on disk, every node with a name of its own (NNCF's key)."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    names = [node.name for node in proto.graph.node]
    if "" in names or len(set(names)) != len(names):
        raise PlanError(
            f"{path}: nodes without a name, or two of one name: calibration starts from the "
            "graph that `export()` wrote. Export the bundle again."
        )
    return proto


def _ignored(proto: onnx.ModelProto, quantised: set[str | None]) -> list[str]:
    """Everything that NNCF might quantise but the sites."""
    operators = ("MatMul", "Gemm", "Conv")
    return [
        node.name
        for node in proto.graph.node
        if node.name not in quantised
        and (node.op_type in operators or node.name.startswith(BRANCH))
    ]


class _Reader:
    """Finds nodes and constants in the graph that NNCF wrote."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._producers = {name: node for node in proto.graph.node for name in node.output}
        self.nodes = {node.name: node for node in proto.graph.node}

    def producer(self, name: str) -> Any:
        """The node that computes a value, None for inputs and constants."""
        return self._producers.get(name)

    def constant(self, name: str) -> NDArray[Any] | None:
        """A constant's value, None for anything else."""
        from onnx import numpy_helper

        tensor = self._constants.get(name)
        return numpy_helper.to_array(tensor) if tensor is not None else None


def _read_scales(
    quantised: onnx.ModelProto, sites: Mapping[str, GraphLinear]
) -> dict[str, SiteScale]:
    reader = _Reader(quantised)
    found = {name: _read_site(reader, site) for name, site in sites.items()}
    return {name: scale for name, scale in found.items() if scale is not None}


def _read_site(reader: _Reader, site: GraphLinear) -> SiteScale | None:
    """The scales of one site, None if NNCF left it in floating point."""
    node = reader.nodes[site.node.name]
    dequantise = reader.producer(node.input[0])
    while dequantise is not None and dequantise.op_type in _MOVEMENT:
        dequantise = reader.producer(dequantise.input[0])
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return None
    quantise = reader.producer(dequantise.input[0])
    scale, zero = reader.constant(quantise.input[1]), reader.constant(quantise.input[2])
    if scale is None or scale.size != 1 or zero is None or np.any(zero):
        raise PlanError(
            f"{site.name}: NNCF chose an asymmetric or per-channel activation range; TensorRT "
            "takes one symmetric scale a tensor. Please report this with the model's name."
        )
    # What is never negative (behind ReLU or Softmax) has unsigned codes; ours are signed.
    largest = np.iinfo(zero.dtype).max
    return SiteScale(
        absmax=float(scale) * largest,
        smooth=_read_smooth(reader, quantise.input[0], site),
        bias=_read_bias(reader, site),
    )


def _read_smooth(reader: _Reader, value: str, site: GraphLinear) -> NDArray[np.float32] | None:
    """The factors of the Mul that SmoothQuant put before the quantiser."""
    multiply = reader.producer(value)
    if multiply is None or not multiply.name.endswith(_SMOOTH):
        return None
    factors = [array for name in multiply.input if (array := reader.constant(name)) is not None]
    inputs = [name for name in multiply.input if reader.constant(name) is None]
    size = site.weight.shape[1]
    if multiply.op_type != "Mul" or inputs != [site.input.name] or factors[0].size != size:
        raise PlanError(
            f"{site.name}: NNCF put {multiply.op_type} {multiply.name} between the Linear and its "
            "input, which is not understood. Please report this with the model's name."
        )
    smooth: NDArray[np.float32] = factors[0].reshape(size)
    return smooth


def _read_bias(reader: _Reader, site: GraphLinear) -> NDArray[np.float32] | None:
    """The bias in NNCF's graph if it differs from the site's own."""
    if site.bias_node is None:
        return None
    assert site.bias_node.name is not None and site.bias is not None
    node = reader.nodes[site.bias_node.name]
    corrected: NDArray[np.float32] | None = reader.constant(node.input[site.bias_index])
    if corrected is None or np.array_equal(corrected.reshape(-1), site.bias):
        return None
    return corrected.reshape(-1)
