"""hhdeploy.json: what a bundle is, which adapters and files it has, and what they are called.

Nobody finds a file but through the manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from hhdeploy.adapters.config import (
    CLASSES,
    PROBLEM_TYPES,
    TENSOR_FILE,
    Compression,
    ProblemType,
    problem_type_of,
)
from hhdeploy.backbones.facts import FEATURES, LOGITS, TOKENS, BackboneFacts
from hhdeploy.backbones.licences import Licences, licences_of, licences_to_json
from hhdeploy.bundle.layout import RowLayout
from hhdeploy.choices import BACKENDS, PRECISIONS, Precision, QuantisedPrecision, TensorRt, member
from hhdeploy.errors import BundleError, PlanError, abbreviate
from hhdeploy.files.bundle_json import MANIFEST as MANIFEST
from hhdeploy.files.bundle_json import SCHEMA_VERSION as SCHEMA_VERSION
from hhdeploy.files.bundle_json import SIGNATURE as SIGNATURE
from hhdeploy.files.bundle_json import as_read, unknown_keys
from hhdeploy.files.bundle_json import name_with_digits as name_with_digits
from hhdeploy.files.bundle_json import plain_name as plain_name
from hhdeploy.files.writing import sha256_of, write_json
from hhdeploy.preprocess import Preprocess

BANK_FILE = "bank.safetensors"
REFERENCE_FILE, PARITY_FILE = "reference.safetensors", "parity.json"
# Where adapters are kept as they came, a directory each.
ADAPTERS = "adapters"
# Files of the state before the last change, for those who opened it.
OLD = ".old"
# Seconds that a change waits for another one to end.
LOCK_TIMEOUT = 600.0
# Earlier versions: the bank before a change that has not been committed by its manifest.
PREVIOUS_BANK = "bank.safetensors.previous"
BundleKind = Literal["folded", "branches"]
# Fewest, most common and most; TensorRT's min, opt and max of one dimension.
Range = tuple[int, int, int]
_Name = TypeVar("_Name", bound=str)


def calibration_files(precision: QuantisedPrecision) -> tuple[str, str]:
    """Names of a calibration's findings and scales in its bundle."""
    return f"calibration.{precision}.json", f"calibration.{precision}.safetensors"


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a bundle.

    Attributes:
        name: how requests call it.
        row: its row in the bank; None in a folded bundle.
        classes: columns of its logits that are its own.
        class_names: one per class, or None.
        preprocess: how its images become inputs.
        verified: False for an adapter added later, until ``verify --against-torch``.
        problem_type: what its logits mean; in JSON absent where `problem_type_of` finds it.
        strength: what its change of the backbone is multiplied by.
        compressed: what it lost when it was imported with a rank, None if nothing.
        license: as its files state it; empty where they say nothing.
        digest: sha256 of its tensors' file, of one that was read from a directory; "" of others.
            No part of the manifest, which has the digests of its files.
        extra: JSON keys that this version does not know, kept as they are.
    """

    name: str
    row: int | None
    classes: int
    class_names: tuple[str, ...] | None
    preprocess: Preprocess
    verified: bool
    problem_type: ProblemType = CLASSES
    strength: float = 1.0
    compressed: Compression | None = None
    license: Licences = ()
    digest: str = field(default="", compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def label(self, index: int) -> str:
        """Name of a class, its number if it has none."""
        return self.class_names[index] if self.class_names else str(index)

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        absent = problem_type_of(None, self.classes)
        return {
            "name": self.name,
            "row": self.row,
            "classes": self.classes,
            "class_names": list(self.class_names) if self.class_names else None,
            "preprocess": self.preprocess.to_json(),
            "verified": self.verified,
            **({"license": licences_to_json(self.license)} if self.license else {}),
            **({"problem_type": self.problem_type} if self.problem_type != absent else {}),
            **({"strength": self.strength} if self.strength != 1.0 else {}),
            **({"compressed": self.compressed.to_json()} if self.compressed else {}),
            **self.extra,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AdapterEntry:
        """Read the manifest's entry."""
        names, problem_type = content["class_names"], content.get("problem_type")
        if problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type {problem_type!r}")
        return cls(
            content["name"],
            content["row"],
            content["classes"],
            tuple(names) if names else None,
            Preprocess.from_json(content["preprocess"]),
            content["verified"],
            problem_type_of(problem_type, content["classes"]),
            float(content.get("strength", 1.0)),
            Compression.from_json(content.get("compressed")),
            licences_of(content.get("license")),
            extra=unknown_keys(content, "adapter"),
        )


@dataclass(frozen=True)
class EngineEntry:
    """One engine of a bundle.

    Attributes:
        file: its name in the bundle.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the backend that built it, as its module says it.
        precision: of the graph it was built from.
        architectures: ``sm89`` ...; empty: portable over Ampere and newer, as far as the backend
            covers them.
        gpu: name of the GPU it was tuned on; None if it was built without one.
        batch: images of one run.
        slots: rows of the bank; None for a folded graph or a bank baked in.
        bank_sha256: of the bank that is baked in; None if the bank is an input.
        graph_sha256: `Manifest.graph_digest` of what it was built from.
        optimization_level: of the builder; None: its default.
        build_seconds: wall-clock.
        bytes: size of the file.
    """

    file: str
    backend: TensorRt
    version: str
    precision: Precision
    architectures: tuple[str, ...]
    gpu: str | None
    batch: Range
    slots: Range | None
    bank_sha256: str | None
    graph_sha256: str
    optimization_level: int | None
    build_seconds: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EngineEntry:
        """Read the manifest's entry. Raises KeyError, TypeError or ValueError if it is damaged."""
        ranges = {
            key: tuple(content[key]) if content[key] is not None else None
            for key in ("batch", "slots", "architectures")
        }
        names = {
            "backend": _known(BACKENDS, content["backend"], "backend"),
            "precision": _known(PRECISIONS, content["precision"], "precision"),
        }
        return cls(**{**content, **ranges, **names})


@dataclass(frozen=True)
class Manifest:
    """hhdeploy.json.

    Attributes:
        kind: ``folded`` (one adapter in the weights) or ``branches``.
        backbone: what the adapters belong to; its Linears are for ``layout`` to say.
        classes: columns of the graph's logits.
        adapters: in the order they came.
        layout: the row's layout; None in a folded bundle.
        bank_as_constant: True if the graph has the bank baked in.
        graphs: precision -> file names of the graph.
        engines: in the order they were built.
        files: relative name -> sha256.
        versions: of what wrote the bundle.
        features: name -> shape of an image's part, of every output of the graph but the logits.
        extra: as of `AdapterEntry`; `extra_tensors` of ``tensors``.
    """

    kind: BundleKind
    backbone: BackboneFacts
    classes: int
    adapters: tuple[AdapterEntry, ...]
    layout: RowLayout | None
    bank_as_constant: bool
    graphs: Mapping[Precision, str]
    engines: tuple[EngineEntry, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    extra_tensors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of an image's part, of all outputs of the graph, logits first."""
        logits = {LOGITS: (self.classes,)} if self.classes else {}
        return {**logits, **self.features}

    def split(self, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Rows [n, ...] of what a graph answers, all outputs of an image side by side, as
        [n, *shape] of each output."""
        found, start = {}, 0
        for name, shape in self.outputs.items():
            end = start + math.prod(shape)
            found[name] = rows[:, start:end].reshape(len(rows), *shape)
            start = end
        return found

    def check_logits_alone(self, what: str) -> None:
        """Raise `PlanError` where the graph has other outputs, for ``what`` knows logits only."""
        if self.features:
            has = "" if self.classes else ", of a model that has a classifier"
            raise PlanError(
                f"{what} is for logits alone, this bundle gives {', '.join(self.outputs)}. Export "
                f"it once more, with `outputs=['logits']`{has}."
            )

    @property
    def answers_backbone(self) -> bool:
        """Whether requests may ask for the bare backbone: its classes, or its features."""
        return bool(self.backbone_classes) or (self.layout is not None and not self.classes)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(3, H, W) of the graph's images."""
        return self.backbone.preprocess.input_size

    @property
    def backbone_classes(self) -> int:
        """Classes of the backbone's own classifier if requests may use it, else 0."""
        if self.layout is not None and self.layout.backbone_head:
            return self.backbone.classes
        return 0

    def picture_graph(self, transform: Preprocess) -> dict[str, Any]:
        """``preprocess_graph`` of a manifest's entry: the file of the graph that does a transform,
        and all that it takes beside the picture. Nothing where the bundle has no such graph."""
        role = transform.graph_file
        if role is None or not self.has(role):
            return {}
        inputs = {n: {"dtype": d, "value": v} for n, (d, v) in transform.graph_inputs.items()}
        return {"preprocess_graph": {"file": self.named(role), "inputs": inputs}}

    def preprocess_of(self, entry: AdapterEntry | None) -> Preprocess:
        """What the images of an adapter (None: of the bare backbone) go through."""
        return self.backbone.preprocess if entry is None else entry.preprocess

    @property
    def whole(self) -> bool:
        """A model that was exported as it is: its one entry is no adapter, and has no files."""
        return self.layout is None and not any(n.startswith(f"{ADAPTERS}/") for n in self.files)

    def named(self, role: str) -> str:
        """The name that a file has now, by the one it has in a fresh export."""
        return next((n for n in self.files if "/" not in n and plain_name(n) == role), role)

    def has(self, role: str) -> bool:
        """Whether there is a file of this role, whatever its digits."""
        return self.named(role) in self.files

    def graph_digest(self, precision: Precision) -> str:
        """sha256 over the hashes of a graph's file and of its weights; "" without such a graph."""
        graph = self.graphs.get(precision)
        if graph is None:
            return ""
        hashes = [self.files.get(name, "") for name in (graph, f"{graph}.data")]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def adapter_digest(self, name: str) -> str:
        """sha256 over the names and hashes of an adapter's files, and its strength."""
        lines = [f"{n} {d}" for n, d in self.files.items() if n.startswith(f"{ADAPTERS}/{name}/")]
        lines.append(f"strength {self.adapter(name).strength!r}")
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def tensors_digest(self, entry: AdapterEntry) -> str:
        """sha256 of an adapter's tensors' file; "" where it has none (`whole`)."""
        return entry.digest or self.files.get(f"{ADAPTERS}/{entry.name}/{TENSOR_FILE}", "")

    def problem_type(self, name: str) -> ProblemType:
        """What the logits of an adapter, or of the backbone, mean."""
        return next((a.problem_type for a in self.adapters if a.name == name), CLASSES)

    def adapter(self, name: str) -> AdapterEntry:
        """The entry of an adapter. Raises `BundleError` listing the names there are."""
        for entry in self.adapters:
            if isinstance(name, str) and entry.name == name:
                return entry
        known = abbreviate([a.name for a in self.adapters], 20) or "none"
        raise BundleError(f"unknown adapter {name!r}. The bundle has: {known}.")

    @property
    def _needs_version_2(self) -> bool:
        return not self.classes or (self.layout is not None and self.layout.has_extras)

    @property
    def tensors(self) -> dict[str, Any]:
        """Name -> shape of what the graph takes and gives; an open size has a name."""
        return {
            "images": ["batch", *self.input_size],
            **({"adapter_ids": ["batch"]} if (row := self.layout) else {}),
            **({"adapter_bank": ["slots", row.size]} if row and not self.bank_as_constant else {}),
            **{name: ["batch", *shape] for name, shape in self.outputs.items()},
            **self.extra_tensors,
        }

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "schema_version": 2 if self._needs_version_2 else 1,
            "kind": self.kind,
            "backbone": self.backbone.to_json() | self.picture_graph(self.backbone.preprocess),
            "classes": self.classes,
            "adapters": [a.to_json() | self.picture_graph(a.preprocess) for a in self.adapters],
            "row": self.layout.to_json() if self.layout else None,
            "tensors": self.tensors,
            "bank_as_constant": self.bank_as_constant,
            "graphs": dict(self.graphs),
            "engines": [e.to_json() for e in self.engines],
            "files": dict(sorted(self.files.items())),
            "versions": dict(self.versions),
            **self.extra,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Read the file's content. Raises KeyError, TypeError or ValueError if it is damaged."""
        manifest = cls(
            content["kind"],
            BackboneFacts.from_json(content["backbone"]),
            content["classes"],
            tuple(AdapterEntry.from_json(a) for a in content["adapters"]),
            RowLayout.from_json(content["row"]) if content["row"] is not None else None,
            content["bank_as_constant"],
            {_known(PRECISIONS, p, "graph"): name for p, name in dict(content["graphs"]).items()},
            tuple(EngineEntry.from_json(e) for e in content["engines"]),
            dict(content["files"]),
            dict(content["versions"]),
            {
                name: tuple(int(size) for size in shape[1:])
                for name in (FEATURES, TOKENS)  # the graph's order, whatever an object's is
                if (shape := content["tensors"].get(name)) is not None
            },
            unknown_keys(content),
            unknown_keys(content["tensors"], "tensors"),
        )
        if manifest.kind != (expected := "folded" if manifest.layout is None else "branches"):
            raise ValueError(f"kind {manifest.kind!r}, but its row makes it {expected!r}")
        if manifest.tensors != (found := content["tensors"]):
            raise ValueError(f"tensors: expected {manifest.tensors}, found {found}")
        return manifest


def _known(names: Iterable[_Name], found: object, what: str) -> _Name:
    """One of the names that there are. Raises ValueError for any other."""
    if (name := member(names, found)) is None:
        raise ValueError(f"{what} {found!r}, expected one of {', '.join(names)}")
    return name


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace a bundle's manifest in one step."""
    write_json(path / MANIFEST, as_read(manifest.to_json()))


def hash_files(path: Path) -> dict[str, str]:
    """sha256 of every file of a bundle but the manifest, and what is hidden at the top."""
    return {
        file.relative_to(path).as_posix(): sha256_of(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.relative_to(path).parts[0].startswith((MANIFEST, "."))
    }
