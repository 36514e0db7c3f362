"""The calibration report: one HTML file that loads nothing, runs nothing, and can be mailed."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

from hhdeploy.calibration.judging.accuracy import TaskAccuracy
from hhdeploy.calibration.judging.findings import Changed, Findings
from hhdeploy.calibration.report.markup import Markup, document, html_table, remark, section, tag
from hhdeploy.calibration.report.pictures import png_of
from hhdeploy.calibration.report.plots import drop_intervals, site_bars

_NONE = "–"


def report_html(findings: Findings) -> str:
    """The whole document. Names of classes, files and adapters are escaped."""
    title = f"{findings.precision} calibration of {findings.bundle}"
    return document(
        title,
        tag("p", findings.verdict(), class_="verdict"),
        _warnings(findings.warnings),
        _accuracy(findings),
        _guard(findings),
        _sites(findings),
        _changed(findings),
        _cost(findings),
        _settings(findings),
    )


def _warnings(warnings: Sequence[str]) -> Markup | None:
    if not warnings:
        return None
    return tag("ul", *(tag("li", text) for text in warnings), class_="warnings")


def _accuracy(findings: Findings) -> Markup:
    accuracy = findings.accuracy
    rows = [_task_row(task) for task in accuracy.tasks]
    if len(accuracy.tasks) > 1:
        mean = (accuracy.float_top1, accuracy.quantised_top1, accuracy.drop)
        figures = [_number(value) for value in mean]
        error = _number(accuracy.standard_error)
        agreement = f"{100 * accuracy.agreement:.1f}"
        rows.append(("mean", accuracy.images, *figures, error, _NONE, agreement, _NONE))
    columns = (
        "task", "images", "float32 top-1 %", f"{findings.precision} top-1 %", "drop, points",
        "standard error", "lost / gained", "same answer %", "SQNR, dB",
    )  # fmt: skip
    labelled = accuracy.labelled
    return section(
        "Accuracy",
        remark(
            f"{accuracy.images} images from “{findings.exam.source}”, "
            f"{'none of them calibrated on' if accuracy.held_out else 'calibrated on'}; every "
            "batch mixes the tasks. Both graphs answer the same images, so the standard error is "
            "the paired one (McNemar): lost were right in float32 and are wrong now, gained the "
            "other way round. The mean is over tasks."
        ),
        html_table(columns, rows, last=len(accuracy.tasks) > 1),
        *_intervals(labelled),
    )


def _intervals(labelled: Sequence[TaskAccuracy]) -> tuple[Markup, ...]:
    if not labelled:
        return ()
    words = (
        "Points of top-1 lost, with the 95 % interval: 1.96 standard errors, or 3 / n where no "
        "answer turned right or wrong (the rule of three)."
    )
    return remark(words), drop_intervals(labelled)


def _task_row(task: TaskAccuracy) -> tuple[object, ...]:
    tops = task.scores or (_number(task.float_top1), _number(task.quantised_top1))
    return (
        task.task or "all",
        task.images,
        *tops,
        _number(task.drop),
        _number(task.standard_error),
        _NONE if task.lost is None else f"{task.lost} / {task.gained}",
        f"{100 * task.agreement:.1f}",
        f"{task.sqnr_db:.1f}",
    )


def _guard(findings: Findings) -> Markup | None:
    guarded = findings.guarded
    if guarded is None:
        return None
    trials = [
        (trial.kept, f"{trial.drop:.2f}", "within" if trial.passed else "too much")
        for trial in guarded.trials
    ]
    kept = ", ".join(guarded.kept) or "none"
    return section(
        "Guard",
        remark(
            f"At most {guarded.max_drop:g} points of mean top-1 may be lost. Kept in floating "
            f"point for it, the most sensitive first: {kept}."
        ),
        html_table(("sites kept", "drop, points", ""), trials),
    )


def _sites(findings: Findings) -> Markup:
    sites = findings.quantised.sites
    rows = [
        (
            name,
            "quantised" if info.quantised else "float",
            " × ".join(map(str, info.weight_shape)),
            _NONE if info.sqnr_db is None else f"{info.sqnr_db:.1f}",
            _number(findings.quantised.ranges.get(name), ".4g"),
            _number(info.activation_scale, ".3g"),
            "yes" if info.smoothed else "no",
            "yes" if info.bias_corrected else "no",
        )
        for name, info in sites.items()
    ]
    columns = (
        "site", "", "in × out", "SQNR, dB", "range", "step", "smoothed", "bias corrected",
    )  # fmt: skip
    others = ", ".join(findings.quantised.kept)
    return section(
        "Sites",
        remark(
            "Signal to noise of each Linear's output when it alone is quantised; hollow bars are "
            f"sites that stay in floating point ({len(findings.kept)} of {len(sites)}). Never "
            f"quantised: {others or 'nothing else'}."
        ),
        site_bars({name: info.sqnr_db for name, info in sites.items()}, set(findings.kept)),
        tag("details", tag("summary", f"All {len(sites)} sites"), html_table(columns, rows)),
    )


def _changed(findings: Findings) -> Markup | None:
    if not findings.changed:
        return None
    return section(
        "Images that quantisation moved most",
        remark("As the model sees them: resized and cropped. Answer and its probability."),
        tag("div", *(_figure(findings, image) for image in findings.changed), class_="images"),
    )


def _figure(findings: Findings, image: Changed) -> Markup:
    data = base64.b64encode(png_of(image.pixels)).decode("ascii")
    lines = [
        tag("b", image.task) if image.task else None,
        None if image.truth is None else tag("span", f"is {image.truth}"),
        tag("span", f"float32: {image.before.label} {image.before.probability:.0%}"),
        tag(
            "span",
            f"{findings.precision}: {image.after.label} {image.after.probability:.0%}",
            class_="other" if image.after.label != image.before.label else None,
        ),
    ]
    picture = tag("img", src=f"data:image/png;base64,{data}", alt=image.source, title=image.source)
    return tag("figure", picture, tag("figcaption", *lines))


def _cost(findings: Findings) -> Markup:
    base = findings.sizes["float32"]
    sizes = [
        (name, f"{size / 1e6:.2f}", f"{size / base:.2f}") for name, size in findings.sizes.items()
    ]
    times = [
        (
            batch,
            f"{pair.a.median_ms:.2f}",
            f"{pair.b.median_ms:.2f}",
            f"{pair.ratio:.2f} ({pair.low:.2f} to {pair.high:.2f})",
        )
        for batch, pair in findings.latency.items()
    ]
    return section(
        "Size and speed",
        html_table(("graph and weights", "MB", "of float32"), sizes),
        remark(
            f"Latency on {findings.machine}, {findings.device}: medians of runs in turn, and the "
            "ratio float32 / quantised with its quartiles; above 1 the quantised graph is faster. "
            "Other machines and engines differ: measure there."
        ),
        html_table(
            ("batch", "float32, ms", f"{findings.precision}, ms", "speed-up (quartiles)"), times
        ),
    )


def _settings(findings: Findings) -> Markup:
    quantised = findings.quantised
    rows = [
        ("backbone", findings.model),
        *((key, _plain(value)) for key, value in quantised.settings.to_json().items()),
        *((f"data: {key}", _plain(value)) for key, value in quantised.data.items()),
        *((f"version: {key}", value) for key, value in quantised.versions.items()),
    ]
    return section("Settings, data and versions", html_table(("", ""), rows, class_="settings"))


def _number(value: float | None, form: str = ".2f") -> str:
    return _NONE if value is None else format(value, form)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
