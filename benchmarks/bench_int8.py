"""INT8 and bfloat16 on a CPU against timm's eager float32, and what side branches cost in INT8.

    python -m benchmarks.bench_int8 [--model vit_base_patch16_224] [--pairs 9] [--rounds 2]
                                    [--batch 1 --batch 8] [--only TEXT]

Everything runs in one process, in turn, on the same threads. "timm / X" is how many times as fast
X is. The controls are two sessions of one graph: what they differ by is noise. Where a session's
weights land in memory moves its speed for as long as it is open, so all are opened anew for every
round. The weights are random: nothing is said of accuracy here.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from benchmarks.harness import THREADS, report, runner
from benchmarks.models import bundle, calibrated
from hhdeploy.errors import SessionError
from hhdeploy.runtime import Session, open_session
from hhdeploy.timing import Paired, paired

Run = Callable[[], object]
# Name -> kind of bundle, device, precision; "again" is the second of a control.
SESSIONS = {
    "INT8 OpenVINO": ("folded", "openvino", "int8"),
    "INT8 OpenVINO again": ("folded", "openvino", "int8"),
    "INT8 branches OpenVINO": ("branches", "openvino", "int8"),
    "INT8 ORT": ("folded", "cpu", "int8"),
    "INT8 ORT again": ("folded", "cpu", "int8"),
    "INT8 branches ORT": ("branches", "cpu", "int8"),
    "bf16 OpenVINO": ("folded", "openvino", "bfloat16"),
    "fp32 OpenVINO": ("folded", "openvino", "float32"),
    "fp32 ORT": ("folded", "cpu", "float32"),
}
TIMM = "timm"
PAIRS = (
    (TIMM, "INT8 OpenVINO"),
    (TIMM, "INT8 ORT"),
    (TIMM, "bf16 OpenVINO"),
    (TIMM, "fp32 OpenVINO"),
    ("fp32 ORT", "fp32 OpenVINO"),
    ("INT8 branches OpenVINO", "INT8 OpenVINO"),
    ("INT8 OpenVINO again", "INT8 OpenVINO"),
    ("INT8 branches ORT", "INT8 ORT"),
    ("INT8 ORT again", "INT8 ORT"),
)


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--pairs", default=9, show_default=True, help="Per round.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--only", default="", help="Pairs whose name holds this text.")
def main(model: str, pairs: int, rounds: int, batches: tuple[int, ...], only: str) -> None:
    """Eager against INT8 and bfloat16, branches against folded, and the controls."""
    chosen = [pair for pair in PAIRS if only in " / ".join(pair)]
    paths = {kind: calibrated(bundle(model, kind), "int8") for kind in ("folded", "branches")}
    eager = _eager(model) if any(TIMM in pair for pair in chosen) else None
    found: dict[str, list[Paired]] = {}
    results: dict[str, Any] = {"model": model, "pairs": pairs * rounds}
    for turn in range(rounds):
        with contextlib.ExitStack() as stack:
            sessions: dict[str, Session] = {}
            for name in sorted({n for pair in chosen for n in pair if n != TIMM}, reverse=turn % 2):
                kind, device, precision = SESSIONS[name]
                try:
                    session = open_session(
                        paths[kind],
                        device=device,
                        precision=precision,
                        threads=THREADS,
                        cache=None,
                    )
                except SessionError as error:  # a processor without bfloat16
                    results[name] = str(error)
                    continue
                sessions[name] = stack.enter_context(session)
            for batch in batches:
                runs = {name: runner(session, batch) for name, session in sessions.items()}
                if eager is not None:
                    runs[TIMM] = eager(batch)
                for a, b in chosen:
                    if a in runs and b in runs:
                        pair = paired(runs[a], runs[b], pairs=pairs, warmup=1)
                        found.setdefault(f"{a} / {b}, batch {batch}", []).append(pair)
    report("int8", results | {key: _pooled(rounds_) for key, rounds_ in found.items()})


def _eager(model: str) -> Callable[[int], Run]:
    """timm's model as a user without hhdeploy would run it, by batch."""
    import timm
    import torch

    torch.set_num_threads(THREADS)
    network = timm.create_model(model, pretrained=False, num_classes=10).eval()

    def runner(batch: int) -> Run:
        size = network.default_cfg["input_size"]
        images = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, *size), "f4"))

        def run() -> object:
            with torch.inference_mode():
                return network(images)

        return run

    return runner


def _pooled(rounds: list[Paired]) -> dict[str, Any]:
    return {
        "ratio": round(statistics.median(r.ratio for r in rounds), 3),
        "of the rounds": [round(r.ratio, 3) for r in rounds],
        "quartiles": [round(min(r.low for r in rounds), 3), round(max(r.high for r in rounds), 3)],
        "a_ms": round(statistics.median(r.a.median_ms for r in rounds), 1),
        "b_ms": round(statistics.median(r.b.median_ms for r in rounds), 1),
        "fastest": [
            round(min(r.a.min_ms for r in rounds), 1),
            round(min(r.b.min_ms for r in rounds), 1),
        ],
    }


if __name__ == "__main__":
    main()
