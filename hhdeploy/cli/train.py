"""``hhdeploy train``: an image folder in, an adapter directory out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from hhdeploy.adapters.config import CLASSES, LABELS, PROBLEM_TYPES, VALUES
from hhdeploy.algebra import REFLECTIONS
from hhdeploy.backbones.sites import FORMS
from hhdeploy.choices import TORCH_DEVICES
from hhdeploy.cli import interrupted, ui
from hhdeploy.cli.naming import OneOf
from hhdeploy.cli.progress import error_console
from hhdeploy.errors import require
from hhdeploy.files.folders import find_splits, in_words
from hhdeploy.files.writing import placed_here

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.progress import Progress, TaskID

    from hhdeploy.training.settings import EpochReport, StepReport, TrainResult

_KINDS = {CLASSES: "classes", LABELS: "labels", VALUES: "values"}


@click.command(context_settings={"show_default": True})
@click.argument("out", type=ui.DIRECTORY, required=False)
@ui.model_option
@click.option(
    "--model-args",
    default="{}",
    callback=ui.json_object,
    metavar="JSON",
    help=f"{ui.MODEL_ARGS_HELP} Such as '{{\"img_size\": 224}}'.",
)
@ui.input_size_option
@click.option(
    "--preprocess",
    default="{}",
    callback=ui.json_object,
    metavar="JSON",
    help="Differences from the model's own image transform, such as '{\"crop_pct\": 1.0}'.",
)
@click.option("--checkpoint", type=ui.FILE, metavar="FILE", help="Backbone weights.")
@click.option(
    "--no-pretrained",
    "pretrained",
    flag_value=False,
    default=True,
    show_default=False,
    help="Random backbone weights from --seed, for tests.",
)
@click.option(
    "--data",
    type=ui.IMAGES,
    required=True,
    metavar="DIR",
    help="Images, as DIR/CLASS/image, or DIR/train and DIR/val of such; or a list, FILE.txt, of "
    "lines 'path label'.",
)
@click.option(
    "--val-data",
    type=ui.IMAGES,
    metavar="DIR",
    help="Validation images with the same class names, or a list of them.",
)
@click.option(
    "--val-fraction",
    type=ui.Number(0, 1, max_open=True),
    default=0.1,
    help="Share of every class held out when there is no --val-data.",
)
@click.option(
    "--labels",
    type=ui.FILE,
    metavar="FILE.csv",
    help="Instead of class folders: a line an image, its path below --data, then its classes "
    "with ';' between, or its values.",
)
@click.option(
    "--val-labels", type=ui.FILE, metavar="FILE.csv", help="The same of the validation images."
)
@click.option(
    "--problem-type",
    type=OneOf(PROBLEM_TYPES),
    help="What --labels holds. Default: numbers are values (columns of 0 and 1 are classes), "
    "several classes of an image are labels of their own.",
)
@click.option("--form", type=click.Choice(FORMS), default="additive", help="The adapter's form.")
@click.option("--reflection", type=click.Choice(REFLECTIONS), default="unnormalized")
@click.option("--r", type=click.IntRange(0), default=1, help="Rank of the low-rank term.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="q, k, v, proj, fc1, fc2 or a site's name; repeat it. Default: q k v proj (additive), "
    "proj fc2 (sequential).",
)
@click.option("--epochs", type=click.IntRange(1), default=10)
@click.option("--batch-size", type=click.IntRange(1), default=64)
@click.option("--lr", type=float, default=5e-3, help="Peak learning rate of AdamW.")
@click.option("--weight-decay", type=float, default=1e-4)
@click.option(
    "--warmup-epochs", type=click.IntRange(0), help="Default: a tenth of --epochs, at least 1."
)
@click.option("--seed", type=ui.SEED, default=0, help="Of split, weights, order, augmentation.")
@click.option(
    "--augment/--no-augment",
    default=True,
    help="Mild random resized crops and --flip; without, training images look as at inference.",
)
@click.option(
    "--flip/--no-flip", default=True, help="Mirror half of the images; not for text or digits."
)
@click.option(
    "--linear-probe",
    is_flag=True,
    help="Train the classifier alone. OUT is optional and receives metrics.json, no adapter.",
)
@click.option("--num-workers", type=click.IntRange(0), default=0, help="Threads that read images.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of torch.")
@click.option(
    "--device", type=click.Choice(TORCH_DEVICES), default="auto", help="auto: cuda, else cpu."
)
@click.option(
    "--cache-mb",
    type=click.IntRange(0),
    default=2048,
    help="MiB of decoded images kept in memory; the rest is read every epoch.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is complete.")
@click.option("--resume", is_flag=True, help="Continue the unfinished training of OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Fine-tune an adapter on an image folder and write it to OUT.

    The paper's recipe: AdamW, warm-up and cosine, cross-entropy, frozen backbone, new classifier.
    The weights of the last epoch are written. After an interrupt, the same command with --resume
    continues at the last whole epoch (kept in OUT.training) and gives, on a CPU, the same bits.
    """
    if options["linear_probe"]:
        unused = {"form", "reflection", "r", "targets"}
        ui.refuse_unused(unused, "does not go with --linear-probe, which adapts no site")
    if options["val_data"] is not None:
        ui.refuse_unused({"val_fraction"}, "does not go with --val-data: nothing is held out")
    elif options["val_labels"] is not None:
        ui.refuse_unused({"val_fraction"}, "does not go with --val-labels: nothing is held out")
    elif options["labels"] is None and (val := find_splits(options["data"]).val) is not None:
        ui.refuse_unused({"val_fraction"}, f"does not go with {val}, which validates")
    if not options["augment"]:
        ui.refuse_unused({"flip"}, "does not go with --no-augment, which leaves out the flip too")
    require("torch", "export", "training")
    from hhdeploy.training.recipe import TrainSettings, train
    from hhdeploy.training.state import StateDirectory

    settings = TrainSettings(**{**options, "targets": options["targets"] or None})
    with placed_here() as placed:
        try:
            with _Bar(error_console(), settings.epochs) as bar:
                result = train(settings, bar)
        except KeyboardInterrupt as interrupt:
            kept = settings.out is not None and StateDirectory.beside(settings.out).exists
            hint = "Continue with the same command and --resume." if kept else ""
            raise interrupted(interrupt, placed, hint) from interrupt
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else "\n".join(_summary(result)))


class _Bar:
    """Progress on stderr: a bar for the epoch that runs, a line for every one that is done."""

    def __init__(self, console: Console, epochs: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.epochs, self.console = epochs, console
        self.progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            Remaining(),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None
        self.accuracy = ""

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.progress.stop()

    def __call__(self, report: StepReport | EpochReport) -> None:
        from hhdeploy.training.settings import EpochReport

        if isinstance(report, EpochReport):
            self._epoch(report)
        else:
            self._step(report)

    def _step(self, report: StepReport) -> None:
        if self.task is None:
            title = f"epoch {report.epoch}/{self.epochs}"
            self.task = self.progress.add_task(title, total=report.steps, figures="")
        figures = f"loss {report.loss:.4f}  lr {report.lr:.2e}{self.accuracy}"
        self.progress.update(self.task, completed=report.step, figures=figures)

    def _epoch(self, report: EpochReport) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None
        self.accuracy = f"  val {report}"
        self.console.print(
            f"epoch {report.epoch}/{self.epochs}  loss {report.loss:.4f}  lr {report.lr:.2e}"
            f"{self.accuracy}"
        )


def _summary(result: TrainResult) -> Iterator[str]:
    """Lines for people: what was trained, last and best accuracy, what was written."""
    yield from result.notes
    kind = "linear probe" if result.linear_probe else f"adapter on {result.sites} sites"
    yield (
        f"{kind}: {result.parameters:,} values and a classifier of {result.head_parameters:,}, "
        f"{len(result.class_names)} {_KINDS[result.problem_type]}, {result.train_images} training "
        f"and {result.val_images} validation images, on {result.device}"
    )
    if not result.val_images:
        yield f"trained on {result.train_data}"
    elif result.train_data == result.val_data:
        yield f"trained on {result.train_data}, validated on the part of it that was held out"
    else:
        yield f"trained on {result.train_data}, validated on {result.val_data}"
    if result.unread:
        yield f"not read: {', '.join(map(str, result.unread))}"
    if result.skipped:
        yield f"left out: {in_words(result.skipped)}"
    if result.val_images_trained_on:
        yield (
            f"of the {result.val_images} validation images {result.val_images_trained_on} are "
            "trained on too, by content: the score is no score of new images"
        )
    if result.contrary_pictures:
        yield (
            f"{result.contrary_pictures} pictures are there again, by content, with another truth: "
            "one of them is wrong"
        )
    last, best = result.last, result.best
    if best is None and result.val_images:
        yield f"last epoch {last.epoch}: val {last}, no label is true of any validation image"
    elif best is None:
        yield f"last epoch {last.epoch}: no validation images"
    else:
        yield (f"last epoch {last.epoch}: val {last} (kept); best epoch {best.epoch}: {best}")
    if result.out is not None:
        yield f"wrote {result.out}"
