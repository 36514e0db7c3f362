"""hhdeploy demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from hhdeploy.cli import ui
from hhdeploy.cli.parity_table import parity_table
from hhdeploy.cli.progress import steps

if TYPE_CHECKING:
    from rich.console import Console

    from hhdeploy.cli.starter import DemoResult, Starter

_STARTER = Path(__file__).resolve().parents[2] / "examples" / "starter"
_SHOWN = 8


@click.command()
@click.option(
    "--examples", type=ui.DIRECTORY, default=_STARTER, help="Directory of the starter models."
)
@click.option("--out", type=ui.DIRECTORY, default=Path("demo-out"), show_default=True)
@ui.threads_option
def command(examples: Path, out: Path, threads: int | None) -> None:
    """Run everything once on the starter models: real images, four tasks, one backbone.

    Folds one adapter, keeps all four as side branches of one graph, verifies both against the
    training-time model, classifies batches that mix all tasks, and measures what the side
    branches cost. Takes about a minute; nothing is downloaded.
    """
    from hhdeploy.cli.starter import Starter, run_demo

    starter = Starter.read(examples)
    with steps(quiet=False) as step:
        step("importing torch and timm")
        result = run_demo(starter, out, threads, step)
    console = ui.console()
    _print_parity(console, result)
    _print_batch(console, result)
    _print_accuracy(console, starter, result)
    _print_cost(console, result)
    _print_next(console, starter, result)


def _print_parity(console: Console, result: DemoResult) -> None:
    for title, export in (("folded", result.folded), ("side branches", result.branches)):
        assert export.parity is not None
        console.print(Text.assemble((f"\n{title}", "bold"), f": {export.path}"))
        console.print(parity_table(export.parity))


def _print_batch(console: Console, result: DemoResult) -> None:
    rows = [
        (
            a.sample.task,
            a.sample.truth,
            f"{a.predicted} {a.probability:.0%}",
            ui.verdict(a.right, "right", "wrong"),
        )
        for a in result.answers[:_SHOWN]
    ]
    console.print()
    console.print(
        ui.table(
            f"The first {_SHOWN} images of one batch, each with its own adapter",
            ("adapter", "true class", "answer", ""),
            rows,
        )
    )


def _print_accuracy(console: Console, starter: Starter, result: DemoResult) -> None:
    rows = []
    for task in starter.tasks:
        right, total = result.accuracy(task)
        rows.append((task, f"{right}/{total}", f"{right / total:.1%}"))
    console.print()
    console.print(
        ui.table(
            "Held-out test images, mixed batches of 16, ONNX Runtime",
            ("adapter", "right", "top-1"),
            rows,
        )
    )


def _print_cost(console: Console, result: DemoResult) -> None:
    rows = [
        (
            f"batch {batch}",
            f"{pair.a.median_ms:.2f}",
            f"{pair.b.median_ms:.2f}",
            f"{pair.ratio:.2f} ({pair.low:.2f} to {pair.high:.2f})",
        )
        for batch, pair in result.cost.items()
    ]
    title = ui.titled(
        "Cost of side branches against the folded graph",
        "on this very small model; on ViT-B/16 see docs/measured.md",
    )
    console.print()
    columns = ("", "branches ms", "folded ms", "ratio (quartiles)")
    console.print(ui.table(title, columns, rows))


def _print_next(console: Console, starter: Starter, result: DemoResult) -> None:
    bundle, task = ui.quoted(result.branches.path), starter.tasks[0]
    image = ui.quoted(_relative(next(iter(starter.images(task).values()))[0]))
    adapter = ui.quoted(_relative(starter.adapter(task)))
    console.print("\nTry next", style="bold")
    for line in (
        f"hhdeploy serve {bundle}    # then open http://127.0.0.1:8000",
        f"hhdeploy predict {bundle} {image}",
        f"hhdeploy adapter inspect {adapter}",
        f"hhdeploy adapter add {bundle} again={adapter}",
        f"hhdeploy verify {bundle} --device openvino --precision float32",
        f"hhdeploy bench {bundle} --against {ui.quoted(result.folded.path)}",
        "hhdeploy train -h",
    ):
        console.print(f"  {line}")


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
