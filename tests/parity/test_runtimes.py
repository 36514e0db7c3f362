"""One graph, three runtimes: OpenVINO computes it, TensorRT-RTX builds it, as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hhdeploy.exporters.fold import folded_model
from hhdeploy.parity import bound, compare
from hhdeploy.runtime.openvino_backend import shared_core
from tests.parity.architectures import traced
from tests.parity.ladder import (
    Floats,
    Rungs,
    ladder_adapters,
    mistaken_rows,
    rungs,
    save,
    scaled_adapters,
)

MODELS = ("vit", "swin", "beit")
# With a diagonal and a low rank alone; with s_in, s_out and db.
ADAPTERS = {"plain": ladder_adapters, "scaled": scaled_adapters}
# A plain branch is in every scaled one.
MADE = ("vit plain", *(f"{model} scaled" for model in MODELS))


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest) -> Rungs:
    model, adapters = request.param.split()
    backbone, base = traced(model)
    return rungs(backbone, base, ADAPTERS[adapters](base), 3)


@pytest.fixture
def first(made: Rungs) -> str:
    """The adapter of every kind of site."""
    return next(iter(made.adapters))


# -- OpenVINO -----------------------------------------------------------------------------------


def compiled(path: Path) -> Any:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return shared_core().compile_model(str(path), "CPU", config)


def logits(model: Any, feeds: dict[str, Any]) -> Floats:
    found: Floats = model(feeds)["logits"].copy()
    return found


def test_openvino_runs_mixed_batches(made, tmp_path):
    model = compiled(save(made.branched(), tmp_path))
    reference = made.reference
    for size in (1, 7, len(reference.images)):
        found = np.concatenate(
            [
                logits(
                    model,
                    {
                        "images": reference.images[i : i + size],
                        "adapter_ids": reference.adapter_ids[i : i + size],
                        "adapter_bank": made.bank,
                    },
                )
                for i in range(0, len(reference.images), size)
            ]
        )
        comparison = compare(reference.logits, found)
        assert not comparison.failures(bound("openvino", "float32")), comparison


def test_openvino_sees_mistakes(made, first, tmp_path):
    model = compiled(save(made.branched(), tmp_path))
    images, expected = made.of(first)
    for mistake, row in mistaken_rows(made, first).items():
        feeds = {"images": images, "adapter_ids": np.zeros(len(images), np.int64)}
        found = logits(model, {**feeds, "adapter_bank": row[None]})[:, : made.classes(first)]
        comparison = compare(expected, found)
        assert comparison.failures(bound("openvino", "float32")), mistake


def test_openvino_runs_folded_graphs(made, first, tmp_path):
    for name in (first, "after"):
        folder = tmp_path / name
        folder.mkdir()
        images, expected = made.of(name)
        model = compiled(save(folded_model(made.base, made.adapters[name]), folder))
        comparison = compare(expected, logits(model, {"images": images}))
        assert not comparison.failures(bound("openvino", "float32")), comparison


# -- TensorRT-RTX -------------------------------------------------------------------------------


# Swin has every kind of node that the others have, and windows.
@pytest.mark.parametrize(
    "made",
    [pytest.param(m, marks=[] if m == "swin scaled" else pytest.mark.families) for m in MADE],
    indirect=True,
)
def test_tensorrt_rtx_builds_the_branches(made, tmp_path):
    """Its builder works without a GPU; dynamic batch and slots in one profile."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path = save(made.branched(), tmp_path)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(4)]
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        "images": (-1, 3, 32, 32),
        "adapter_ids": (-1,),
        "adapter_bank": (-1, made.plan.layout.size),
    }
    profile = builder.create_optimization_profile()
    size = made.plan.layout.size
    profile.set_shape("images", *((n, 3, 32, 32) for n in (1, 4, 8)))
    profile.set_shape("adapter_ids", *((n,) for n in (1, 4, 8)))
    profile.set_shape("adapter_bank", *((n, size) for n in (2, 8, 64)))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 10_000
