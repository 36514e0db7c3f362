"""Folding the 48 sites of ViT-B/16: the thin product, dense products, and bare memory traffic.

    python -m benchmarks.bench_fold [--pairs 9]

All in float64 on the same weights: `fold_additive` against H_u D H_v with dense H (what the
equations read), and against reading and writing the weights once (the floor). The sequential form,
`fold_sequential`, against the same floor; the control is the floor against itself. What of it is
due to float64: the weights converted and converted back, and the products, both in memory that is
there already. PyTorch takes two threads, the floor, which is NumPy's, one.
"""

from __future__ import annotations

import click
import numpy as np
import torch

from benchmarks.harness import THREADS, report
from hhdeploy.algebra import SiteDelta, householder_delta
from hhdeploy.exporters.fold import Scratch, add_product, fold_additive, fold_sequential
from hhdeploy.timing import paired

SITES, DIM, RANK = 48, 768, 1


@click.command()
@click.option("--pairs", default=9, show_default=True)
def main(pairs: int) -> None:
    """Fold against dense products, and against one pass over the weights."""
    torch.set_num_threads(THREADS)
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

    scratch = Scratch()  # one for a model, as an export has it

    def thin() -> None:
        for weight, site, target in zip(weights, tensors, out, strict=True):
            fold_additive(weight, delta_of(site), target, scratch=scratch)

    def sequential() -> None:
        for weight, site, target in zip(weights, tensors, out, strict=True):
            fold_sequential(weight, delta_of(site), target, scratch=scratch)

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

    wide = torch.empty(DIM, DIM, dtype=torch.float64)
    deltas = [delta_of(site) for site in tensors]

    def converted() -> None:
        for weight, target in zip(weights, out, strict=True):
            wide.copy_(torch.from_numpy(weight))
            torch.from_numpy(target).copy_(wide)

    def products() -> None:
        for delta in deltas:
            add_product(wide, torch.from_numpy(delta.left), torch.from_numpy(delta.right))

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
