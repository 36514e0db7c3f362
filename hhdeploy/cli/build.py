"""hhdeploy build."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.choices import BACKENDS, Precision, TensorRt
from hhdeploy.cli import ui
from hhdeploy.cli.progress import phased_steps


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    required=True,
    help="tensorrt needs a GPU here; tensorrt-rtx does not.",
)
@ui.precision_option
@click.option("--min-batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--opt-batch", type=click.IntRange(1), help="To tune for; default: 8 or --max-batch.")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(1))
@click.option("--max-slots", type=click.IntRange(1), help="Rows of the largest bank; default 1024.")
@click.option(
    "--gpu-arch",
    "architectures",
    multiple=True,
    metavar="SM",
    help="tensorrt-rtx: sm75, sm80, sm86, sm89, sm120 ...; repeatable. Default: portable, Ampere+.",
)
@click.option("--bank-as-constant", is_flag=True, help="Bake the bank in: Triton keeps no inputs.")
@click.option(
    "--builder-optimization-level",
    type=click.IntRange(0, 5),
    help="tensorrt: 0 builds fastest, 5 runs fastest.",
)
@click.option(
    "--hardware-compatible", is_flag=True, help="tensorrt: one engine for Ampere and newer."
)
@click.option("--workspace-mib", type=click.IntRange(1), help="tensorrt: scratch memory.")
@click.option("--tf32", is_flag=True, help="float32: faster products that round to 10 bits.")
@ui.lock_timeout_option
@ui.json_option
def command(
    bundle: Path,
    backend: TensorRt,
    precision: Precision,
    min_batch: int,
    opt_batch: int | None,
    max_batch: int,
    max_slots: int | None,
    architectures: tuple[str, ...],
    bank_as_constant: bool,
    builder_optimization_level: int | None,
    hardware_compatible: bool,
    workspace_mib: int | None,
    tf32: bool,
    lock_timeout: float,
    as_json: bool,
) -> None:
    """Compile a graph of BUNDLE to a TensorRT engine, entered in its manifest.

    \b
    On any machine, for Ampere and newer RTX GPUs:
      hhdeploy build bundle/ --backend tensorrt-rtx --precision float16
    On the machine with the GPU:
      hhdeploy build bundle/ --backend tensorrt --precision float16 --max-batch 64
    """
    from hhdeploy.building import BuildOptions, build

    opt = min(max(8, min_batch), max_batch) if opt_batch is None else opt_batch
    options = BuildOptions(
        batch=(min_batch, opt, max_batch),
        max_slots=max_slots,
        architectures=architectures,
        bank_as_constant=bank_as_constant,
        hardware_compatible=hardware_compatible,
        optimization_level=builder_optimization_level,
        workspace_mib=workspace_mib,
        tf32=tf32,
    )
    with phased_steps(as_json) as (step, phase):
        entry = build(
            bundle,
            backend=backend,
            precision=precision,
            options=options,
            progress=step,
            phases=phase,
            lock_timeout=lock_timeout,
        )
    if as_json:
        ui.print_json(entry.to_json())
        return
    rows = [
        ("file", entry.file),
        ("backend", f"{entry.backend} {entry.version}"),
        ("runs on", ", ".join(entry.architectures) or "portable: Ampere and newer RTX GPUs"),
        ("batch", " / ".join(map(str, entry.batch))),
        ("bank rows", " / ".join(map(str, entry.slots)) if entry.slots else "no bank input"),
        ("size", f"{entry.bytes / 1e6:.1f} MB"),
        ("built in", f"{entry.build_seconds:.1f} s"),
    ]
    ui.console().print(ui.table(None, ("engine", ""), rows))
    ui.console().print(
        f"Run it where the GPU is: open_session({str(bundle)!r}, device={backend!r}, "
        f"precision={precision!r})",
        soft_wrap=True,
    )
