"""hhdeploy triton from the command line."""

from __future__ import annotations

import json
import re
import textwrap

import pytest
import tritonclient.grpc
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from hhdeploy.bundle import add_adapter
from hhdeploy.exporting.web import WebPage
from tests.workshop import contents, copy_bundle


def config_of(model):
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def test_what_it_writes_and_says(succeed, small, tmp_path):
    out = tmp_path / "models"
    text = succeed("triton", small, out)
    written = re.findall(r"^  (/.*)$", text, re.MULTILINE)
    assert sorted(written) == sorted(str(out / name) for name in contents(out))
    assert f"tritonserver --model-repository {out}\n" in text
    assert "curl localhost:8000/v2/models/small/config" in text
    assert "TensorRT" not in text


def test_the_lines_to_paste_name_a_folder_with_a_blank(succeed, small, tmp_path, monkeypatch):
    out = tmp_path / "my models"
    assert f"tritonserver --model-repository '{out}'\n" in succeed("triton", small, out)
    page = WebPage(out, "float32", ("alpha",), {})
    monkeypatch.setattr("hhdeploy.exporting.web.write_web_page", lambda *args, **options: page)
    assert f"python -m http.server -d '{out}' -b 127.0.0.1\n" in succeed("web", small, out)


@pytest.mark.parametrize("which", ["small", "folded", "branches"])
def test_the_client_that_it_prints_fits_the_model(succeed, request, which, tmp_path, monkeypatch):
    """The pasted lines run, and send what config.pbtxt declares."""
    text = succeed("triton", request.getfixturevalue(which), tmp_path)
    lines = "".join(line for line in text.splitlines(keepends=True) if line.startswith("    "))
    config = config_of(tmp_path / which)
    asked = []

    class Client:
        def __init__(self, url):
            assert url == "localhost:8001"

        def infer(self, model, inputs):
            asked.append((model, inputs))
            return self

        def as_numpy(self, name):
            return name

    monkeypatch.setattr(tritonclient.grpc, "InferenceServerClient", Client)
    names = {}
    exec(textwrap.dedent(lines), names)
    ((model, inputs),) = asked
    assert model == config.name
    assert names["logits"] == config.output[0].name
    sent = {i.name(): (f"TYPE_{i.datatype()}", i.shape()[1:]) for i in inputs}
    declared = {i.name: (DataType.Name(i.data_type), list(i.dims)) for i in config.input}
    assert sent == declared
    if which != "folded":
        rows = json.loads(config.parameters["adapters"].string_value)
        row, name = re.search(r"\[\[(\d+)\]\].* # (\w+)$", lines, re.MULTILINE).groups()
        assert rows[name] == int(row)


def test_every_option(succeed, small, tmp_path):
    out = tmp_path / "models"
    flags = "--name vit --max-batch 16 --preferred-batch 4 --preferred-batch 8"
    flags += " --max-queue-delay-us 300 --instances 2 --gpu --backend onnxruntime"
    succeed("triton", small, out, *flags.split())
    config = config_of(out / "vit")
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 300
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, 1)
    succeed("triton", small, out, "--name", "vit", "--cpu", "--overwrite")
    config = config_of(out / "vit")
    assert (config.max_batch_size, config.instance_group[0].kind) == (32, 2)


def test_as_json(succeed_json, branches, tmp_path):
    answer = succeed_json("triton", branches, tmp_path / "models", "--name", "m")
    rows = json.loads(config_of(tmp_path / "models" / "m").parameters["adapters"].string_value)
    assert answer == {
        "repository": str(tmp_path / "models"),
        "model": "m",
        "files": sorted(contents(tmp_path / "models")),
        "adapters": rows,
        "unverified": [],
        "engine": None,
        "ensembles": {},
        "removed": [],
    }
    assert rows["backbone"] == 0


def test_an_ensemble_beside_it(succeed, succeed_json, small, tmp_path):
    text = succeed("triton", small, tmp_path / "models", "--name", "vit", "--ensemble")
    assert "vit_pictures takes pictures, for alpha, gamma.\n" in text
    assert config_of(tmp_path / "models" / "vit_pictures").platform == "ensemble"
    answer = succeed_json("triton", small, tmp_path / "other", "--name", "vit", "--ensemble")
    assert answer["ensembles"] == {"alpha": "vit_pictures", "gamma": "vit_pictures"}
    assert sorted(answer["files"]) == sorted(contents(tmp_path / "other"))


def test_an_unverified_adapter_is_named(succeed, small, workshop, tmp_path):
    bundle = copy_bundle(small, tmp_path / "bundle")
    add_adapter(bundle, "rival", workshop.directory("rival"))
    text = succeed("triton", bundle, tmp_path / "models")
    (line,) = [line for line in text.splitlines() if "not verified" in line]
    assert line == f"rival is not verified: run hhdeploy verify {bundle} --against-torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("NOWHERE OUT", "is not a bundle"),
        ("BUNDLE TAKEN", r"taken/small already exists.*--overwrite"),
        ("BUNDLE BUNDLE", r"is a bundle\. Choose another"),
        ("BUNDLE OUT --precision int8", "no int8 graph"),
    ],
)
def test_it_refuses(refuse, small, tmp_path, arguments, message):
    (tmp_path / "taken" / "small").mkdir(parents=True)
    (tmp_path / "taken" / "small" / "mine").touch()
    names = {"BUNDLE": small, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    names["TAKEN"] = tmp_path / "taken"
    line = refuse("triton", *(names.get(word, word) for word in arguments.split()))
    assert re.search(message, line), line
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert contents(tmp_path) == {"taken/small/mine": b""}


def test_no_engine(call, small, tmp_path):
    result = call("triton", small, tmp_path / "models", "--backend", "tensorrt")
    assert result.exit_code == 1
    command = f"hhdeploy build {small} --backend tensorrt --precision float32 --bank-as-constant"
    assert result.stderr.rstrip().endswith(command)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", ["--backend tensorrt-rtx", "--max-batch 0", "--instances 0", "--max-queue-delay-us -1"]
)
def test_calls_that_are_no_commands_show_the_usage(call, small, tmp_path, flags):
    result = call("triton", small, tmp_path / "models", *flags.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert not list(tmp_path.iterdir())


def test_it_names_the_ensembles_that_it_removes(succeed, small, tmp_path):
    out = tmp_path / "models"
    succeed("triton", small, out, "--name", "vit", "--ensemble")
    text = succeed("triton", small, out, "--name", "vit", "--overwrite")
    assert "Removed vit_pictures, vit_pictures_preprocess, vit_pictures_answer: made for" in text
    assert [p.name for p in out.iterdir()] == ["vit"]
    assert "Removed" not in succeed("triton", small, out, "--name", "vit", "--overwrite")
