"""Cost of side branches: bare backbone, one adapter folded, four adapters side by side.

python -m benchmarks.bench_branches [--model vit_base_patch16_224] [--pairs 20]
                                    [--device cpu|openvino] [--batch 1 --batch 8]
"""

from __future__ import annotations

import click
import numpy as np

from benchmarks.harness import THREADS, report
from benchmarks.models import bundle
from hhdeploy.runtime import open_session
from hhdeploy.timing import paired


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--pairs", default=20, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), show_default=True)
def main(model: str, pairs: int, device: str, batches: tuple[int, ...]) -> None:
    """Folded against backbone, and side branches against folded."""
    results = {}
    with (
        open_session(bundle(model, "backbone"), device=device, threads=THREADS) as plain,
        open_session(bundle(model, "folded"), device=device, threads=THREADS) as folded,
        open_session(bundle(model, "branches"), device=device, threads=THREADS) as branches,
    ):
        names = list(branches.adapters)
        for batch in batches:
            rng = np.random.default_rng(0)
            size = branches.bundle.manifest.input_size
            images = rng.standard_normal((batch, *size), np.float32)
            mixed = [names[i % len(names)] for i in range(batch)]
            results[f"folded / backbone, batch {batch}"] = paired(
                lambda x=images: folded.run(x), lambda x=images: plain.run(x), pairs=pairs
            )
            results[f"side branches / folded, batch {batch}"] = paired(
                lambda x=images, n=mixed: branches.run(x, n),
                lambda x=images: folded.run(x),
                pairs=pairs,
            )
    report("side branches", {"model": model, "device": device, **results})


if __name__ == "__main__":
    main()
