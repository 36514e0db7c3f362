"""Which families of models go through: folded, side branches, INT8, engine; verified or refused.

    python -m benchmarks.coverage [--results FILE] [FAMILY ...]

A small, random, perturbed variant of every family, its adapters random too. Every family's result
is a line of FILE, and a family that has one is not run again: an interrupted run goes on.
docs/coverage.md shows the JSON of the last line.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.blocks import COVERAGE as COLUMNS
from benchmarks.harness import machine
from benchmarks.models import STARTER, calibrated, work_directory
from hhdeploy.adapters.checks import check_sites
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.spec import Backbone
from hhdeploy.building import build
from hhdeploy.bundle import Bundle
from hhdeploy.errors import HhdeployError
from hhdeploy.exporters.trace import BaseGraph, base_graph
from hhdeploy.exporters.writer import Contents, branches_contents, folded_contents, write_bundle
from hhdeploy.parity import ParityReport
from hhdeploy.plan import Reserve, plan_branches
from hhdeploy.verifying.answers import verify_graphs
from hhdeploy.verifying.bundles import rows_of
from hhdeploy.verifying.reference import Reference, VerifyData, training_time_reference
from tests.parity.architectures import (
    FAST,
    OTHERS,
    OTHERS_SLOW,
    REFUSED,
    SHARED,
    SLOW,
    Architecture,
    small,
)
from tests.parity.ladder import ladder_adapters, run, session

FAMILIES: Mapping[str, Architecture] = {
    **{name: SHARED[name] for name in SHARED if name != "zero bias"},
    **FAST,
    **OTHERS,
    **OTHERS_SLOW,
    **SLOW,
    **{name: Architecture(name) for name in REFUSED},
}
_PACKAGES = ("torch", "timm", "transformers", "torchvision", "open_clip_torch", "onnxruntime")
_PACKAGES += ("nncf", "tensorrt-rtx-cu13")
_DATA = VerifyData(STARTER / "images", 3)
# Of at most two adapters in one graph: an additive one, and one after the Linear.
_ADAPTERS = ("every", "after")


def main(arguments: Sequence[str]) -> int:
    """Run what has no result yet; the table, and 1 if anything is neither verified nor refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="FAMILY")
    parser.add_argument("--results", type=Path, default=work_directory() / "coverage.jsonl")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = _stored(chosen.results)
    for name in chosen.families or FAMILIES:
        if name not in results:
            results[name] = measure(FAMILIES[name])
            with chosen.results.open("a", encoding="utf-8") as stream:
                print(json.dumps({"family": name, **results[name]}), file=stream)
            print(f"{name:28}{results[name]}", flush=True)
            gc.collect()
    rows = {name: results[name] for name in FAMILIES if name in results}
    wrong = [n for n, row in rows.items() if any(row[c].startswith("wrong") for c in COLUMNS)]
    verified = sum(row["fold"].startswith("verified") for row in rows.values())
    counts = {"families": len(rows), "folded and verified": verified, "wrong": wrong}
    versions = {package: metadata.version(package) for package in _PACKAGES}
    about = {"benchmark": "coverage", "machine": machine(1) | {"versions": versions}}
    print(json.dumps({**about, **counts, "results": rows}))
    return int(bool(wrong))


def _stored(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line.pop("family"): line for line in lines}


def measure(architecture: Architecture) -> dict[str, str]:
    """Column -> ``verified`` with its figure, ``refused`` with the reason, or ``wrong``."""
    row = {"model": architecture.model} | dict.fromkeys(COLUMNS, "")

    def attempt(column: str, step: Callable[[], str]) -> None:
        try:
            row[column] = step()
        except HhdeployError as error:
            row[column] = f"refused: {_line(error)}"
        except Exception as error:  # noqa: BLE001  (a traceback is the table's finding)
            row[column] = f"wrong: {type(error).__name__}: {_line(error)}"

    with tempfile.TemporaryDirectory() as folder:
        try:
            family = Family(architecture, Path(folder))
        except HhdeployError as error:
            return row | dict.fromkeys(COLUMNS, f"refused: {_line(error)}")
        for column in COLUMNS:
            attempt(column, family.steps[column])
    return row


class Family:
    """One small model, its adapters, and the steps that fill its line of the table."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        """Raises `HhdeployError` where the model is refused."""
        self.folder = folder
        self.backbone: Backbone = small(architecture)
        check_sites(self.backbone.facts)
        self.base: BaseGraph = base_graph(self.backbone, None)
        every = ladder_adapters(self.base)
        self.adapters: dict[str, Adapter] = {n: every[n] for n in _ADAPTERS if n in every}
        self.steps: dict[str, Callable[[], str]] = {
            "fold": self.fold,
            "branches": self.branches,
            "row 0": self.row_zero,
            "int8": self.int8,
            "engine": self.engine,
        }

    def fold(self) -> str:
        """Every adapter in the weights."""
        found = []
        for name, adapter in self.adapters.items():
            contents = folded_contents(self.base, name, adapter)
            bundle, reference = self._written(contents, {name: adapter}, f"folded-{name}")
            found.append(_judged(bundle, "float32", reference))
        return max(found, key=_severity)

    def branches(self) -> str:
        """All adapters in one graph, the images of a batch mixed."""
        bundle, reference = self._written(self._contents(), self.adapters, "branches")
        self.bundle, self.reference = bundle, reference
        return _judged(bundle, "float32", reference)

    def row_zero(self) -> str:
        """The graph with branches, asked for the backbone, against the bare graph."""
        bundle = self._branched()
        if not self.base.facts.classes:
            return "refused: this backbone has no classifier, so row 0 has no logits"
        images = self.reference.images[self.reference.adapter_ids == 0]
        with session(self.base.model) as bare:
            expected = run(bare, images)
        with session(self._contents().model) as branched:
            ids = self.reference.adapter_ids[self.reference.adapter_ids == 0]
            found = run(branched, images, adapter_ids=ids, adapter_bank=bundle.bank())
        same = found[:, : expected.shape[1]].tobytes() == expected.tobytes()
        return "verified" if same else "wrong: other bits than the backbone's"

    def int8(self) -> str:
        """Side branches over INT8 products, calibrated on photos."""
        path = calibrated(self._branched().path, "int8")
        found = _judged(Bundle.open(path), "int8", self.reference)
        # Calibration compares the same where a bundle was verified on images, and refuses.
        return found.replace("wrong", "refused", 1)

    def engine(self) -> str:
        """The graph with branches, compiled by TensorRT-RTX."""
        entry = build(self._branched().path, backend="tensorrt-rtx")
        return f"built, {entry.bytes / 1e6:.1f} MB"

    def _branched(self) -> Bundle:
        if not hasattr(self, "bundle"):
            self._contents()  # says why there is none
        return self.bundle

    def _contents(self) -> Contents:
        plan = plan_branches(
            self.base.facts,
            self.adapters,
            Reserve(keep_backbone_head=self.base.facts.classes > 0),
        )
        return branches_contents(
            self.base, plan, self.adapters, bank_as_constant=False, precisions=()
        )

    def _written(
        self, contents: Contents, adapters: Mapping[str, Adapter], name: str
    ) -> tuple[Bundle, Reference]:
        """The bundle, without the adapters' directories, and its float64 reference."""
        rows = rows_of(contents.manifest, adapters)
        backbone = replace(self.backbone, facts=self.base.facts)
        reference = training_time_reference(backbone, rows, _DATA, contents.manifest.outputs)
        path = self.folder / name
        path.mkdir()
        write_bundle(path, replace(contents, adapters={}), (), lambda: reference)
        return Bundle.open(path), reference


def _judged(bundle: Bundle, precision: str, reference: Reference) -> str:
    report: ParityReport = verify_graphs(bundle, "cpu", (precision,), reference, _DATA)
    worst = max(s.comparison.range_error for s in report.stages)
    if report.passed:
        return f"verified {worst:.0e}"
    return f"wrong {worst:.0e}: {_line(report.explain_failures())}"


def _severity(found: str) -> tuple[bool, float]:
    return found.startswith("wrong"), float(found.split()[1].rstrip(":"))


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
