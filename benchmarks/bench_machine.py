"""What this machine computes at most, and where ViT-B's time goes.

    python -m benchmarks.bench_machine [--model vit_base_patch16_224] [--runs 30]

The probe is one Linear of the model's MLP at batch 8 in OpenVINO, in float32, bfloat16 (where the
processor computes in it) and INT8, and a copy of 256 MiB. The profile is OpenVINO's own time of
every node by kind of node, in the run of median time; what that takes beyond the sum is overhead.
docs/machine.md shows both.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import openvino as ov
from openvino import opset13 as ops

from benchmarks.harness import THREADS, report
from benchmarks.models import bundle, calibrated
from hhdeploy.bundle import Bundle
from hhdeploy.runtime.openvino_backend import shared_core
from hhdeploy.runtime.processor import overflows_in_int8

BATCHES: Final = (1, 8)
GRAPHS: Final = {
    "float32 folded": ("folded", "float32"),
    "float32 branches": ("branches", "float32"),
    "INT8 folded": ("folded", "int8"),
    "INT8 branches": ("branches", "int8"),
}
# Tokens of eight images, and the two sides of the MLP of ViT-B/16 at 224 px.
_LINEAR = (8 * 197, 768, 3072)
_COPIED_BYTES = 256 << 20
# Kinds of nodes with less of a run than this are told together.
_LEAST_SHARE = 0.01
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution"})
_NONE: Final = {"milliseconds": 0.0, "nodes": 0}


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--runs", default=30, show_default=True)
def main(model: str, runs: int) -> None:
    """The machine's limits, and a profile of folded and side branches in float32 and INT8."""
    results: dict[str, Any] = {"model": model, "runs": runs, "vnni": not overflows_in_int8()}
    results["probe"] = probe(runs)
    for kind in ("folded", "branches"):
        path = calibrated(bundle(model, kind), "int8")
        for name, (of, precision) in GRAPHS.items():
            for batch in BATCHES if of == kind else ():
                results[f"{name}, batch {batch}"] = profile(path, precision, batch, runs)
    report("machine", results)


def probe(runs: int) -> dict[str, float]:
    """Name -> GFLOP/s (10^9 multiplications and additions), and GB/s of a copy."""
    capable = shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    found = {"float32": _linear(runs, "f32")}
    if "BF16" in capable:
        found["bfloat16"] = _linear(runs, "bf16")
    found["INT8"] = _linear(runs, "f32", quantised=True)
    source = np.ones(_COPIED_BYTES, np.uint8)
    target = np.zeros_like(source)
    found["copy"] = 2 * _COPIED_BYTES / 1e9 / _median(lambda: np.copyto(target, source), runs)
    return found


def _linear(runs: int, hint: str, *, quantised: bool = False) -> float:
    rows, inner, outer = _LINEAR
    random = np.random.default_rng(0)
    given = ops.parameter([rows, inner], np.float32)
    weight = ops.constant(random.standard_normal((inner, outer), np.float32))
    left, right = given, weight
    if quantised:
        least, most = -4.0, 4.0 * 127 / 128
        left = ops.fake_quantize(left, least, most, least, most, 256)
        right = ops.fake_quantize(right, -most, most, -most, most, 255)
    model = ov.Model([ops.matmul(left, right, False, False)], [given])
    request = _compiled(model, hint).create_infer_request()
    request.set_input_tensor(ov.Tensor(random.standard_normal((rows, inner), np.float32)))
    return 2e-9 * rows * inner * outer / _median(request.infer, runs)


def profile(path: Path, precision: str, batch: int, runs: int) -> dict[str, Any]:
    """Milliseconds of a run, its nodes, and milliseconds by kind of node, most first."""
    opened = Bundle.open(path)
    hint = "bf16" if precision == "int8" and _computes_bfloat16() else "f32"
    compiled = _compiled(str(opened.graph(precision)), hint)
    request = compiled.create_infer_request()
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "images": random.standard_normal((batch, *opened.manifest.input_size), np.float32)
    }
    if opened.manifest.layout is not None:
        adapters = len(opened.manifest.adapters)
        feeds["adapter_bank"] = opened.bank()
        feeds["adapter_ids"] = 1 + np.arange(batch, dtype=np.int64) % adapters
    for name, value in feeds.items():
        request.set_tensor(name, ov.Tensor(value))
    found: list[tuple[float, Counter[str], Counter[str]]] = []
    for turn in range(runs + 3):
        begin = time.perf_counter()
        request.infer()
        if turn < 3:  # the first runs find their memory
            continue
        took = 1e3 * (time.perf_counter() - begin)
        ran = [n for n in request.profiling_info if n.status == ov.ProfilingInfo.Status.EXECUTED]
        sums: Counter[str] = Counter()
        nodes = Counter(_kind(node) for node in ran)
        for node in ran:
            sums[_kind(node)] += node.real_time.total_seconds() * 1e3
        found.append((took, sums, nodes))
    # One run, so that its parts are its parts.
    milliseconds, sums, nodes = sorted(found, key=lambda run: run[0])[len(found) // 2]
    ordered = sums.most_common()
    return {
        "milliseconds": milliseconds,
        "nodes": sum(nodes.values()),
        "kinds": {k: {"milliseconds": v, "nodes": nodes[k]} for k, v in ordered},
    }


def _kind(node: Any) -> str:
    """Of OpenVINO's node types, products apart by what they compute in."""
    computes = node.exec_type.rsplit("_", 1)[-1]
    return f"{node.node_type} {computes}" if node.node_type in _PRODUCTS else str(node.node_type)


def _compiled(model: Any, hint: str) -> Any:
    config = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": True,
    }
    return shared_core().compile_model(model, "CPU", config)


def _computes_bfloat16() -> bool:
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _median(run: Callable[[], object], runs: int) -> float:
    """Seconds of one run."""
    took = []
    for _ in range(runs + 3):
        begin = time.perf_counter()
        run()
        took.append(time.perf_counter() - begin)
    return statistics.median(took[3:])


def page(results: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    """What the page of docs says below its title, in Markdown."""
    probed = dict(results["probe"])
    copied = probed.pop("copy")
    lines = [
        f"OpenVINO {where['versions']['openvino']}, "
        f"{results['model']}, the median of {results['runs']} runs."
        + ("" if results["vnni"] else " **This processor multiplies INT8 without VNNI.**"),
        "",
        "What the machine does at most, by one Linear of the model's MLP at batch 8 (GFLOP/s count "
        "multiplications and additions), and a copy of 256 MiB, read and written:",
        "",
        f"| {' | '.join(probed)} | copy |",
        f"|{'---|' * (len(probed) + 1)}",
        f"| {' | '.join(f'{value:.0f} GFLOP/s' for value in probed.values())} "
        f"| {copied:.1f} GB/s |",
        "",
        "Milliseconds of a run by kind of node, as OpenVINO counts them, and how many nodes. Its "
        "counts of one run may add to a little more than the run:",
    ]
    for batch in BATCHES:
        columns = {name: results[f"{name}, batch {batch}"] for name in GRAPHS}
        kinds = [
            kind
            for kind in dict.fromkeys(k for found in columns.values() for k in found["kinds"])
            if any(
                found["kinds"].get(kind, _NONE)["milliseconds"]
                >= _LEAST_SHARE * found["milliseconds"]
                for found in columns.values()
            )
        ]
        lines += ["", f"## Batch {batch}", "", f"| | {' | '.join(columns)} |"]
        lines += [f"|---|{'---|' * len(columns)}"]
        lines += [
            f"| {kind} | {' | '.join(_cell(found, kind) for found in columns.values())} |"
            for kind in kinds
        ]
        rest = [
            found["milliseconds"] - sum(found["kinds"].get(k, _NONE)["milliseconds"] for k in kinds)
            for found in columns.values()
        ]
        whole = [
            f"**{found['milliseconds']:.1f}** ({found['nodes']})" for found in columns.values()
        ]
        lines += [
            f"| all else, and between nodes | {' | '.join(f'{each:.1f}' for each in rest)} |",
            f"| **a run** | {' | '.join(whole)} |",
        ]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], kind: str) -> str:
    node = found["kinds"].get(kind)
    return "" if node is None else f"{node['milliseconds']:.1f} ({node['nodes']})"


if __name__ == "__main__":
    main()
