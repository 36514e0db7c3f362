"""docs/measured.md has the GPU table that a report gives; a rehearsal never enters it."""

from __future__ import annotations

import pytest

from benchmarks import gpu_table


def pair(ratio, a, b):
    return {
        "ratio": ratio,
        "quartiles": [ratio, ratio],
        "a": {"median_ms": a},
        "b": {"median_ms": b},
    }


def entry(test, outcome="passed", **figures):
    return {"test": test, "outcome": outcome, "reason": "", "seconds": 1.0, "figures": figures}


def part(*tests, **changes):
    return {
        "dry": False,
        "state": "finished",
        "gpus": [{"name": "NVIDIA Imaginary", "architecture": "sm90"}],
        "driver_version": "580.95",
        "machine": "Linux x86_64, 16 cores",
        "versions": {"onnxruntime-gpu": "1.31.1", "torch": "2.14.1", "python": "3.12.1"},
        "tests": list(tests),
        **changes,
    }


ORT = "parity/test_onnxruntime.py::test_parity"
SPEED = "speed/test_onnxruntime.py::test_"


@pytest.fixture
def content():
    f16 = {"model": "vit-s", "precision": "float16"}
    return {
        "dry": False,
        "parts": {
            "parity": part(
                entry(f"{ORT}[1]", device="cuda", graph="folded", range_error=1.5e-6,
                      **(f16 | {"precision": "float32"})),
                entry(f"{ORT}[2]", "failed", device="cuda", graph="folded", range_error=0.5, **f16),
                entry(f"{ORT}[3]", device="ort-tensorrt", graph="folded", range_error=9.0, **f16),
                entry("parity/test_engines.py::test_parity[4]", range_error=8.0, **f16),
                entry("parity/test_torch.py::test_folded_weights_in_torch[5]", graph="torch",
                      range_error=3e-4, **f16),
            ),
            "speed": part(
                entry(f"{SPEED}side_branches_against_folded[1]", cuda_graphs=True, device="x",
                      **{"batch 1": pair(1.11, 2.0, 1.8), "batch 8": pair(1.03, 9.0, 8.7)}, **f16),
                entry(f"{SPEED}many_slots_against_two", model="vit-s", slots=1024, megabytes=700.0,
                      **{"batch 8": pair(1.01, 9.1, 9.0)}),
                entry(f"{SPEED}adapters_added_while_requests_run[1]", model="vit-s",
                      cuda_graphs=False, bank_megabytes=48.0, add_ms=4.5, run_alone_ms=8.0,
                      run_meanwhile_ms=9.5, run_meanwhile_p99_ms=20.0),
            ),
            "serve": part(
                entry("serve/test_load.py::test_under_load[1]", adapters=64, rows=47, seconds=60.2,
                      images_per_second=900.25, p50_ms=30.0, p99_ms=60.0, **f16),
                state="stopped after 570 s",
            ),
            "memory": part(
                entry("memory/test_adapters.py::test_memory[1000]", model="vit-s", adapters=1000,
                      bank_megabytes=700.2, gpu_megabytes=1500.0, host_megabytes=None),
                entry("memory/test_adapters.py::test_memory[1]", "skipped"),
            ),
        },
    }  # fmt: skip


def test_figures_come_with_gpu_driver_and_versions(content):
    text = gpu_table.table(content)
    about = "NVIDIA Imaginary (sm90), driver 580.95; Linux x86_64, 16 cores; onnxruntime-gpu 1.31.1"
    assert text.count(about) == 1  # of all parts
    assert "| ViT-S/16, folded | 1.5e-06 | **failed** |  |  |" in text
    assert "| ViT-S/16, folded, torch |  | 3.0e-04 |  |  |" in text
    assert "8.0e" not in text and "9.0e" not in text  # other runtimes
    row = "| ViT-S/16, side branches / folded, float16, CUDA graphs | 1.11 (2.00 / 1.80 ms) | "
    assert f"{row}1.03 (9.00 / 8.70 ms) |" in text
    assert "| ViT-S/16, 1,024 slots / 2, float32 |  | 1.01 (9.10 / 9.00 ms) |" in text
    assert "| ViT-S/16, bank of 48 MB | 4.50 | 9.50 | 8.00 |" in text
    assert "64 adapters in 47 rows, 60 s | 900.2 | 30.0 | 60.0 |" in text
    assert "| ViT-S/16, 1,000 adapters | 700 | 1,500 |  |" in text


def test_what_did_not_run_stays_said(content):
    rest = gpu_table.table(content).partition("No GPU has run the rest:\n")[2].splitlines()
    assert rest == [
        "* parity: finished, 1 failed",
        "* serve: stopped after 570 s",
        "* memory: finished, 1 skipped",
    ]


def test_parts_of_two_gpus_are_told_apart(content):
    content["parts"]["memory"]["gpus"] = [{"name": "NVIDIA Other", "architecture": "sm80"}]
    text = gpu_table.table(content)
    assert (
        text.index("NVIDIA Imaginary") < text.index("NVIDIA Other") < text.index("1,000 adapters")
    )


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ((), "dry", True),
        (("parts", "speed"), "dry", True),
        (("parts", "speed"), "gpus", []),
    ],
)
def test_a_rehearsal_is_refused(content, where, key, value):
    inside = content
    for step in where:
        inside = inside[step]
    inside[key] = value
    with pytest.raises(SystemExit, match=r"dry run|no GPU ran speed"):
        gpu_table.table(content)
