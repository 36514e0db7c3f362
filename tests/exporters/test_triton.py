"""Triton repositories: every field as protobuf reads it, the model as Triton would feed it."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup
from tritonclient.utils import triton_to_np_dtype

import hhdeploy.exporters.writer
import hhdeploy.repositories.triton
from hhdeploy import write_ovms, write_triton, write_web
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.engines import engine_name
from hhdeploy.bundle.manifest import (
    BANK_FILE,
    MANIFEST,
    AdapterEntry,
    EngineEntry,
    Manifest,
    write_manifest,
)
from hhdeploy.errors import BundleError, PlanError, WriteError
from hhdeploy.exporters.triton import (
    TritonOptions,
    adapters_json,
    config_pbtxt,
    labels_txt,
    quoted,
)
from hhdeploy.files.writing import sha256_of
from hhdeploy.preprocess import Preprocess
from hhdeploy.repositories.triton import write_triton_repository
from hhdeploy.runtime import open_session
from tests.broken_manifests import OF_OTHER_GRAPHS, broken, exchange_rows
from tests.support import assert_caught, assert_parity, images
from tests.workshop import HEAVY, contents, copy_bundle, flip_byte, run_python

NASTY = 'say "hi"\\n', "back\\slash \\", "two\nlines\r\nhere", "tab\there", "é 猫 \U0001f408", "'|="
GPU_ENGINE = b"not a real plan"


def parsed(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(encoding="ascii"), ModelConfig())


def write(bundle: Path, out: Path, *, overwrite: bool = False, **options: Any):
    return write_triton_repository(bundle, out, TritonOptions(**options), overwrite=overwrite)


class FakeTriton:
    """What Triton and its onnxruntime backend do with a model directory and client requests."""

    def __init__(self, model: Path) -> None:
        self.config = parsed(model / "config.pbtxt")
        assert self.config.name == model.name
        assert self.config.backend == "onnxruntime"
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(model / "1" / "model.onnx"), settings)
        declared = {i.name for i in self.config.input}
        assert declared == {i.name for i in self.session.get_inputs()}

    def infer(self, *requests: dict[str, np.ndarray]) -> np.ndarray:
        """Requests batched together, shapes checked and changed as the configuration says."""
        feeds = {}
        for declared in self.config.input:
            kind = triton_to_np_dtype(DataType.Name(declared.data_type).removeprefix("TYPE_"))
            for request in requests:
                assert request[declared.name].dtype == kind
                assert list(request[declared.name].shape[1:]) == list(declared.dims)
            tensor = np.concatenate([request[declared.name] for request in requests])
            assert len(tensor) <= self.config.max_batch_size
            if declared.HasField("reshape"):
                tensor = tensor.reshape(len(tensor), *declared.reshape.shape)
            feeds[declared.name] = tensor
        (output,) = self.config.output
        logits = self.session.run([output.name], feeds)[0]
        assert list(logits.shape[1:]) == list(output.dims)
        assert logits.dtype == triton_to_np_dtype(
            DataType.Name(output.data_type).removeprefix("TYPE_")
        )
        return logits


def column(*rows: int) -> np.ndarray:
    """adapter_ids as clients send them."""
    return np.asarray(rows, np.int64).reshape(-1, 1)


@pytest.fixture
def copy(small, tmp_path):
    """Alpha and gamma, free to be changed."""
    return copy_bundle(small, tmp_path / "copy")


def add_engine(path: Path, **changes: Any) -> str:
    """Enter an engine, as `hhdeploy build --backend tensorrt --bank-as-constant` would."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    branches = manifest.layout is not None
    entry = EngineEntry(
        file="",
        backend="tensorrt",
        version="10.9.0.34",
        precision="float32",
        architectures=("sm89",),
        gpu="NVIDIA L4",
        batch=(1, 8, 24),
        slots=None,
        bank_sha256=manifest.files[BANK_FILE] if branches else None,
        graph_sha256=manifest.graph_digest("float32"),
        optimization_level=None,
        build_seconds=1.0,
        bytes=len(GPU_ENGINE),
    )
    entry = replace(entry, **changes)
    name = engine_name(
        entry.precision,
        entry.backend,
        entry.architectures,
        bank_as_constant=entry.bank_sha256 is not None,
    )
    (path / name).write_bytes(GPU_ENGINE)
    entry = replace(entry, file=name)
    files = {**manifest.files, name: sha256_of(path / name)}
    engines = (*manifest.engines, entry)
    write_manifest(path, replace(manifest, engines=engines, files=files))
    return name


# -- config.pbtxt, every field --------------------------------------------------------------------


def expected_config(manifest: Manifest, **fields: Any) -> ModelConfig:
    """The configuration that is meant, built without any text."""
    rows = {a.name: a.row for a in manifest.adapters}
    if manifest.backbone_classes:
        rows = {"backbone": 0, **rows}
    facts = {"adapters": json.dumps(rows), "precision": "float32"}
    facts |= {"hhdeploy_version": fields.pop("version")}
    config = ModelConfig(
        platform="onnxruntime_onnx", backend="onnxruntime", max_batch_size=32, **fields
    )
    images_in = config.input.add(name="images", data_type=DataType.TYPE_FP32)
    images_in.dims.extend(manifest.input_size)
    if manifest.layout is not None:
        ids_in = config.input.add(name="adapter_ids", data_type=DataType.TYPE_INT64, dims=[1])
        ids_in.reshape.SetInParent()
    config.output.add(
        name="logits",
        data_type=DataType.TYPE_FP32,
        dims=[manifest.classes],
        label_filename="labels.txt",
    )
    config.instance_group.add(count=1, kind=ModelInstanceGroup.Kind.KIND_AUTO)
    config.dynamic_batching.SetInParent()
    for key, value in facts.items():
        config.parameters[key].string_value = value
    return config


@pytest.fixture(scope="module")
def version():
    import importlib.metadata

    return importlib.metadata.version("hhdeploy")


@pytest.mark.parametrize("which", ["small", "branches", "constant", "folded"])
def test_the_configuration_field_by_field(request, which, tmp_path, version):
    path = request.getfixturevalue(which)
    result = write(path, tmp_path / "models")
    model = tmp_path / "models" / which
    found = parsed(model / "config.pbtxt")
    expected = expected_config(Bundle.open(path).manifest, name=which, version=version)
    assert found == expected, f"{found}\nexpected:\n{expected}"
    has_ids = which != "folded"
    assert [i.name for i in found.input] == ["images", *(["adapter_ids"] if has_ids else [])]
    if has_ids:
        # An empty reshape is a scalar a request; without one the graph would get [batch, 1].
        assert found.input[1].HasField("reshape")
        assert not found.input[1].reshape.shape
    assert not found.HasField("version_policy"), "the default: the latest version"
    names = ["1/model.onnx", "1/model.onnx.data", "adapters.json", "config.pbtxt", "labels.txt"]
    assert sorted(contents(tmp_path / "models")) == [f"{which}/{name}" for name in names]
    assert result.files == tuple(f"{which}/{name}" for name in names)
    assert result.repository == tmp_path / "models"
    assert (result.unverified, result.engine) == ((), None)


def test_the_comparison_of_configurations_can_fail(small, version):
    manifest = Bundle.open(small).manifest
    expected = expected_config(manifest, name="m", version=version)
    facts = {key: value.string_value for key, value in expected.parameters.items()}
    text = config_pbtxt("m", manifest, TritonOptions(), facts)
    assert text_format.Parse(text, ModelConfig()) == expected
    for mistake in ("reshape { shape: [ ] }", "TYPE_INT64", "[ 3, 32, 32 ]", "label_filename"):
        assert mistake in text
        wrong = text.replace(mistake, {"TYPE_INT64": "TYPE_INT32"}.get(mistake, ""), 1)
        wrong = wrong.replace("    dims: \n", "").replace('    : "labels.txt"\n', "")
        assert text_format.Parse(wrong, ModelConfig()) != expected


def test_options_in_the_configuration(small, tmp_path):
    write(
        small,
        tmp_path / "models",
        name="vit-2.x_y",
        max_batch=12,
        preferred_batch=(8, 4, 8),
        max_queue_delay_us=250,
        instances=3,
        gpu=False,
    )
    found = parsed(tmp_path / "models" / "vit-2.x_y" / "config.pbtxt")
    assert found.name == "vit-2.x_y"
    assert found.max_batch_size == 12
    assert list(found.dynamic_batching.preferred_batch_size) == [4, 8]
    assert found.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = found.instance_group
    assert (group.count, group.kind) == (3, ModelInstanceGroup.Kind.KIND_CPU)


@pytest.mark.parametrize(("gpu", "kind"), [(True, "KIND_GPU"), (None, "KIND_AUTO")])
def test_where_it_runs(small, tmp_path, gpu, kind):
    write(small, tmp_path / "models", gpu=gpu)
    (group,) = parsed(tmp_path / "models" / "small" / "config.pbtxt").instance_group
    assert ModelInstanceGroup.Kind.Name(group.kind) == kind


@pytest.mark.parametrize("text", ["", "plain", *NASTY, "\x00\x07\x7f\u2028", "\\303", '\\"'])
def test_quoted_strings_survive(text):
    line = quoted(text)
    assert line.isascii()
    assert line.isprintable()
    config = text_format.Parse(f"name: {line}", ModelConfig())
    assert config.name == text


def test_a_quoted_octal_is_not_eaten_by_a_digit_that_follows():
    assert text_format.Parse(f"name: {quoted(chr(1) + '23')}", ModelConfig()).name == "\x0123"


def test_names_that_would_break_out_of_the_text(small):
    """check_name allows no such adapter; a manifest written by hand may have it all the same."""
    manifest = Bundle.open(small).manifest
    evil = '"}} parameters { key: "x" \\'
    entry = replace(manifest.adapters[0], name=evil)
    facts = {"adapters": json.dumps({evil: 1}), evil: NASTY[2]}
    manifest = replace(manifest, adapters=(entry,))
    config = text_format.Parse(
        config_pbtxt(evil, manifest, TritonOptions(max_batch=1), facts), ModelConfig()
    )
    assert config.name == evil
    assert json.loads(config.parameters["adapters"].string_value) == {evil: 1}
    assert config.parameters[evil].string_value == NASTY[2]
    assert len(config.parameters) == 2


# -- labels and adapters.json ---------------------------------------------------------------------


def renamed(entry: AdapterEntry, *names: str) -> AdapterEntry:
    return replace(entry, classes=len(names), class_names=names)


def test_labels_of_side_branches(small):
    manifest = Bundle.open(small).manifest
    alpha, gamma = manifest.adapters
    assert (manifest.classes, alpha.classes, gamma.classes) == (7, 7, 3)
    lines = labels_txt(manifest).split("\n")
    assert lines == [
        "alpha=class 0|gamma=class 0",
        "alpha=class 1|gamma=class 1",
        "alpha=class 2|gamma=class 2",
        *(f"alpha=class {i}" for i in range(3, 7)),
        "",
    ]


def test_labels_of_a_kept_backbone_and_of_reserved_columns(branches):
    manifest = replace(Bundle.open(branches).manifest, classes=13)
    lines = labels_txt(manifest).splitlines()
    assert len(lines) == 13
    assert lines[4].split("|") == [
        "backbone=4", "alpha=class 4", "rival=class 4", "beta=class 4", "headless=4",
    ]  # fmt: skip
    assert lines[10] == "beta=class 10"
    assert lines[11:] == ["", ""]


def test_labels_of_a_folded_bundle(folded):
    manifest = Bundle.open(folded).manifest
    assert labels_txt(manifest).splitlines() == [f"class {i}" for i in range(7)]
    (alpha,) = manifest.adapters
    bare = replace(manifest, adapters=(replace(alpha, class_names=None),))
    assert labels_txt(bare).splitlines() == list("0123456")


@pytest.mark.parametrize("which", ["small", "folded"])
def test_a_label_is_one_line(request, which):
    """Triton reads lines; a column must not become two, nor the file be no text."""
    names = (*NASTY, "vt\x0bff\x0cnel\x85ls\u2028ps\u2029rs\x1e\nend\n", "\n", "\ud800")
    manifest = Bundle.open(request.getfixturevalue(which)).manifest
    entry = renamed(manifest.adapters[0], *names)
    manifest = replace(manifest, adapters=(entry, *manifest.adapters[1:]), classes=len(names))
    text = labels_txt(manifest)
    assert text.encode("utf-8").count(b"\n") == len(names) == len(text.splitlines())
    assert 'say "hi"\\n' in text.splitlines()[0], "what is no line break stays"
    assert "two lines here" in text.splitlines()[2]


@pytest.mark.parametrize("which", ["small", "folded", "branches"])
def test_names_in_adapters_json_are_exact(request, which):
    manifest = Bundle.open(request.getfixturevalue(which)).manifest
    entry = renamed(manifest.adapters[0], *NASTY)
    manifest = replace(manifest, adapters=(entry, *manifest.adapters[1:]))
    content = json.loads(json.dumps(adapters_json("m", manifest)))
    assert content["adapters"]["alpha"]["class_names"] == list(NASTY)
    assert (content["model"], content["kind"]) == ("m", manifest.kind)
    assert content["classes"] == manifest.classes
    for other in manifest.adapters:
        found = content["adapters"][other.name]
        assert (found["row"], found["classes"]) == (other.row, other.classes)
        assert found["verified"] is True
        assert Preprocess.from_json(found["preprocess"]) == other.preprocess
    assert ("backbone" in content["adapters"]) is (which == "branches")
    if which == "branches":
        assert content["adapters"]["backbone"]["row"] == 0
        assert content["adapters"]["backbone"]["classes"] == 5


def test_files_of_a_bundle_with_nasty_names(copy, tmp_path):
    manifest = Bundle.open(copy).manifest
    entry = renamed(manifest.adapters[1], *NASTY[:3])
    write_manifest(copy, replace(manifest, adapters=(manifest.adapters[0], entry)))
    write(copy, tmp_path / "models", name="m")
    model = tmp_path / "models" / "m"
    content = json.loads((model / "adapters.json").read_text())
    assert content["adapters"]["gamma"]["class_names"] == list(NASTY[:3])
    assert len((model / "labels.txt").read_bytes().split(b"\n")) == 7 + 1
    assert json.loads(parsed(model / "config.pbtxt").parameters["adapters"].string_value) == {
        "alpha": 1,
        "gamma": 2,
    }


# -- the model, fed as Triton feeds it ------------------------------------------------------------


@pytest.mark.parametrize("which", ["small", "branches", "constant"])
def test_mixed_requests_in_one_batch(request, which, tmp_path):
    path = request.getfixturevalue(which)
    result = write(path, tmp_path / "models", name="m")
    server = FakeTriton(tmp_path / "models" / "m")
    names = [name for name in result.rows for _ in range(2)]
    x = images(len(names))
    rows = column(*(result.rows[name] for name in names))
    found = server.infer(
        {"images": x[:1], "adapter_ids": rows[:1]},
        {"images": x[1:], "adapter_ids": rows[1:]},
    )
    with open_session(path, device="cpu", threads=1) as session:
        expected = session.run(x, names)
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    assert found.tobytes() == expected.tobytes()
    for i, name in enumerate(names):
        classes = adapters_json("m", Bundle.open(path).manifest)["adapters"][name]["classes"]
        assert_parity(expected[i, :classes], found[i, :classes], "branches", "float32")
    wrong = server.infer({"images": x, "adapter_ids": rows[::-1].copy()})
    assert_caught(expected[:, :3], wrong[:, :3], "branches", "float32")


def test_ids_that_are_no_rows_give_nan_in_their_own_row(small, tmp_path):
    write(small, tmp_path / "models")
    server = FakeTriton(tmp_path / "models" / "small")
    x = images(4)
    found = server.infer({"images": x, "adapter_ids": column(1, -1, 2, 3)})
    good = server.infer({"images": x, "adapter_ids": column(1, 1, 2, 2)})
    assert np.isnan(found[[1, 3]]).all()
    assert found[[0, 2]].tobytes() == good[[0, 2]].tobytes()
    assert not np.isnan(good).any()


def test_a_folded_bundle(folded, tmp_path):
    write(folded, tmp_path / "models")
    x = images(3)
    found = FakeTriton(tmp_path / "models" / "folded").infer({"images": x})
    with open_session(folded, device="cpu", threads=1) as session:
        expected = session.run(x)
    assert found.tobytes() == expected.tobytes()
    assert_parity(expected, found, "folded", "float32")


def test_a_float16_graph(workshop, tmp_path):
    names = ("alpha", "gamma")
    path = workshop.export(tmp_path / "bundle", names, precisions=["float16"], verify=False).path
    result = write(path, tmp_path / "models", name="m", precision="float16")
    assert result.unverified == names, "exported with --no-verify"
    model = tmp_path / "models" / "m"
    server = FakeTriton(model)
    assert server.config.parameters["precision"].string_value == "float16"
    kinds = {v.dtype for v in ir.load(model / "1" / "model.onnx").graph.initializers.values()}
    assert ir.DataType.FLOAT16 in kinds
    x = images(3)
    found = server.infer({"images": x, "adapter_ids": column(1, 2, 9)})
    with open_session(path, device="cpu", precision="float16", threads=1) as session:
        expected = session.run(x[:2], names)
    assert found[:2].tobytes() == expected.tobytes()
    assert np.isnan(found[2]).all()
    with open_session(path, device="cpu", threads=1) as session:
        assert session.run(x[:2], names).tobytes() != expected.tobytes(), "not the float32 graph"


def test_adapters_that_come_and_go(copy, workshop, tmp_path):
    """The model has the bank of its day; a freed row is reused, an adapter unverified."""
    out = tmp_path / "models"
    write(copy, out, name="m")
    remove_adapter(copy, "alpha")
    add_adapter(copy, "rival", workshop.directory("rival"))
    result = write(copy, out, name="m", overwrite=True)
    assert result.rows == {"gamma": 2, "rival": 1}
    assert result.unverified == ("rival",)
    content = json.loads((out / "m" / "adapters.json").read_text())
    assert [content["adapters"][n]["verified"] for n in ("gamma", "rival")] == [True, False]
    x = images(2)
    found = FakeTriton(out / "m").infer({"images": x, "adapter_ids": column(1, 2)})
    truth = workshop.mixed_truth(["rival", "gamma"], x, 7)
    assert_parity(truth, found, "branches", "float32")
    assert_caught(
        workshop.mixed_truth(["alpha", "gamma"], x, 7)[:1], found[:1], "branches", "float32"
    )


def test_a_bundle_without_an_adapter(copy, tmp_path):
    remove_adapter(copy, "alpha")
    remove_adapter(copy, "gamma")
    with pytest.raises(BundleError, match=r"no adapter to serve.*`add_adapter\(.*'NAME', 'DIR'\)`"):
        write(copy, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_no_torch_is_needed(small, tmp_path):
    code = """
        import sys
        from hhdeploy.repositories.triton import write_triton_repository
        write_triton_repository(sys.argv[1], sys.argv[2])
    """
    blocked = [name for name in HEAVY if name not in ("onnx", "onnx_ir")]
    done = run_python(code, small, tmp_path / "models", blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "small" / "1" / "model.onnx").is_file()


def test_without_the_export_extra(small, copy, tmp_path):
    """A graph needs onnx_ir; an engine is copied without it."""
    code = """
        import sys
        from hhdeploy.repositories.triton import TritonOptions, write_triton_repository
        options = TritonOptions(backend=sys.argv[3])
        write_triton_repository(sys.argv[1], sys.argv[2], options)
    """
    add_engine(copy)
    done = run_python(code, copy, tmp_path / "engine", "tensorrt", blocked=HEAVY)
    assert done.returncode == 0, done.stderr
    done = run_python(code, small, tmp_path / "graph", "onnxruntime", blocked=HEAVY)
    assert done.returncode == 1
    assert "MissingDependencyError" in done.stderr
    assert "pip install 'hhdeploy[export]'" in done.stderr
    assert not (tmp_path / "graph").exists()


# -- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["small", "constant", "folded"])
def test_an_engine_is_copied(request, which, tmp_path):
    path = copy_bundle(request.getfixturevalue(which), tmp_path / which)
    name = add_engine(path)
    result = write(path, tmp_path / "models", backend="tensorrt", preferred_batch=(8,))
    model = tmp_path / "models" / which
    assert (model / "1" / "model.plan").read_bytes() == GPU_ENGINE
    assert sorted(p.name for p in (model / "1").iterdir()) == ["model.plan"]
    config = parsed(model / "config.pbtxt")
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.max_batch_size == 24, "the most that the engine's profile takes"
    (group,) = config.instance_group
    assert group.kind == ModelInstanceGroup.Kind.KIND_GPU
    assert [i.name for i in config.input][1:] == ([] if which == "folded" else ["adapter_ids"])
    facts = {key: value.string_value for key, value in config.parameters.items()}
    assert facts["tensorrt_version"] == "10.9.0.34"
    assert facts["gpu_architectures"] == "sm89"
    assert result.engine is not None
    assert result.engine.file == name


def test_a_smaller_batch_than_the_engine_takes(copy, tmp_path):
    add_engine(copy)
    write(copy, tmp_path / "models", name="m", backend="tensorrt", max_batch=5)
    assert parsed(tmp_path / "models" / "m" / "config.pbtxt").max_batch_size == 5


BUILD = r"`build\('\S+', backend='tensorrt', precision='float32'"
BAKED = r"options=BuildOptions\(bank_as_constant=True\)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, rf"it has: none\.\nBuild one with: {BUILD}, {BAKED}"),
        ({"precision": "float16"}, rf"no float32 engine .*it has: none\.\n.*{BUILD}"),
        ({"bank_sha256": None}, rf"takes the bank as an input.*\n.*{BUILD}, {BAKED}"),
        ({"backend": "tensorrt-rtx"}, "built by tensorrt-rtx, which Triton's tensorrt backend"),
        (
            {"graph_sha256": "0" * 64},
            "stale: it was built from another graph than the bundle has now",
        ),
        ({"bank_sha256": "0" * 64}, "stale: the bank baked into it is not the one"),
        ({"batch": (2, 8, 8)}, r"takes 2 images at least.*\(build with a `batch\[0\]` of 1\)"),
    ],
)
def test_engines_that_triton_cannot_run(copy, tmp_path, changes, message):
    if changes is not None:
        add_engine(copy, **changes)
    with pytest.raises(BundleError, match=message):
        write(copy, tmp_path / "models", backend="tensorrt")
    assert not (tmp_path / "models").exists()


def test_a_bank_that_changed_since_the_engine_was_built(copy, tmp_path):
    add_engine(copy)
    remove_adapter(copy, "gamma")
    with pytest.raises(BundleError, match=r"stale: the bank baked .*\n.*bank_as_constant=True"):
        write(copy, tmp_path / "models", backend="tensorrt")


@pytest.mark.parametrize("which", ["folded", "constant"])
def test_the_build_command_of_a_graph_without_a_bank_input(request, which, tmp_path):
    path = request.getfixturevalue(which)
    with pytest.raises(BundleError, match=rf"{BUILD}\)`$"):
        write(path, tmp_path / "models", backend="tensorrt")


def test_several_engines(copy, tmp_path):
    add_engine(copy)
    name = add_engine(copy, architectures=("sm90",), batch=(1, 4, 16))
    add_engine(copy, architectures=("sm80",), graph_sha256="0" * 64)
    with pytest.raises(PlanError, match=r"`gpu_arch`:\n.*sm89\n.*sm90$"):
        write(copy, tmp_path / "models", backend="tensorrt")
    result = write(copy, tmp_path / "models", backend="tensorrt", gpu_arch="sm90")
    assert result.engine is not None
    assert result.engine.file == name
    assert parsed(tmp_path / "models" / "copy" / "config.pbtxt").max_batch_size == 16
    with pytest.raises(BundleError, match=r"built for sm90, not for sm120"):
        write(copy, tmp_path / "models", backend="tensorrt", gpu_arch="sm120")


def test_an_engine_for_many_architectures(copy, tmp_path):
    add_engine(copy, architectures=())
    result = write(copy, tmp_path / "models", backend="tensorrt", gpu_arch="sm120")
    assert result.engine is not None
    config = parsed(tmp_path / "models" / "copy" / "config.pbtxt")
    assert config.parameters["gpu_architectures"].string_value == ""


def test_an_engine_that_was_changed(copy, tmp_path):
    flip_byte(copy / add_engine(copy))
    with pytest.raises(BundleError, match=r"\.engine: expected sha256"):
        write(copy, tmp_path / "models", backend="tensorrt")
    assert not (tmp_path / "models").exists()


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, r"Triton model name 'a/b': expected letters.*`name`"),
        ({"name": ".."}, "Triton model name"),
        ({"name": "x" * 129}, "at most 128"),
        ({"max_batch": 0}, "`max_batch`: expected 1 or more"),
        ({"instances": 0}, "`instances`: expected 1 or more"),
        ({"max_queue_delay_us": -1}, "`max_queue_delay_us`: expected 0 or more"),
        ({"preferred_batch": (4, 33)}, r"`preferred_batch=\[33\]`: expected 1 to `max_batch`.* 32"),
        ({"preferred_batch": (0,)}, "`preferred_batch`: expected 1 or more"),
        (
            {"backend": "tensorrt-rtx"},
            "`backend='tensorrt-rtx'`: expected one of onnxruntime, tensorrt",
        ),
        ({"gpu_arch": "sm89"}, "`gpu_arch` chooses an engine"),
        (
            {"precision": "bfloat16", "gpu": False},
            "`gpu=False`: ONNX Runtime has no bfloat16 kernels",
        ),
        ({"backend": "tensorrt", "gpu": False}, "`gpu=False`: TensorRT engines run on GPUs alone"),
        ({"backend": "tensorrt", "max_batch": 25}, r"`max_batch=25`: .*24 images at most.*build"),
        ({"backend": "tensorrt", "preferred_batch": (25,)}, r"`preferred_batch=\[25\].* 24"),
    ],
)
def test_options_that_do_not_go_together(copy, tmp_path, options, message):
    add_engine(copy)
    with pytest.raises(PlanError, match=message):
        write(copy, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_a_bundle_s_name_that_is_no_model_name(copy, tmp_path):
    odd = copy.rename(tmp_path / "my bundle")
    with pytest.raises(PlanError, match=r"Triton model name 'my bundle'.*`name`"):
        write(odd, tmp_path / "models")
    assert write(odd, tmp_path / "models", name="mine").name == "mine"


def test_a_precision_that_the_bundle_does_not_have(small, tmp_path):
    with pytest.raises(BundleError, match="no float16 graph; it has float32"):
        write(small, tmp_path / "models", precision="float16")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", BANK_FILE])
def test_a_damaged_bundle(copy, tmp_path, file):
    flip_byte(copy / file)
    with pytest.raises(BundleError, match=rf"{file}: expected sha256"):
        write(copy, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("write", [write_triton, write_ovms, write_web])
@pytest.mark.parametrize("which", ["small", "constant"])
def test_rows_that_are_exchanged(request, which, write, tmp_path):
    """Clients would ask for the rows that the bundle says, and get another adapter's answers."""
    bundle = broken(request.getfixturevalue(which), tmp_path / "bundle", exchange_rows)
    with pytest.raises(
        BundleError, match="'gamma': expected 7 classes, which its row has, found 3"
    ):
        write(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [write_triton, write_ovms])
@pytest.mark.parametrize("name", ["wider", "baked_in"])
def test_a_graph_of_another_manifest(small, write, name, tmp_path):
    """Of which a server would be told columns that there are not, or no bank that it wants."""
    bundle = broken(small, tmp_path / "bundle", OF_OTHER_GRAPHS[name][0])
    with pytest.raises(BundleError, match=r"tensors: expected the (in|out)puts of model\.onnx"):
        write(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=rf"is not a bundle: {MANIFEST}"):
        write(tmp_path, tmp_path / "models")


# -- repositories that exist ----------------------------------------------------------------------


def test_a_second_model_leaves_the_first_alone(small, folded, tmp_path):
    out = tmp_path / "models"
    write(small, out)
    (out / "small" / "notes.txt").write_text("mine")
    before = contents(out)
    write(folded, out)
    after = contents(out)
    assert {name for name in after if not name.startswith("folded/")} == set(before)
    assert all(after[name] == data for name, data in before.items())
    with pytest.raises(WriteError, match=r"models/small already exists.*`overwrite=True`"):
        write(small, out)
    assert contents(out) == after
    with pytest.raises(WriteError, match=r"holds notes\.txt, which no such model has"):
        write(small, out, overwrite=True)
    assert contents(out) == after
    (out / "small" / "notes.txt").unlink()
    write(small, out, overwrite=True)
    assert set(contents(out)) == set(after) - {"small/notes.txt"}


def test_out_is_a_file_or_a_bundle(small, copy, tmp_path):
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(WriteError, match=r"already exists|is a file"):
            write(small, tmp_path / "file", overwrite=overwrite)
    before = contents(copy)
    with pytest.raises(WriteError, match=r"is a bundle\. Choose another directory"):
        write(small, copy, overwrite=True)
    assert contents(copy) == before


def full_after(monkeypatch, what):
    """The disk is full in the middle of one of the steps."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "graph":
        monkeypatch.setattr(hhdeploy.exporters.writer, "save_graph", fail)
    elif what == "engine":
        monkeypatch.setattr(hhdeploy.repositories.triton, "write_bytes", fail)
    else:
        original = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda p, *a, **k: fail() if p.name == what else original(p, *a, **k),
        )


@pytest.mark.parametrize("what", ["graph", "engine", "config.pbtxt", "adapters.json"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(copy, folded, tmp_path, monkeypatch, what, exists):
    """A new repository does not appear, an old one stays as it was."""
    out = tmp_path / "models"
    add_engine(copy)
    options = {"backend": "tensorrt"} if what == "engine" else {}
    if exists:
        write(copy, out, name="m")
        write(folded, out, name="other")
    before = contents(out)
    full_after(monkeypatch, what)
    with pytest.raises(WriteError, match=r"disk is full.*Nothing that was there .*changed"):
        write(copy, out, name="m", overwrite=exists, **options)
    assert contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["copy", *(["models"] if exists else [])]
    )


@pytest.mark.parametrize("kib", [1, 60])
def test_a_file_that_the_system_cuts_short(small, tmp_path, kib):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, hard))
    try:
        with pytest.raises(WriteError, match="ulimit -f"):
            write(small, tmp_path / "models")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
