"""Engines built by the real TensorRT-RTX compiler, which needs no GPU to build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hhdeploy.errors import EngineError, PlanError
from hhdeploy.exporters.engine import BuildOptions, Shape, check_build_options, engine_from_onnx
from hhdeploy.exporters.engine_errors import explain, site_of

RTX, OPTIONS = "tensorrt-rtx", BuildOptions()
SITE = "blocks.3.attn.proj"
SHAPES: dict[str, Shape] = {"images": ((1, 2, 5), 7)}


@pytest.fixture(scope="module", autouse=True)
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def saved(
    folder: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], rows: int = 7
) -> Path:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 7])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])
    weight = numpy_helper.from_array(np.ones((rows, 3), np.float32), "w")
    graph = helper.make_graph(nodes, "graph", [images], [logits], [weight, *constants])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def matmul(*inputs: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", inputs, ["logits"], name=f"{SITE}/MatMul")


def quantised(folder: Path, zero: onnx.TensorProto) -> Path:
    """A product of quantised operands with one zero point for both."""
    scale = numpy_helper.from_array(np.asarray(0.1, np.float32), "scale")
    nodes = []
    for name in ("images", "w"):
        pair = [name, "scale", "zero"]
        nodes.append(helper.make_node("QuantizeLinear", pair, [f"{name}_q"], name=f"{SITE}/{name}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *pair[1:]], [f"{name}_dq"]))
    return saved(folder, [*nodes, matmul("images_dq", "w_dq")], [scale, zero])


def int8_zero(value: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, np.int8), "zero")


def fp8_zero() -> onnx.TensorProto:
    return helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])


def test_builds_and_reports_progress(tmp_path):
    phases: list[tuple[str, int, int]] = []
    path = saved(tmp_path, [matmul("images", "w")], [])
    built = engine_from_onnx(path, RTX, SHAPES, OPTIONS, lambda *phase: phases.append(phase))
    assert len(memoryview(built.plan)) > 1_000
    assert built.seconds > 0
    done = {name for name, steps, total in phases if steps == total}
    assert "Building engine" in done
    assert done == {name for name, _, _ in phases}, "a phase was never finished"


def test_the_profile_is_in_the_engine(tmp_path):
    """Another maximum, another engine: the compiler got the range."""
    path = saved(tmp_path, [matmul("images", "w")], [])
    plans = {
        bytes(engine_from_onnx(path, RTX, {"images": (batch, 7)}, OPTIONS).plan)
        for batch in ((1, 2, 5), (1, 2, 6), (1, 2, 5))
    }
    assert len(plans) == 2


def test_float32_does_not_become_tf32_unless_asked(tmp_path):
    path = saved(tmp_path, [matmul("images", "w")], [])
    exact, loose = (
        bytes(engine_from_onnx(path, RTX, SHAPES, replace(OPTIONS, tf32=tf32)).plan)
        for tf32 in (False, True)
    )
    assert exact != loose


def test_symmetric_int8_builds_and_asymmetric_is_explained(tmp_path):
    assert engine_from_onnx(quantised(tmp_path, int8_zero(0)), RTX, SHAPES, OPTIONS).plan
    with pytest.raises(EngineError) as error:
        engine_from_onnx(quantised(tmp_path, int8_zero(3)), RTX, SHAPES, OPTIONS)
    text = str(error.value)
    assert f"'{SITE}/images' (QuantizeLinear) at {SITE}" in text
    assert "zero point" in text
    assert "calibrate('BUNDLE', data='DIR'" in text


def test_fp8_builds_for_ada_and_is_explained_for_ampere(tmp_path):
    path = quantised(tmp_path, fp8_zero())
    ada, ampere = (replace(OPTIONS, architectures=(a,)) for a in ("sm89", "sm80"))
    assert engine_from_onnx(path, RTX, SHAPES, ada).plan
    with pytest.raises(EngineError, match=r"sm80[\s\S]*`architectures=\['sm89'\]`"):
        engine_from_onnx(path, RTX, SHAPES, ampere)


def test_parser_errors_name_node_and_site(tmp_path):
    unknown = helper.make_node("Unique", ["images"], ["logits"], name="model/Unique")
    with pytest.raises(EngineError, match=r"node 'model/Unique' \(Unique\): .*UNSUPPORTED_NODE"):
        engine_from_onnx(saved(tmp_path, [unknown], []), RTX, SHAPES, OPTIONS)
    path = saved(tmp_path, [matmul("images", "w")], [], rows=5)
    with pytest.raises(
        EngineError, match=rf"'{SITE}/MatMul' \(MatMul\) at {SITE}: [\s\S]*must match"
    ):
        engine_from_onnx(path, RTX, SHAPES, OPTIONS)


def test_an_input_outside_the_contract_is_refused(tmp_path):
    path = saved(tmp_path, [matmul("images", "w")], [])
    with pytest.raises(EngineError, match="input 'images'; expected pictures"):
        engine_from_onnx(path, RTX, {"pictures": ((1, 2, 5), 7)}, OPTIONS)


def test_an_unknown_architecture_lists_what_there_is(tmp_path):
    path = saved(tmp_path, [matmul("images", "w")], [])
    with pytest.raises(PlanError, match=r"`architectures=\['sm90'\]`: .*sm89, sm120"):
        engine_from_onnx(path, RTX, SHAPES, replace(OPTIONS, architectures=("sm90",)))


def test_architectures_are_built_for(tmp_path):
    path = saved(tmp_path, [matmul("images", "w")], [])
    plans = {
        bytes(engine_from_onnx(path, RTX, SHAPES, replace(OPTIONS, architectures=a)).plan)
        for a in ((), ("sm80",), ("sm89",), ("sm80", "sm89"))
    }
    assert len(plans) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": (4, 2, 8)}, r"1 <= min <= opt <= max, found 4, 2, 8"),
        ({"batch": (0, 2, 8)}, r"found 0, 2, 8"),
        ({"bank_as_constant": True, "max_slots": 9}, r"`max_slots` does not go with"),
        ({"hardware_compatible": True}, r"`hardware_compatible` has no effect in TensorRT-RTX"),
        ({"workspace_mib": 64}, r"`workspace_mib` has no effect"),
        ({"optimization_level": 3}, r"`optimization_level` has no effect"),
    ],
)
def test_options_that_cannot_work_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        check_build_options(RTX, "float32", replace(OPTIONS, **change))


def test_tensorrt_builds_for_its_own_gpu():
    with pytest.raises(PlanError, match="TensorRT builds for the GPU of"):
        check_build_options("tensorrt", "float32", replace(OPTIONS, architectures=("sm89",)))


def test_optimization_levels_really_make_no_difference(tmp_path, rtx):
    """Why the flag is refused; when this fails, TensorRT-RTX has begun to honour it."""
    path = saved(tmp_path, [matmul("images", "w")], [])
    plans = {
        bytes(engine_from_onnx(path, RTX, SHAPES, replace(OPTIONS, optimization_level=level)).plan)
        for level in (0, 5)
    }
    assert len(plans) == 1


def test_tf32_is_for_float32_alone():
    check_build_options(RTX, "float32", replace(OPTIONS, tf32=True))
    with pytest.raises(PlanError, match="`tf32` is for float32"):
        check_build_options(RTX, "float16", replace(OPTIONS, tf32=True))


@pytest.mark.parametrize("architectures", [(), ("sm80",), ("sm86", "sm89")])
def test_fp8_is_refused_before_building_where_a_gpu_lacks_it(architectures):
    options = replace(OPTIONS, architectures=architectures)
    with pytest.raises(PlanError, match=r"FP8 needs sm89"):
        check_build_options(RTX, "fp8", options)
    check_build_options(RTX, "fp8", replace(OPTIONS, architectures=("sm89", "sm120")))


@pytest.mark.parametrize(
    ("node", "site"),
    [
        ("branch/blocks.0.attn.qkv.q/additive/scale", "blocks.0.attn.qkv.q"),
        (f"{SITE}/MatMul", SITE),
        ("branch/bank/gather", None),
        ("model/Softmax", None),
        ("MatMul_3", None),
    ],
)
def test_sites_are_read_from_node_names(node, site):
    assert site_of(node) == site


def test_a_builder_message_is_kept_whole_and_explained():
    text = "Error in ForeignNode[a...blocks.2.attn.proj/MatMul]: OutOfMemory\nsecond line"
    found = explain(text)
    assert found.startswith(text)
    assert "blocks.2.attn.proj" in found.removeprefix(text)
    assert "`batch[2]`" in found
