"""``hhdeploy adapter inspect --html``: one page about adapters, in one file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.spectra import SiteSpectrum, distance, spectra
from hhdeploy.algebra import Array
from hhdeploy.calibration.report.markup import (
    Markup,
    document,
    html_table,
    join,
    remark,
    section,
    tag,
)
from hhdeploy.calibration.report.plots import LABELS, WIDTH, split_site, svg, text

_BAND, _TOP = 62, 16  # height of one kind's band, and the room above what is drawn in it
_POINTS = 40  # of a curve
_CELL = 46  # of the heat map, at most
_ROOM = 30  # a cell so wide has room for its figure


def adapter_page(
    adapters: Mapping[str, Adapter], progress: Callable[[str], None] = lambda step: None
) -> str:
    """The whole document about some adapters of one backbone. Names are escaped.

    Args:
        adapters: name -> adapter; with two or more, their distances are shown too.
        progress: called with a few words at each step: the singular values take a while.

    Raises:
        AdapterError: the adapters belong to different backbones.
    """
    distances = _distances(adapters)
    found = {}
    for name, adapter in adapters.items():
        progress(f"singular values of {len(adapter.sites)} changes of {name}")
        found[name] = spectra(adapter)
    every = [site for sites in found.values() for site in sites]
    # An adapter that was never trained changes nothing: all its ranks are 0.
    top = max((site.effective_rank for site in every), default=0.0) or 1.0
    first = next(iter(adapters))
    title = f"Adapter {first}" if len(adapters) == 1 else f"{len(adapters)} adapters"
    return document(
        title,
        tag("p", _verdict(adapters, every), class_="verdict"),
        distances,
        *(_adapter(name, adapters[name], sites, top) for name, sites in found.items()),
    )


def _verdict(adapters: Mapping[str, Adapter], sites: Sequence[SiteSpectrum]) -> str:
    models = ", ".join(dict.fromkeys(a.config.base_model for a in adapters.values()))
    if not sites:
        return f"Of {models}. No site has a matrix, so there are no spectra."
    low = min(sites, key=lambda site: site.effective_rank)
    high = max(sites, key=lambda site: site.effective_rank)
    return (
        f"Of {models}. Effective ranks run from {low.effective_rank:.1f} ({low.site}) to "
        f"{high.effective_rank:.1f} ({high.site})."
    )


def _adapter(name: str, adapter: Adapter, sites: Sequence[SiteSpectrum], top: float) -> Markup:
    head = adapter.head.weight.size + adapter.head.bias.size if adapter.head else 0
    facts = (
        f"{adapter.form}, {adapter.config.reflection}; {adapter.parameters:,} parameters in "
        f"{len(adapter.sites)} sites, {head:,} in the classifier."
    )
    if not sites:
        return section(name, remark(facts))
    return section(
        name,
        remark(facts),
        _heading("Effective rank, layer by layer"),
        remark(
            "exp of the entropy of a change's normalised singular values: near 1 where one "
            "direction does it all, larger where many matter. One scale for all adapters here."
        ),
        _grid(sites, "Effective rank of every site", f"{top:.3g}", _rank_bar(top)),
        _heading("Spectra"),
        remark(
            "Of every site, each divided by its own largest: the magnitudes of the diagonal d "
            "(filled), and the singular values of the whole change (line), the largest first. "
            "A flat curve uses all directions, a steep one few."
        ),
        _grid(sites, "Spectra of d and of the change, by site", "largest", _curves),
        _heading("Diagonal against low rank"),
        remark(
            "The diagonal's share of both parts' squared norms, filled from below; the rest is "
            "the low-rank part with the reflections."
        ),
        _grid(sites, "Share of the diagonal, by site", "100 %", _share_bar),
        tag("details", tag("summary", f"All {len(sites)} sites"), _table(sites)),
    )


def _heading(words: str) -> Markup:
    return tag("h3", words)


def _table(sites: Sequence[SiteSpectrum]) -> Markup:
    columns = (
        "site", "effective rank", "largest singular value", "largest d", "diagonal %", "parameters",
    )  # fmt: skip
    rows = [
        (
            site.site,
            f"{site.effective_rank:.2f}",
            f"{site.singular.max(initial=0.0):.3g}",
            f"{site.diagonal.max(initial=0.0):.3g}",
            "–" if site.diagonal_share is None else f"{100 * site.diagonal_share:.0f}",
            f"{site.parameters:,}",
        )
        for site in sites
    ]
    return html_table(columns, rows)


# Draws one site into its place: left and right edge, base line, height.
_Draw = Callable[[SiteSpectrum, float, float, float, float], Markup]


def _grid(sites: Sequence[SiteSpectrum], label: str, top: str, draw: _Draw) -> Markup:
    """One band a kind of site, one place along it a block: what varies by layer is seen at once."""
    places = {site.site: split_site(site.site) for site in sites}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    step = (WIDTH - LABELS) / len(blocks)
    parts = []
    for index, kind in enumerate(kinds):
        base = (index + 1) * _BAND
        parts += [
            tag("line", x1=LABELS, x2=WIDTH, y1=base, y2=base, class_="axis"),
            text(kind, LABELS - 10, base - 18, anchor="end"),
            text(top, LABELS - 10, base - _BAND + _TOP + 4, anchor="end", class_="small"),
        ]
    for site in sites:
        block, kind = places[site.site]
        left = LABELS + blocks.index(block) * step
        base, gap = (kinds.index(kind) + 1) * _BAND, min(0.12 * step, 4)
        parts.append(draw(site, left + gap, left + step - gap, base, _BAND - _TOP))
    bottom = len(kinds) * _BAND
    every = max(1, math.ceil(len(blocks) / 26))
    for index in range(0, len(blocks), every):
        words = blocks[index].rpartition(".")[2] or "–"
        parts.append(text(words, LABELS + (index + 0.5) * step, bottom + 16, anchor="middle"))
    parts.append(text("block", LABELS - 10, bottom + 16, anchor="end"))
    return svg(bottom + 24, label, parts)


def _rank_bar(top: float) -> _Draw:
    def draw(site: SiteSpectrum, left: float, right: float, base: float, height: float) -> Markup:
        rank = site.effective_rank
        bar = _bar(site, left, right, base, height * rank / top, f"effective rank {rank:.2f}")
        if right - left < 16:
            return bar
        above = base - height * rank / top - 3
        figure = text(f"{rank:.1f}", (left + right) / 2, above, anchor="middle", class_="small")
        return join([bar, figure])

    return draw


def _share_bar(site: SiteSpectrum, left: float, right: float, base: float, height: float) -> Markup:
    if site.diagonal_share is None:
        return join([])
    words = f"diagonal {site.diagonal_share:.0%}"
    frame = tag(
        "rect", x=f"{left:.1f}", y=f"{base - height:.1f}", width=f"{right - left:.1f}",
        height=f"{height:.1f}", class_="rest",
    )  # fmt: skip
    return join([frame, _bar(site, left, right, base, height * site.diagonal_share, words)])


def _bar(
    site: SiteSpectrum, left: float, right: float, base: float, tall: float, words: str
) -> Markup:
    return tag(
        "rect",
        tag("title", f"{site.site}: {words}"),
        x=f"{left:.1f}",
        y=f"{base - tall:.1f}",
        width=f"{right - left:.1f}",
        height=f"{tall:.1f}",
        class_="bar",
    )


def _curves(site: SiteSpectrum, left: float, right: float, base: float, height: float) -> Markup:
    def points(values: Array) -> str:
        chosen = values[np.linspace(0, len(values) - 1, min(_POINTS, len(values))).astype(int)]
        largest = float(values.max(initial=0.0)) or 1.0
        xs = np.linspace(left, right, len(chosen))
        ys = base - height * chosen / largest
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))

    parts = [
        tag("polyline", points=points(site.singular), class_="line"),
        tag("title", f"{site.site}: largest singular value {site.singular.max(initial=0.0):.3g}"),
    ]
    if site.diagonal.any():
        area = f"{left:.1f},{base:.1f} {points(site.diagonal)} {right:.1f},{base:.1f}"
        parts.insert(0, tag("polygon", points=area, class_="area"))
    return tag("g", *parts)


def _distances(adapters: Mapping[str, Adapter]) -> Markup | None:
    if len(adapters) < 2:
        return None
    names = list(adapters)
    apart = {
        frozenset(pair): distance(*map(adapters.__getitem__, pair))
        for pair in combinations(names, 2)
    }
    cell = min(_CELL, (WIDTH - LABELS) / len(names))
    parts = []
    for row, name in enumerate(names):
        y = row * cell
        parts.append(text(_short(name), LABELS - 10, y + cell / 2 + 4, anchor="end"))
        for column, other in enumerate(names):
            far = apart.get(frozenset((name, other)), 0.0)
            words = f"{name} and {other}: {far:.3g}"
            parts.append(_heat(words, far, LABELS + column * cell, y, cell))
    bottom = len(names) * cell
    for column in range(len(names)):
        x = LABELS + (column + 0.5) * cell
        parts.append(text(str(column + 1), x, bottom + 14, anchor="middle"))
    return section(
        "Distances",
        remark(
            "The norm of two changes' difference over the larger norm, all sites together: 0 for "
            "the same, 1.4 for changes of one size with nothing in common, 2 for opposite ones. "
            "Columns are in the order of the rows. Classifiers do not count."
        ),
        svg(round(bottom) + 20, "Distances between the adapters", parts),
    )


def _heat(words: str, apart: float, x: float, y: float, cell: float) -> Markup:
    square = tag(
        "rect",
        tag("title", words),
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        width=f"{cell - 2:.1f}",
        height=f"{cell - 2:.1f}",
        class_="bar",
        fill_opacity=f"{min(apart, 2.0) / 2.0:.2f}",
    )
    if cell < _ROOM:
        return square
    middle = x + cell / 2 - 1
    figure = text(f"{apart:.2f}", middle, y + cell / 2 + 4, anchor="middle", class_="figure")
    return join([square, figure])


def _short(name: str) -> str:
    """The end of a name, which tells adapters apart, as far as there is room."""
    return name if len(name) <= 18 else f"…{name[-17:]}"
