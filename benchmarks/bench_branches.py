"""Cost of side branches: bare backbone, one adapter folded, four adapters side by side.

    python -m benchmarks.bench_branches [--model vit_base_patch16_224] [--pairs 20] [--rounds 3]
                                        [--device cpu|openvino] [--batch 1 --batch 8]

`--model starter`: the starter model, trained, without the bare backbone.
Where a session's weights land in memory moves its speed by several percent for as long as it is
open, so the sessions are opened anew, in another order, for every round of pairs.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import THREADS, report, runner
from benchmarks.models import bundle, starter_bundle
from hhdeploy.runtime import open_session
from hhdeploy.timing import Paired, paired

KINDS = ("backbone", "folded", "branches")
STARTER = "starter"


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--pairs", default=10, show_default=True, help="Per round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), show_default=True)
def main(model: str, pairs: int, rounds: int, device: str, batches: tuple[int, ...]) -> None:
    """Folded against backbone, and side branches against folded."""
    found: dict[str, list[Paired]] = {}
    kinds = KINDS[1:] if model == STARTER else KINDS
    for turn in range(rounds):
        order = kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]
        with contextlib.ExitStack() as stack:
            sessions = {
                kind: stack.enter_context(
                    open_session(_path(model, kind), device=device, threads=THREADS)
                )
                for kind in order
            }
            for batch in batches:
                runs = {kind: runner(session, batch) for kind, session in sessions.items()}
                for b, a in itertools.pairwise(kinds):
                    pair = paired(runs[a], runs[b], pairs=pairs, warmup=2)
                    found.setdefault(f"{a} / {b}, batch {batch}", []).append(pair)
    results: dict[str, Any] = {"model": model, "device": device, "pairs": pairs * rounds}
    report("side branches", results | {key: _pooled(pairs_) for key, pairs_ in found.items()})


def _path(model: str, kind: str) -> Path:
    return starter_bundle(kind) if model == STARTER else bundle(model, kind)


def _pooled(rounds: list[Paired]) -> dict[str, Any]:
    return {
        "ratio": round(statistics.median(r.ratio for r in rounds), 3),
        "of the rounds": [round(r.ratio, 3) for r in rounds],
        "a_ms": round(statistics.median(r.a.median_ms for r in rounds), 1),
        "b_ms": round(statistics.median(r.b.median_ms for r in rounds), 1),
    }


if __name__ == "__main__":
    main()
