"""The files of examples/serving: what can be said of them without a cluster or a container."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hhdeploy.cli.serve import command
from tests.workshop import ROOT

yaml = pytest.importorskip("yaml", reason="needs the package 'pyyaml'")
EXAMPLES = ROOT / "examples" / "serving"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
OPTIONS = {flag for parameter in command.params for flag in parameter.opts if flag[:2] == "--"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def check_options(arguments: list[str], bundle: Path) -> None:
    """`hhdeploy serve` takes these arguments; the first is the bundle."""
    assert "--device" in OPTIONS
    assert {a.partition("=")[0] for a in arguments if a[:2] == "--"} <= OPTIONS
    command.make_context("serve", [str(bundle), *arguments[1:]])


def instructions() -> dict[str, str]:
    """The Containerfile's, by name; of several the last."""
    lines = (EXAMPLES / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    split = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return {name: rest for name, _, rest in split}


def test_the_container_runs_a_server_that_is_not_root(tmp_path):
    found = instructions()
    entry, more = json.loads(found["ENTRYPOINT"]), json.loads(found["CMD"])
    assert entry[:2] == ["hhdeploy", "serve"]
    check_options([*entry[2:], *more], tmp_path)
    assert entry[2] in json.loads(found["VOLUME"])
    assert int(found["USER"].partition(":")[0]) > 0
    assert "torch" not in found["RUN"]
    assert found["STOPSIGNAL"] == "SIGTERM"


def test_the_container_asks_whether_the_server_is_ready():
    probe = json.loads(instructions()["HEALTHCHECK"].partition(" CMD ")[2])
    assert probe[:2] == ["python", "-c"]
    compile(probe[2], "HEALTHCHECK", "exec")
    (url,) = re.findall(r"'(http[^']*)'", probe[2])
    assert url == "http://127.0.0.1:8000/v2/health/ready"


def test_kserve_gets_a_runtime_and_a_model_that_go_together(tmp_path):
    runtime, service = documents("kserve.yaml")
    assert (runtime["apiVersion"], runtime["kind"]) == (
        "serving.kserve.io/v1alpha1",
        "ServingRuntime",
    )
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert runtime["spec"]["protocolVersions"] == ["v2", "grpc-v2"]
    model = service["spec"]["predictor"]["model"]
    formats = [known["name"] for known in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    assert container["command"] == ["hhdeploy", "serve"]
    assert container["args"][0] == "/mnt/models"
    check_options(container["args"], tmp_path)
    ports = {container[probe]["httpGet"]["port"] for probe in PROBES}
    assert f"--http-port={container['ports'][0]['containerPort']}" in container["args"]
    assert ports == {container["ports"][0]["containerPort"]}
    assert container["securityContext"]["runAsNonRoot"]


def test_the_server_answers_the_probes(server):
    (container,) = documents("kserve.yaml")[0]["spec"]["containers"]
    for probe in PROBES:
        assert server.request("GET", container[probe]["httpGet"]["path"])[0] == 200


def test_ray_takes_the_file_and_the_application_its_arguments(branches, tmp_path):
    pytest.importorskip("ray.serve", reason="needs the package 'ray'")
    from ray.serve.schema import ServeDeploySchema

    from hhdeploy.runtime.serving.ray.app import application
    from hhdeploy.runtime.serving.ray.settings import read_settings

    (content,) = documents("ray.yaml")
    schema = ServeDeploySchema.model_validate(content)
    assert schema.http_options.host == "127.0.0.1"
    (app,) = schema.applications
    module, _, name = app.import_path.partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef-of-the-tests")
    there = {"bundle": branches, "adapters_dir": tmp_path, "token_file": token}
    args = {**app.args, **there}
    assert schema.http_options.request_timeout_s > read_settings(args).request_seconds
    names = {"Replica", "Registry", "Ingress"}
    assert {deployment.name for deployment in app.deployments} <= names
    assert application(args)._bound_deployment.name == "Ingress"
