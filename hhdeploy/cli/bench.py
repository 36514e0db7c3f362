"""hhdeploy bench."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from hhdeploy.choices import Device, Precision
from hhdeploy.cli import ui
from hhdeploy.cli.bench_serve import bench_server, check_load_options, serve_options
from hhdeploy.cli.progress import steps

if TYPE_CHECKING:
    from hhdeploy.runtime import Session


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.option("--against", type=ui.SOURCE, help="Another bundle: interleaved, with the ratio.")
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8), show_default=True
)
@click.option("--runs", default=20, show_default=True, type=click.IntRange(2))
@ui.session_options
@serve_options
@ui.json_option
def command(
    bundle: Path,
    against: Path | None,
    batches: tuple[int, ...],
    runs: int,
    device: Device,
    precision: Precision,
    threads: int | None,
    cache_dir: Path | None,
    no_cache: bool,
    as_json: bool,
    serve: bool,
    **load: Any,
) -> None:
    """Measure the latency of BUNDLE on noise, every image of a batch with the next adapter.

    Medians after a warm-up. With --against the two bundles run in turn, so that a change of the
    machine's speed meets both; trust the ratio.

    With --serve a server is started on the loopback and tested under load, while adapters are
    added, replaced, removed and loaded again: every answer is compared with what that version of
    that adapter must say. Exit code 1 if any is wrong, lost, unanswered or refused unexpectedly.
    The fleet is BUNDLE's adapters and variants of them: same shapes, random values, made for the
    test in a temporary directory; they never enter BUNDLE.

    With --abuse nothing is changed meanwhile; 4 honest clients ask at half of what the server can
    answer, beside a process that attacks it for --seconds. Exit code 1 if an answer is wrong or
    lost, late, health is late, or memory stays: see docs/serving.md for the bounds.
    """
    check_load_options(serve, bool(load["abuse"]))
    cache = ui.check_cache_options(cache_dir, no_cache)
    if serve:
        click.get_current_context().exit(
            bench_server(
                bundle,
                device=device,
                precision=precision,
                threads=threads,
                as_json=as_json,
                options={**load, "cache_dir": cache_dir, "no_cache": no_cache},
            )
        )
    from hhdeploy.runtime import open_session
    from hhdeploy.timing import latency, paired

    def runner(session: Session, batch: int) -> Callable[[], object]:
        size = session.bundle.manifest.input_size
        images = np.random.default_rng(0).standard_normal((batch, *size), np.float32)
        entries = session.bundle.manifest.adapters
        names = [entries[i % len(entries)].name for i in range(batch)] if entries else None
        return lambda: session.run(images, names)

    def opened(path: Path) -> Session:
        return stack.enter_context(
            open_session(path, device=device, precision=precision, threads=threads, cache=cache)
        )

    rows: list[tuple[object, ...]] = []
    results: list[dict[str, object]] = []
    with ExitStack() as stack:
        ours = opened(bundle)
        other = None if against is None else opened(against)
        step = stack.enter_context(steps(as_json))
        for batch in batches:
            step(f"batch {batch}")
            run = runner(ours, batch)
            if other is None:
                found = latency(run, runs=runs)
                results.append({"batch": batch, **found.to_json()})
                rows.append(
                    (
                        batch,
                        f"{found.median_ms:.2f}",
                        f"{found.p90_ms:.2f}",
                        f"{1e3 * batch / found.median_ms:.1f}",
                    )
                )
            else:
                pair = paired(run, runner(other, batch), pairs=runs)
                results.append({"batch": batch, **pair.to_json()})
                rows.append(
                    (
                        batch,
                        f"{pair.a.median_ms:.2f}",
                        f"{pair.b.median_ms:.2f}",
                        f"{pair.ratio:.3f} ({pair.low:.3f} to {pair.high:.3f})",
                    )
                )
        name = ours.device
    if as_json:
        ui.print_json({"device": name, "precision": precision, "results": results})
        return
    columns = (
        ("batch", "median ms", "p90 ms", "images/s")
        if against is None
        else ("batch", f"{bundle.name} ms", f"{against.name} ms", "ratio (quartiles)")
    )
    ui.console().print(ui.table(f"{name}, {precision}", columns, rows))
