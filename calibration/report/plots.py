"""The report's two plots, as inline SVG that takes its colours from the page."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from hhdeploy.calibration.judging.accuracy import TaskAccuracy
from hhdeploy.calibration.report.markup import Markup, join, tag

LABELS, WIDTH = 130, 900  # the drawing; the page scales it
_BAND, _BAR_TOP = 70, 18  # height of one kind's band of bars, and the room above its bars
_ROOM = 14  # a bar so wide has room for its figure
_ROW = 26  # height of one task's line
# The block is everything up to the last number of a path: layers.0.blocks.1 | mlp.fc1
_BLOCK = re.compile(r"^(?P<block>.*\.\d+)\.(?P<kind>.+)$")


def split_site(name: str) -> tuple[str, str]:
    """(block, kind) of a site's name; a name without a number is all kind.

    >>> split_site("layers.0.blocks.1.attn.qkv.q")
    ('layers.0.blocks.1', 'attn.qkv.q')
    """
    match = _BLOCK.match(name)
    return (match["block"], match["kind"]) if match else ("", name)


def site_bars(sqnr_db: Mapping[str, float | None], kept: Collection[str]) -> Markup:
    """SQNR of every site: one band of bars a kind, one place along it a block.

    Args:
        sqnr_db: site -> dB, None if it was not measured; in execution order.
        kept: sites that stay in floating point; drawn hollow.
    """
    places = {name: split_site(name) for name in sqnr_db}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    finite = [db for db in sqnr_db.values() if db is not None and math.isfinite(db)]
    top = max(10, 10 * math.ceil(max(finite, default=10) / 10))
    step = (WIDTH - LABELS) / len(blocks)
    parts = [_band(index, kind, top) for index, kind in enumerate(kinds)]
    for name, (block, kind) in places.items():
        db = sqnr_db[name]
        if db is None:
            continue
        x = LABELS + (blocks.index(block) + 0.5) * step
        shown = min(top, max(0.0, db))
        parts.append(
            _bar(name, db, name in kept, x, min(0.7 * step, 24), kinds.index(kind), shown / top)
        )
    bottom = len(kinds) * _BAND
    every = max(1, math.ceil(len(blocks) / 26))
    for index in range(0, len(blocks), every):
        label = blocks[index].rpartition(".")[2] if len(blocks) > 1 else blocks[index]
        x = LABELS + (index + 0.5) * step
        parts.append(text(label, x, bottom + 16, anchor="middle"))
    parts.append(text("block", LABELS - 10, bottom + 16, anchor="end"))
    return svg(bottom + 24, "Signal to noise of every site, quantised alone", parts)


def drop_intervals(tasks: Sequence[TaskAccuracy]) -> Markup:
    """Every labelled task's drop of top-1 and its 95 % interval, in points."""
    ends = [_interval(task) for task in tasks]
    low, high = min(-1.0, *(a for a, _ in ends)), max(1.0, *(b for _, b in ends))
    scale = (WIDTH - LABELS - 20) / (high - low)

    def place(points: float) -> float:
        return LABELS + 10 + (points - low) * scale

    bottom = len(tasks) * _ROW
    parts = [tag("line", x1=place(0), x2=place(0), y1=0, y2=bottom, class_="zero")]
    for index, (task, (left, right)) in enumerate(zip(tasks, ends, strict=True)):
        y = (index + 0.5) * _ROW
        title = tag("title", f"{task.task}: {task.drop:.2f} points, {left:.2f} to {right:.2f}")
        parts += [
            text(task.task or "all", LABELS - 10, y + 4, anchor="end"),
            tag("line", x1=_r(place(left)), x2=_r(place(right)), y1=y, y2=y, class_="interval"),
            tag("circle", title, cx=_r(place(task.drop or 0.0)), cy=y, r=5, class_="bar"),
        ]
    for points in _ticks(low, high):
        parts.append(text(f"{points:g}", place(points), bottom + 16, anchor="middle"))
    parts.append(text("points lost", LABELS - 10, bottom + 16, anchor="end"))
    return svg(bottom + 24, "Drop of top-1 with its 95 % interval", parts)


def _interval(task: TaskAccuracy) -> tuple[float, float]:
    """Symmetric about the drop, as `TaskAccuracy.at_most` has its upper end."""
    drop, high = task.drop or 0.0, task.at_most or 0.0
    return 2 * drop - high, high


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about six."""
    size = 10 ** math.floor(math.log10(high - low))
    step = next(size * m for m in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (size * m) <= 8)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _band(index: int, kind: str, top: float) -> Markup:
    """Label, base line and top line of one kind's bars."""
    base, ceiling = (index + 1) * _BAND, index * _BAND + _BAR_TOP
    return join(
        [
            tag("line", x1=LABELS, x2=WIDTH, y1=ceiling, y2=ceiling, class_="grid"),
            tag("line", x1=LABELS, x2=WIDTH, y1=base, y2=base, class_="axis"),
            text(kind, LABELS - 10, base - 18, anchor="end"),
            text(f"{top:g} dB", LABELS - 10, ceiling + 4, anchor="end", class_="small"),
        ]
    )


def _bar(
    name: str, db: float, kept: bool, middle: float, width: float, band: int, height: float
) -> Markup:
    """A bar about ``middle``, ``height`` of the band high, its figure above it if there is room."""
    base, tall = (band + 1) * _BAND, height * (_BAND - _BAR_TOP)
    title = tag("title", f"{name}: {db:.1f} dB{', kept in floating point' if kept else ''}")
    bar = tag(
        "rect",
        title,
        x=_r(middle - width / 2),
        y=_r(base - tall),
        width=_r(width),
        height=_r(tall),
        class_="bar kept" if kept else "bar",
    )
    if width < _ROOM:
        return bar
    return join([bar, text(f"{db:.0f}", middle, base - tall - 3, anchor="middle", class_="small")])


def text(words: str, x: float, y: float, *, anchor: str, class_: str | None = None) -> Markup:
    """Words at a place of the drawing; ``anchor`` is start, middle or end."""
    return tag("text", words, x=_r(x), y=_r(y), text_anchor=anchor, class_=class_)


def svg(height: float, label: str, parts: list[Markup]) -> Markup:
    """A drawing `WIDTH` wide that scrolls by itself on narrow pages; ``label`` is read aloud."""
    body = join(parts)
    box = f"0 0 {WIDTH} {height}"
    return tag("div", tag("svg", body, viewBox=box, role="img", aria_label=label), class_="scroll")


def _r(value: float) -> str:
    return f"{value:.1f}"
