"""TensorRT-RTX builds the Q/DQ graphs, without a GPU, and says which GPUs lack FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hhdeploy.calibration.quantised import quantise
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.exporters.engine import new_builder
from hhdeploy.exporters.precision.typed import typed_model
from hhdeploy.packages import Log, import_tensorrt
from tests.calibration.conftest import Calibrated, saved


@pytest.fixture(scope="module")
def trt() -> Any:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return import_tensorrt("tensorrt-rtx")


def built(trt: Any, path: Path, architecture: str) -> tuple[bool, str]:
    """Whether an engine came out, and what went wrong."""
    log = Log()
    logger = log.logger(trt)
    builder = new_builder(trt, logger, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return False, str(parser.get_error(0))
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        sizes = (2, 8, 64) if value.name == "adapter_bank" else (1, 4, 8)
        profile.set_shape(value.name, *((n, *tuple(value.shape)[1:]) for n in sizes))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    return builder.build_serialized_network(network, config) is not None, log.text()


def graph(made: Calibrated, precision: str, folder: Path, low: str | None = None) -> Path:
    """A Q/DQ graph on disk, what it leaves in floating point stored low if asked for."""
    model = quantise(made.graph, made.calibration, CalibrationSettings(precision)).model
    return saved(typed_model(model, low) if low else model, folder)


def test_int8_builds_for_ampere(trt, side, tmp_path):
    assert built(trt, graph(side, "int8", tmp_path), "SM80") == (True, "")


def test_weights_alone_build_for_ampere(trt, plain, tmp_path):
    assert built(trt, graph(plain, "int8-weights", tmp_path), "SM80") == (True, "")


def test_fp8_builds_where_the_hardware_has_it(trt, plain, tmp_path):
    path = graph(plain, "fp8", tmp_path)
    assert built(trt, path, "SM89") == (True, "")
    done, errors = built(trt, path, "SM86")
    assert not done
    assert "HW-specific datatypes: fp8_e4m3" in errors


def test_what_is_left_may_be_float16(trt, side, tmp_path):
    assert built(trt, graph(side, "int8", tmp_path, "float16"), "SM89") == (True, "")
