"""Does the cost of side branches depend on how many adapters the bank holds?

    python -m benchmarks.bench_slots [--pairs 30] [--device cpu]

The same small ViT with a bank of 2 slots and of up to 10,000, every image another adapter.
"""

from __future__ import annotations

import click
import numpy as np

from benchmarks.harness import THREADS, report
from benchmarks.models import bundle
from hhdeploy.runtime import open_session
from hhdeploy.timing import paired


@click.command()
@click.option("--model", default="vit_tiny_patch16_224", show_default=True)
@click.option("--pairs", default=30, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--slots", multiple=True, type=int, default=(64, 1000, 10_000), show_default=True)
def main(model: str, pairs: int, device: str, slots: tuple[int, ...]) -> None:
    """More slots against 2 slots, batch 8."""
    path = bundle(model, "branches", adapters=1)
    images = np.random.default_rng(0).standard_normal((8, 3, 224, 224), np.float32)
    results = {}
    with open_session(path, device=device, slots=2, threads=THREADS) as few:
        for count in slots:
            with open_session(path, device=device, slots=count, threads=THREADS) as many:
                names = _fill(many, count)
                results[f"{count} slots / 2 slots, batch 8"] = paired(
                    lambda s=many, n=names: s.run(images, n),
                    lambda: few.run(images, "task0"),
                    pairs=pairs,
                )
    report("slots", {"model": model, "device": device, **results})


def _fill(session: object, count: int) -> list[str]:
    """Copy the one adapter into every row, so that all memory is really there and in use."""
    from hhdeploy.runtime import Session

    assert isinstance(session, Session)
    bank = session.adapters
    source = session.bundle.path / "adapters" / "task0"
    spread = [f"copy{i}" for i in range(min(7, count - 2))]
    for name in spread:
        bank.add(name, source)
    bank.rows[1:] = bank.rows[1]
    return (["task0", *spread] * 8)[:8]


if __name__ == "__main__":
    main()
