"""hhdeploy calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hhdeploy.calibration.settings import PRESETS, CalibrationSettings
from hhdeploy.choices import QUANTISED, Device, QuantisedPrecision
from hhdeploy.cli import ui
from hhdeploy.cli.progress import steps
from hhdeploy.cli.wording import as_command_line

if TYPE_CHECKING:
    from rich.console import Console

    from hhdeploy.calibration.judging.range_check import RangeCheck
    from hhdeploy.quantising import CalibrationResult

_SHOWN = 12
# What --check does not use.
_NOT_CHECKED = frozenset(
    "seed eval_data max_drop exclude preset report device threads cache_dir no_cache "
    "lock_timeout".split()
)


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.option(
    "--data",
    type=ui.IMAGES,
    required=True,
    help="DIR/CLASS/image, for side branches DIR/ADAPTER/CLASS/image; a list, FILE.txt or "
    "DIR/ADAPTER.txt, of lines 'path label'; or an .npz file.",
)
@click.option(
    "--precision",
    type=click.Choice(QUANTISED),
    default="int8",
    show_default=True,
)
@click.option(
    "--images",
    default=128,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="To calibrate on, of all adapters together.",
)
@click.option("--seed", default=0, show_default=True, type=ui.SEED, help="Of the choice of images.")
@click.option(
    "--eval-data", type=ui.IMAGES, help="Images to judge on; default: what calibration leaves over."
)
@click.option(
    "--max-drop",
    type=ui.Number(0),
    metavar="POINTS",
    help="Of mean top-1: keep the fewest sites in floating point that hold it.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Sites to keep in floating point, e.g. 'blocks.0.*' or '*.mlp.fc2'. Repeatable.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="none",
    show_default=True,
    help="; ".join(f"{name}: {kept}" for name, kept in PRESETS.items()) + ".",
)
@click.option("--report", type=ui.FILE, help="Write an HTML report: one file, opens anywhere.")
@ui.device_option("cpu", "To judge on; ")
@ui.threads_option
@ui.cache_options("calibrations")
@click.option(
    "--check",
    metavar="NAME",
    help="Calibrate nothing: does this adapter, added later, stay in the calibrated ranges?",
)
@ui.lock_timeout_option
@ui.json_option
def command(
    bundle: Path,
    data: Path,
    precision: QuantisedPrecision,
    images: int,
    seed: int,
    eval_data: Path | None,
    max_drop: float | None,
    exclude: tuple[str, ...],
    preset: str,
    report: Path | None,
    device: Device,
    threads: int | None,
    cache_dir: Path | None,
    no_cache: bool,
    check: str | None,
    lock_timeout: float,
    as_json: bool,
) -> None:
    """Quantise BUNDLE's float32 graph with images, judge it on others, add it to the bundle.

    An older graph of the same precision is replaced; engines built from it are refused then.

    \b
      hhdeploy calibrate bundle/ --data images/ --report report.html
      hhdeploy calibrate bundle/ --data images/ --max-drop 0.5
      hhdeploy calibrate bundle/ --data pets/ --check pets
    """
    if check is not None:
        ui.refuse_unused(_NOT_CHECKED, "does not go with --check, which calibrates nothing")
        from hhdeploy.calibration.judging.range_check import check_adapter

        with steps(as_json) as step:
            step(f"running images of {check} in float32")
            checked = check_adapter(bundle, check, data, precision=precision, images=images)
        _print_check(checked, as_json)
        return
    from hhdeploy.quantising import CalibrationOptions, calibrate_bundle

    settings = CalibrationSettings(
        precision=precision, exclude=exclude, preset=preset, images=images, seed=seed
    )
    cache = ui.check_cache_options(cache_dir, no_cache)
    options = CalibrationOptions(eval_data, max_drop, report, device, threads, cache, lock_timeout)
    with steps(as_json) as step:
        result = calibrate_bundle(bundle, data, settings, options, progress=step)
    if as_json:
        parity = [stage.to_json() for stage in result.parity]
        document = {"bundle": str(result.path), "file": result.file, "parity": parity}
        ui.print_json({**document, **result.findings.to_json()})
        return
    _print_result(ui.console(), result, report)


def _print_result(console: Console, result: CalibrationResult, report: Path | None) -> None:
    findings = result.findings
    accuracy, precision = findings.accuracy, findings.precision
    rows: list[tuple[object, ...]] = [
        (
            task.task or "all",
            task.images,
            *(task.scores or (_points(task.float_top1), _points(task.quantised_top1))),
            _points(task.drop),
            _points(task.standard_error),
            f"{task.agreement:.1%}",
            f"{task.sqnr_db:.1f}",
        )
        for task in accuracy.tasks
    ]
    if len(rows) > 1:
        mean = (accuracy.float_top1, accuracy.quantised_top1, accuracy.drop)
        figures = [_points(value) for value in (*mean, accuracy.standard_error)]
        rows.append(("mean", accuracy.images, *figures, f"{accuracy.agreement:.1%}", ""))
    columns = (
        "task", "images", "float32 %", f"{precision} %", "drop", "std. error", "same answer",
        "SQNR dB",
    )  # fmt: skip
    console.print(ui.table(f"Top-1 of float32 and {precision}", columns, rows))
    console.print(findings.verdict(), markup=False, soft_wrap=True)
    sizes, quick = findings.sizes, findings.latency
    console.print(
        f"Size {sizes['float32'] / 1e6:.1f} MB to {sizes[precision] / 1e6:.1f} MB. Speed-up here, "
        + ", ".join(
            f"batch {b}: {p.ratio:.2f} ({p.low:.2f}–{p.high:.2f})" for b, p in quick.items()
        )
        + f" ({findings.device}).",
        markup=False,
        soft_wrap=True,
    )
    for warning in findings.warnings:
        console.print(
            f"Warning: {as_command_line(warning)}", style="yellow", markup=False, soft_wrap=True
        )
    console.print(f"Added {result.file} to {result.path}", markup=False, soft_wrap=True)
    if report is not None:
        console.print(f"Report: {report}", markup=False, soft_wrap=True)


def _print_check(check: RangeCheck, as_json: bool) -> None:
    if as_json:
        ui.print_json(check.to_json())
        return
    rows = [
        (e.site, f"{e.calibrated:.4g}", f"{e.found:.4g}", f"{e.ratio:.2f}", f"{e.clipped:.4%}")
        for e in check.excess[:_SHOWN]
    ]
    console = ui.console()
    if rows:
        columns = ("site", "range", "found", "ratio", "values clipped")
        title = f"{check.images} images against the {check.precision} ranges"
        console.print(ui.table(title, columns, rows))
        if len(check.excess) > _SHOWN:
            console.print(f"and {len(check.excess) - _SHOWN} more sites (--json shows all)")
    console.print(as_command_line(check.advice()), markup=False, soft_wrap=True)


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
