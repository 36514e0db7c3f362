"""Folding the 48 sites of ViT-B/16: the thin product, dense products, and bare memory traffic.

    python -m benchmarks.bench_fold [--pairs 9]

All in float64 on the same weights: `fold_additive` against H_u D H_v with dense H (what the
equations read), and against reading and writing the weights once (the floor). The sequential form,
`fold_sequential`, against the same floor; the control is the floor against itself. What of it is
due to float64: the weights converted and converted back, and the products, block by block.
"""

from __future__ import annotations

import click
import numpy as np

from benchmarks.harness import report
from hhdeploy.algebra import SiteDelta, fold_additive, fold_sequential, householder_delta
from hhdeploy.timing import paired

SITES, DIM, RANK = 48, 768, 1
# Rows of a block, as the fold takes them.
ROWS = 256


@click.command()
@click.option("--pairs", default=9, show_default=True)
def main(pairs: int) -> None:
    """Fold against dense products, and against one pass over the weights."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((DIM, DIM), np.float32) for _ in range(SITES)]
    out = [np.empty_like(w) for w in weights]
    tensors = [
        {
            "u": rng.standard_normal(DIM) * 0.05,
            "v": rng.standard_normal(DIM) * 0.05,
            "d": rng.standard_normal(DIM) * 0.05,
            "lora_a": rng.standard_normal((RANK, DIM)) * 0.05,
            "lora_b": rng.standard_normal((DIM, RANK)) * 0.05,
        }
        for _ in range(SITES)
    ]

    def delta_of(site: dict[str, np.ndarray]) -> SiteDelta:
        return householder_delta(**site, reflection="unnormalized")

    def thin() -> None:
        for weight, site, target in zip(weights, tensors, out, strict=True):
            fold_additive(weight, delta_of(site), target)

    def sequential() -> None:
        for weight, site, target in zip(weights, tensors, out, strict=True):
            fold_sequential(weight, delta_of(site), target)

    def dense() -> None:
        for weight, site, target in zip(weights, tensors, out, strict=True):
            identity = np.eye(DIM)
            h_u = identity - np.outer(site["u"], site["u"])
            h_v = identity - np.outer(site["v"], site["v"])
            delta = h_u @ np.diag(site["d"]) @ h_v + site["lora_b"] @ site["lora_a"]
            target[:] = weight + delta

    def once() -> None:
        for weight, target in zip(weights, out, strict=True):
            np.add(weight, np.float32(1.0), out=target)

    block = np.empty((ROWS, DIM))
    deltas = [delta_of(site) for site in tensors]

    def converted() -> None:
        for weight, target in zip(weights, out, strict=True):
            for first in range(0, DIM, ROWS):
                block[:] = weight[first : first + ROWS]
                target[first : first + ROWS] = block

    def products() -> None:
        for delta in deltas:
            for first in range(0, DIM, ROWS):
                np.matmul(delta.left[first : first + ROWS], delta.right, out=block)

    thin()
    folded = [t.copy() for t in out]
    dense()
    largest = max(float(np.abs(a - b).max()) for a, b in zip(folded, out, strict=True))
    report(
        "fold",
        {
            "sites": f"{SITES} of {DIM} x {DIM}, rank 2 + {RANK}",
            "largest difference of the results": largest,
            "dense products / fold": paired(dense, thin, pairs=pairs),
            "fold / reading and writing once": paired(thin, once, pairs=pairs),
            "sequential fold / reading and writing once": paired(sequential, once, pairs=pairs),
            "to float64 and back / reading and writing once": paired(converted, once, pairs=pairs),
            "products alone / reading and writing once": paired(products, once, pairs=pairs),
            "control: reading and writing once, twice": paired(once, once, pairs=pairs),
        },
    )


if __name__ == "__main__":
    main()
