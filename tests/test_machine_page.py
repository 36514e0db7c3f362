"""The page of docs/machine.md, of figures that are known."""

from __future__ import annotations

from benchmarks.bench_machine import GRAPHS, page


def test_every_millisecond_has_a_line():
    graph = {
        "milliseconds": 100.0,
        "nodes": 9,
        "kinds": {
            "MatMul f32": {"milliseconds": 70.0, "nodes": 3},
            "Pad": {"milliseconds": 20.5, "nodes": 2},
            "Reshape": {"milliseconds": 0.5, "nodes": 4},
        },
    }
    bare = {"milliseconds": 50.0, "nodes": 1, "kinds": {"MVN": {"milliseconds": 49.0, "nodes": 1}}}
    results = {
        "model": "small",
        "runs": 3,
        "vnni": False,
        "probe": {"float32": 100.4, "INT8": 300.0, "copy": 12.34},
        **{f"{name}, batch {batch}": graph for name in GRAPHS for batch in (1, 8)},
        "INT8 folded, batch 8": bare,
    }
    text = page(results, {"cpu": "A CPU", "threads": 2, "versions": {"openvino": "1.2"}})
    assert "the median of 3 runs. **This processor multiplies INT8 without VNNI.**" in text
    assert "| 100 GFLOP/s | 300 GFLOP/s | 12.3 GB/s |" in text
    first, second = text.split("## Batch 8")
    assert "| MatMul f32 | 70.0 (3) | 70.0 (3) | 70.0 (3) | 70.0 (3) |" in first
    assert "| all else, and between nodes | 9.5 | 9.5 | 9.5 | 9.5 |" in first
    assert "Reshape" not in text
    assert "MVN" not in first
    assert "| MVN |  |  | 49.0 (1) |  |" in second
    assert "| **a run** | **100.0** (9) | **100.0** (9) | **50.0** (1) | **100.0** (9) |" in second
