"""Repositories of OpenVINO Model Server: its configuration's rules, and the model in OpenVINO."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.errors import BundleError, PlanError, WriteError
from hhdeploy.exporters.triton import TritonOptions, requestable
from hhdeploy.repositories import ovms
from hhdeploy.repositories.ovms import OvmsOptions, write_ovms_repository
from hhdeploy.repositories.triton import write_triton_repository
from hhdeploy.runtime import open_session
from hhdeploy.runtime.openvino_backend import shared_core
from tests.support import assert_caught, assert_parity, images
from tests.workshop import contents, copy_bundle, flip_byte

# What the server takes of a configuration with models alone: the keys that it knows, no others.
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_SETTING = {"type": ["string", "boolean", "number"]}
_SHAPE = {"type": ["string", "object"], "additionalProperties": _TEXT}
_MODEL = {
    "name": _TEXT,
    "base_path": _TEXT,
    "batch_size": {"type": ["integer", "string"]},
    "model_version_policy": {"type": "object", "maxProperties": 1},
    "shape": _SHAPE,
    "layout": _SHAPE,
    "nireq": _COUNT,
    "target_device": _TEXT,
    "allow_cache": {"type": "boolean"},
    "plugin_config": {"type": "object", "additionalProperties": _SETTING},
}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


SCHEMA = _object(
    {
        "model_config_list": {
            "type": "array",
            "items": _object({"config": _object(_MODEL, "name", "base_path")}, "config"),
        },
        "monitoring": {"type": "object"},
    },
    "model_config_list",
)


def write(bundle: Path, out: Path, *, overwrite: bool = False, **options: Any):
    return write_ovms_repository(bundle, out, OvmsOptions(**options), overwrite=overwrite)


class FakeOvms:
    """A server with a configuration: its models are loaded as it says."""

    def __init__(self, config: Path, name: str) -> None:
        content = json.loads(config.read_text(encoding="utf-8"))
        jsonschema.validate(content, SCHEMA)
        (entry,) = (
            e["config"] for e in content["model_config_list"] if e["config"]["name"] == name
        )
        base = config.parent / entry["base_path"]
        versions = [int(p.name) for p in base.iterdir() if p.is_dir()]
        assert all(version > 0 for version in versions)
        (graph,) = (base / str(max(versions))).glob("*.onnx")
        core = shared_core()
        self.model = core.compile_model(
            core.read_model(graph), entry["target_device"], entry["plugin_config"]
        )

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name -> type and shape, -1 of any size, as the server's metadata has them."""
        return {
            port.any_name: (
                port.element_type.get_type_name(),
                [d.get_length() if d.is_static else -1 for d in port.partial_shape],
            )
            for port in (*self.model.inputs, *self.model.outputs)
        }

    def infer(self, **request: np.ndarray) -> np.ndarray:
        return self.model(request)["logits"].copy()


def test_models_that_are_written_at_once_are_all_entered(small, tmp_path, monkeypatch):
    write(small, tmp_path / "models", name="first")

    def slowly(path):
        content = read(path)
        time.sleep(0.05)  # in which another would write, and be forgotten
        return content

    read = ovms._read_config
    monkeypatch.setattr(ovms, "_read_config", slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write(small, tmp_path / "models", name=n), "abcd"))
    content = json.loads((tmp_path / "models" / "config.json").read_text())
    names = {entry["config"]["name"] for entry in content["model_config_list"]}
    assert names == {"first", *"abcd"}
    assert {p.name for p in (tmp_path / "models").iterdir()} == {*names, "config.json"}


@pytest.mark.parametrize("which", ["branches", "constant", "folded"])
def test_the_model_answers_as_a_session(request, which, tmp_path):
    bundle = request.getfixturevalue(which)
    result = write(bundle, tmp_path / "models", name="vit")
    server = FakeOvms(tmp_path / "models" / "config.json", "vit")
    manifest = Bundle.open(bundle).manifest
    chosen = {"adapter_ids": ("i64", [-1])} if manifest.layout is not None else {}
    assert server.tensors() == {
        "images": ("f32", [-1, *manifest.input_size]),
        **chosen,
        "logits": ("f32", [-1, manifest.classes]),
    }
    names = [entry.name for entry in requestable(manifest) for _ in range(2)]
    batch = images(len(names))
    ids = np.asarray([result.rows[name] for name in names if chosen], np.int64)
    found = server.infer(images=batch, **({"adapter_ids": ids} if chosen else {}))
    with open_session(bundle, device="openvino", threads=1, cache=None) as session:
        expected = session.run(batch, names)
    assert_parity(expected, found, "openvino", "float32")
    if which == "branches":
        other = server.infer(images=batch[:2], adapter_ids=ids[[2, 3]])
        assert_caught(found[[4, 5]][:, :7], other[:, :7], "openvino", "float32")
        outside = server.infer(images=batch[:3], adapter_ids=np.asarray([ids[0], 99, -1]))
        assert np.isnan(outside[1:]).all()
        assert_parity(found[:1], outside[:1], "openvino", "float32")


def test_what_it_writes(small, tmp_path):
    out = tmp_path / "models"
    result = write(small, out, target_device="AUTO")
    assert result.files == (
        "config.json", "small/1/model.onnx", "small/1/model.onnx.data", "small/adapters.json",
    )  # fmt: skip
    assert sorted(contents(out)) == sorted(result.files)
    assert json.loads((out / "config.json").read_text()) == {
        "model_config_list": [
            {
                "config": {
                    "name": "small",
                    "base_path": "small",
                    "target_device": "AUTO",
                    "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"},
                }
            }
        ]
    }
    content = json.loads((out / "small" / "adapters.json").read_text())
    assert {name: entry["row"] for name, entry in content["adapters"].items()} == result.rows
    assert (result.unverified, result.input_size) == ((), (3, 32, 32))


def test_bfloat16_is_the_float32_graph(small, tmp_path):
    """As everywhere in OpenVINO: the bundle needs no other graph."""
    for precision in ("float32", "bfloat16"):
        write(small, tmp_path / precision, name="m", precision=precision)
    first, second = (contents(tmp_path / name) for name in ("float32", "bfloat16"))
    assert [name for name in first if first[name] != second[name]] == ["config.json"]
    assert b'"bf16"' in second["config.json"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [('"base_path"', '"path"'), ('"vit"', "3"), ('"f32"', "[1]"), ('"CPU"', "null")],
)
def test_the_check_of_configurations_can_fail(small, tmp_path, right, wrong):
    write(small, tmp_path / "models", name="vit")
    config = tmp_path / "models" / "config.json"
    text = config.read_text()
    assert right in text
    config.write_text(text.replace(right, wrong))
    with pytest.raises(jsonschema.ValidationError):
        FakeOvms(config, "vit")


def test_a_repository_that_exists(small, folded, tmp_path):
    """Its other models and settings stay; nothing changes where something is refused."""
    out = tmp_path / "models"
    write(folded, out, name="other")
    config = out / "config.json"
    content = json.loads(config.read_text()) | {"monitoring": {"metrics": {"enable": True}}}
    config.write_text(json.dumps(content))
    write(small, out, name="vit")
    names = [e["config"]["name"] for e in json.loads(config.read_text())["model_config_list"]]
    assert names == ["other", "vit"]
    assert json.loads(config.read_text())["monitoring"] == content["monitoring"]
    before = contents(out)
    with pytest.raises(WriteError, match=r"models/vit already exists.*`overwrite=True`"):
        write(small, out, name="vit")
    (out / "vit" / "mine").touch()
    with pytest.raises(WriteError, match="holds mine, which no such model has"):
        write(small, out, name="vit", overwrite=True)
    (out / "vit" / "mine").unlink()
    (out / "vit" / "2").mkdir()
    with pytest.raises(WriteError, match="holds 2, which no such model has"):
        write(small, out, name="vit", overwrite=True)
    (out / "vit" / "2").rmdir()
    assert contents(out) == before
    write(small, out, name="vit", overwrite=True, target_device="GPU")
    after = contents(out)
    assert [name for name in before if before[name] != after[name]] == ["config.json"]
    FakeOvms(config, "other")


def with_entries(out: Path, *models: dict[str, Any], **lists: Any) -> bytes:
    """A configuration of an operator's own."""
    out.mkdir(exist_ok=True)
    content = {"model_config_list": [{"config": model} for model in models], **lists}
    (out / "config.json").write_text(json.dumps(content))
    return (out / "config.json").read_bytes()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("base", ["/srv/models/vit", "vit2", "../vit", "", None])
def test_a_model_elsewhere_is_not_taken_over(small, tmp_path, base, overwrite):
    mine = {"name": "vit", "base_path": base, "nireq": 8, "target_device": "GPU"}
    before = with_entries(tmp_path / "models", mine)
    with pytest.raises(
        WriteError, match=r"config\.json names 'vit' already, with base_path .*; exp"
    ):
        write(small, tmp_path / "models", name="vit", overwrite=overwrite)
    assert contents(tmp_path / "models") == {"config.json": before}


@pytest.mark.parametrize("key", ["mediapipe_config_list", "pipeline_config_list"])
def test_a_graph_of_that_name_is_not_hidden(small, tmp_path, key):
    before = with_entries(tmp_path / "models", **{key: [{"name": "vit"}]})
    with pytest.raises(WriteError, match=f"names 'vit' already, in {key}"):
        write(small, tmp_path / "models", name="vit", overwrite=True)
    assert contents(tmp_path / "models") == {"config.json": before}
    write(small, tmp_path / "models", name="other")


def test_a_model_that_is_entered_meanwhile_is_not_taken_over(small, tmp_path, monkeypatch):
    out = tmp_path / "models"
    with_entries(out)
    real = ovms.write_graph

    def slowly(*arguments):
        real(*arguments)
        with_entries(out, {"name": "vit", "base_path": "/srv/models/vit"})

    monkeypatch.setattr(ovms, "write_graph", slowly)
    with pytest.raises(WriteError, match="names 'vit' already, with base_path '/srv/models/vit'"):
        write(small, out, name="vit")
    (entry,) = json.loads((out / "config.json").read_text())["model_config_list"]
    assert entry["config"]["base_path"] == "/srv/models/vit"


@pytest.mark.parametrize("base", ["vit", "./vit", "OUT/vit"])
def test_an_operator_s_settings_of_a_model_are_kept(small, tmp_path, base):
    out = tmp_path / "models"
    own = {"name": "vit", "base_path": base.replace("OUT", str(out)), "nireq": 8}
    plugin = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    with_entries(
        out, {**own, "plugin_config": plugin}, {"name": "other", "base_path": "/srv/other"}
    )
    with pytest.raises(WriteError, match=r"names 'vit' already\. .*`overwrite=True` to renew"):
        write(small, out, name="vit")
    write(small, out, name="vit", overwrite=True)
    first, second = json.loads((out / "config.json").read_text())["model_config_list"]
    assert first["config"] == {
        "name": "vit",
        "base_path": "vit",
        "nireq": 8,
        "target_device": "CPU",
        "plugin_config": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
    }
    assert second == {"config": {"name": "other", "base_path": "/srv/other"}}
    FakeOvms(out / "config.json", "vit")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model_config_list": [{"name": "x"}]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_configuration_that_is_another_s(small, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WriteError, match=r"config\.json: expected a configuration of OpenVINO"):
        write(small, tmp_path)
    assert contents(tmp_path) == {"config.json": text.encode()}


def test_a_configuration_that_is_a_link_to_nowhere(small, tmp_path):
    (tmp_path / "config.json").symlink_to("/mnt/gone.json")
    with pytest.raises(
        WriteError, match=r"config\.json is a link to /mnt/gone\.json, which does not"
    ):
        write(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_what_it_refuses(small, workshop, tmp_path):
    out = tmp_path / "models"
    with pytest.raises(PlanError, match=r"OpenVINO Model Server model name 'a/b'.*`name`"):
        write(small, out, name="a/b")
    with pytest.raises(PlanError, match=r"`name`: config\.json is the file that the server"):
        write(small, out, name="config.json")
    with pytest.raises(BundleError, match="no int8 graph; it has float32"):
        write(small, out, precision="int8")
    copy = copy_bundle(small, tmp_path / "copy")
    with pytest.raises(WriteError, match=r"is a bundle\. Choose another"):
        write(small, copy)
    add_adapter(copy, "rival", workshop.directory("rival"))
    assert write(copy, tmp_path / "added").unverified == ("rival",)
    flip_byte(copy / "model.onnx.data")
    with pytest.raises(BundleError, match=r"model\.onnx\.data: expected sha256"):
        write(copy, out)
    assert not out.exists()


@pytest.mark.parametrize("which", ["small", "folded"])
def test_the_graph_says_which_adapters_are_in_it(request, which, tmp_path):
    """No manifest is beside it."""
    bundle = request.getfixturevalue(which)
    write(bundle, tmp_path / "served", name="vit")
    write_triton_repository(bundle, tmp_path / "models", TritonOptions(name="vit"))
    expected = {
        entry.name: (entry.row, list(entry.class_names or ()))
        for entry in Bundle.open(bundle).manifest.adapters
    }
    for place in ("served", "models"):
        model = onnx.load(tmp_path / place / "vit" / "1" / "model.onnx", load_external_data=False)
        (said,) = (p.value for p in model.metadata_props if p.key == "adapters")
        found = json.loads(said)
        assert {n: (e["row"], e["labels"]) for n, e in found.items()} == expected
