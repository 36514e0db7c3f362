"""Figures in prose, and the examples' own tables, are those of the files that measurements left.

Tables of README and docs are compared by `test_tables`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.workshop import ROOT

VITS14, STARTER, GPU = (
    "examples/vits14/results.json",
    "examples/starter/results.json",
    "benchmarks/results/gpu.json",
)
COLUMNS = (
    "probe", "lora", "hta", "folded-float32", "branches-float32", "folded-bfloat16",
    "branches-bfloat16", "folded-int8", "branches-int8",
)  # fmt: skip


def read(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def mean(method: str) -> float:
    tasks = read(VITS14)["tasks"].values()
    return sum(task[method]["top1"] for task in tasks) / len(tasks)


def vits14() -> Iterator[tuple[str, str]]:
    """Its own table, and what is said below it."""
    page = "examples/vits14/README.md"
    tasks = read(VITS14)["tasks"]
    for name, task in tasks.items():
        row = [f"{task[column]['top1']:.1f}" for column in COLUMNS]
        yield page, f"| {' | '.join([name, *row, format(task['images']['test'], ',')])} |"
    means = {column: f"{mean(column):.1f}" for column in COLUMNS}
    yield page, f"| {' | '.join(['mean', *means.values()])} | |"
    images = sum(task["images"]["test"] for task in tasks.values())
    unlike = {
        graph: sum(task[graph]["answers_unlike_pytorch"] for task in tasks.values())
        for graph in COLUMNS[5:]
    }
    folded, branches, folded8, branches8 = unlike.values()
    said = f"all but {folded} of {images:,} (folded) in bfloat16, all but {folded8} in INT8"
    yield page, f"{said} (side branches: {branches} and {branches8})"


def starter() -> Iterator[tuple[str, str]]:
    """The four tasks."""
    for task in read(STARTER)["tasks"].values():
        top1, converged = f"{task['adapter_top1']:.2f}", task["linear_probe_converged_top1"]
        best = f"**{top1}**" if task["adapter_top1"] > converged else top1
        sizes = f"{task['adapter_parameters']:,} | {task['adapter_parameters_with_head']:,}"
        end = f"{sizes} | {task['images']['test']:,} |"
        about = f"{converged:.2f} | {best}"
        yield "examples/starter/README.md", f"{task['linear_probe_top1']:.2f} | {about} | {end}"


def ratios(cuda_graphs: bool) -> dict[str, list[float]]:
    """Precision -> side branches / folded on the GPU at batch 1, 8 and 32."""
    found = {}
    for entry in read(GPU)["parts"]["speed"]["tests"]:
        told = entry.get("figures", {})
        ours = "side_branches_against_folded" in entry["test"] and entry["outcome"] == "passed"
        if ours and told["cuda_graphs"] == cuda_graphs:
            sizes = ("batch 1", "batch 8", "batch 32")
            found[told["precision"]] = [told[size]["ratio"] for size in sizes]
    return found


def gpu() -> Iterator[tuple[str, str]]:
    """What the H100 costs, where a page says it in words."""
    plain, graphs = ratios(False), ratios(True)
    every = [ratio for row in (*plain.values(), *graphs.values()) for ratio in row]
    yield "docs/limits.md", f"{min(every):.1f} to {max(every):.1f} times folded"
    saved = [
        1 - (graph - 1) / (without - 1)
        for precision in plain
        for without, graph in zip(plain[precision], graphs[precision], strict=True)
    ]
    yield "docs/limits.md", f"take {100 * min(saved):.0f} to {100 * max(saved):.0f} % of what"
    served = (e for e in read(GPU)["parts"]["serve"]["tests"] if "faulty" in e["figures"])
    (load,) = (e["figures"] for e in served)
    assert load["faulty"] == 0
    told = f"{load['adapters']} adapters in {load['rows']} rows, adapters coming and going,"
    yield "docs/tensorrt.md", f"{told} answered {load['requests']:,} requests without a fault"


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


CLAIMS = [*vits14(), *starter(), *gpu()]


@pytest.mark.parametrize(("page", "claim"), CLAIMS, ids=[f"{p}: {c}" for p, c in CLAIMS])
def test_the_page_says_what_was_measured(page, claim):
    assert squeezed(claim) in squeezed((ROOT / page).read_text(encoding="utf-8"))


def test_there_are_claims_of_every_file():
    assert {page for page, _ in CLAIMS} == {
        "docs/limits.md", "docs/tensorrt.md", "examples/starter/README.md",
        "examples/vits14/README.md",
    }  # fmt: skip
