"""The ML-BOM: as CycloneDX's schema has it, the same bytes of the same bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from hhdeploy.bundle import Bundle, edit
from hhdeploy.bundle.bom import bill_of_materials
from hhdeploy.errors import BundleError
from hhdeploy.files.writing import sha256_of
from tests.workshop import copy_bundle, flip_byte

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"


def valid(content):
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode())
    assert error is None, error
    return json.loads(content)


def test_the_validator_can_refuse(small):
    broken = json.loads(bill_of_materials(small))
    broken["components"][0]["type"] = "model"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None


@pytest.mark.parametrize(
    ("address", "right"), [("https://a.example/b", True), ("no address", False)]
)
def test_the_validator_knows_addresses(small, address, right):
    content = json.loads(bill_of_materials(small))
    content["externalReferences"] = [{"type": "website", "url": address}]
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content))
    assert (error is None) == right, error


@pytest.mark.parametrize("which", ["small", "folded"])
def test_what_it_says(which, request, tmp_path):
    path = request.getfixturevalue(which)
    content = bill_of_materials(path)
    assert content == bill_of_materials(shutil.copytree(path, tmp_path / "copy"))
    found = valid(content)
    manifest = Bundle.open(path).manifest
    files = [c for c in found["components"] if c["type"] == "file"]
    assert {c["name"]: c["hashes"][0]["content"] for c in files} == {
        name: sha256_of(path / name) for name in manifest.files
    }
    backbone, *adapters = [c for c in found["components"] if c["type"] != "file"]
    assert backbone["name"] == manifest.backbone.model
    assert {"name": "hhdeploy:license", "value": "unknown"} in backbone["properties"]
    assert "licenses" not in backbone
    assert [c["name"] for c in adapters] == [a.name for a in manifest.adapters]
    tensors = path / "adapters" / "alpha" / "adapter_model.safetensors"
    assert adapters[0]["hashes"] == [{"alg": "SHA-256", "content": sha256_of(tensors)}]
    card = found["metadata"]["component"]["modelCard"]
    stages = Bundle.open(path).parity()["stages"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert [m["value"] for m in metrics] == [str(s["range_error"]) for s in stages]


def test_licences(tmp_path):
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    before = json.loads(bill_of_materials(path))["serialNumber"]
    with edit(path) as change:
        manifest = change.manifest
        alpha, gamma = manifest.adapters
        change.manifest = replace(
            manifest,
            backbone=replace(manifest.backbone, license=("apache-2.0", "house-1")),
            adapters=(replace(alpha, license=("MIT",)), gamma),
        )
    found = valid(bill_of_materials(path))
    assert found["serialNumber"] != before
    backbone, alpha, gamma = found["components"][:3]
    assert backbone["licenses"] == [
        {"license": {"id": "Apache-2.0"}}, {"license": {"name": "house-1"}},
    ]  # fmt: skip
    assert alpha["licenses"] == [{"license": {"id": "MIT"}}]
    assert "licenses" not in gamma


def test_a_damaged_bundle_has_none(tmp_path):
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    flip_byte(path / "bank.safetensors")
    with pytest.raises(BundleError, match="expected sha256"):
        bill_of_materials(path)
