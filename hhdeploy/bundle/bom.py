"""What a bundle is made of, as CycloneDX 1.6 has it for machine learning (ML-BOM), in JSON.

The same bundle has the same document, to the byte: it has no date, and its serial number is made
of its content.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hhdeploy.backbones.licences import Licences, in_words
from hhdeploy.bundle.manifest import ADAPTERS, PARITY_FILE, AdapterEntry, Manifest
from hhdeploy.bundle.reading import Bundle
from hhdeploy.files.writing import json_bytes, sha256_of_bytes

# Names of hubs -> SPDX's, of which CycloneDX takes no other as an id.
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0 MIT BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear ISC Zlib Unlicense WTFPL "
        "CC0-1.0 CC-BY-4.0 CC-BY-SA-4.0 CC-BY-NC-4.0 CC-BY-ND-4.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-4.0 "
        "CC-BY-3.0 CC-BY-SA-3.0 CC-BY-NC-3.0 CC-BY-NC-SA-3.0 AFL-3.0 Artistic-2.0 BSL-1.0 EPL-2.0 "
        "EUPL-1.2 GPL-2.0-only GPL-3.0-only AGPL-3.0-only LGPL-3.0-only MPL-2.0 MS-PL NCSA OFL-1.1"
    ).split()
}
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "hhdeploy:bundle")


def bill_of_materials(path: str | Path) -> bytes:
    """The ML-BOM of a bundle: backbone, adapters and files with sha256, licences as their sources
    state them, and the model card's section with the measured errors.

    Raises:
        BundleError: no bundle, or files of it are missing or damaged.
    """
    bundle = Bundle.open(path)
    bundle.check_files()
    manifest = bundle.manifest
    adapters = () if manifest.whole else manifest.adapters
    models = [_backbone(manifest), *(_adapter(manifest, entry) for entry in adapters)]
    files = [_file(name, digest) for name, digest in sorted(manifest.files.items())]
    digest = sha256_of_bytes(json_bytes(manifest.to_json()))
    hhdeploy = {"type": "application", "name": "hhdeploy", **_version(manifest)}
    return json_bytes(
        {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}",
            "version": 1,
            "metadata": {
                "tools": {"components": [hhdeploy]},
                "component": _bundle(bundle, digest),
            },
            "components": [*models, *files],
            "dependencies": [
                {"ref": "bundle", "dependsOn": [c["bom-ref"] for c in (*models, *files)]}
            ],
        }
    )


def _version(manifest: Manifest) -> dict[str, str]:
    version = manifest.versions.get("hhdeploy")
    return {"version": version} if version else {}


def _bundle(bundle: Bundle, digest: str) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "type": "machine-learning-model",
        "bom-ref": "bundle",
        "name": f"{manifest.kind} bundle of {manifest.backbone.model}",
        "modelCard": {
            "modelParameters": {
                "architectureFamily": "Vision Transformer",
                "modelArchitecture": manifest.backbone.model,
                "inputs": [{"format": f"images float32 {[*manifest.input_size]}"}],
                "outputs": [
                    {"format": f"{name} float32 {[*shape]}"}
                    for name, shape in manifest.outputs.items()
                ],
            },
            **_errors(bundle),
        },
        "properties": _properties({"manifest.sha256": digest, **_versions(manifest)}),
    }


def _versions(manifest: Manifest) -> dict[str, str]:
    return {f"version.{name}": version for name, version in manifest.versions.items()}


def _errors(bundle: Bundle) -> dict[str, Any]:
    """Of every graph and adapter the error against the training-time model."""
    if not bundle.manifest.has(PARITY_FILE):
        return {}
    metrics = [
        {
            "type": "largest error over the range of outputs, against the training-time model",
            "value": str(stage["range_error"]),
            "slice": f"{stage['precision']}, {stage['adapter']}, {stage['runtime']}",
        }
        for stage in bundle.parity()["stages"]
    ]
    return {"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}


def _backbone(manifest: Manifest) -> dict[str, Any]:
    facts = manifest.backbone
    told = {"weights.sha256": facts.sha256, "args": json.dumps(dict(facts.args), sort_keys=True)}
    return _model("backbone", facts.model, facts.license, told)


def _adapter(manifest: Manifest, entry: AdapterEntry) -> dict[str, Any]:
    told = {
        "problem_type": entry.problem_type,
        "classes": str(entry.classes),
        "strength": f"{entry.strength:g}",
        "verified": str(entry.verified).lower(),
        **({"compressed": str(entry.compressed)} if entry.compressed else {}),
    }
    model = _model(f"adapter:{entry.name}", entry.name, entry.license, told)
    tensors = manifest.tensors_digest(entry)
    hashes = {"hashes": [{"alg": "SHA-256", "content": tensors}]} if tensors else {}
    own = f"{ADAPTERS}/{entry.name}/"
    parts = [n for n in sorted(manifest.files) if n.startswith(own)]
    return {**model, **hashes, "description": f"{ADAPTERS}: {', '.join(parts)}"}


def _model(ref: str, name: str, licences: Licences, told: Mapping[str, str]) -> dict[str, Any]:
    stated = {"licenses": list(map(_licence, licences))} if licences else {}
    properties = _properties({**told, "license": in_words(licences)})
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": name,
        **stated,
        "properties": properties,
    }


def _licence(name: str) -> dict[str, Any]:
    known = _SPDX.get(name.lower())
    return {"license": {"id": known} if known else {"name": name}}


def _file(name: str, digest: str) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _properties(told: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"hhdeploy:{k}", "value": v} for k, v in told.items() if v]
