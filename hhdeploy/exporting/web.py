"""``hhdeploy web``: a bundle as a static page that runs it in the browser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST, Manifest
from hhdeploy.bundle.reading import graph_hint
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import Precision, listener, yes_or_no
from hhdeploy.errors import BundleError, PlanError, as_code
from hhdeploy.exporting.javascript import page_code
from hhdeploy.files.directories import Replaceable, atomic_directory, check_target, strangers
from hhdeploy.files.plain import read_plain
from hhdeploy.files.writing import as_path, json_bytes, sha256_of_bytes, write_bytes
from hhdeploy.packages import own_version
from hhdeploy.preprocess import GRAPH_FILTERS, PICTURE_CHANNELS, Preprocess
from hhdeploy.repositories.graphs import checked_graph

FACTS: Final = "page.json"
_SERVICE: Final = "sw.js"
_BUNDLE: Final = "bundle"
# What ONNX Runtime Web computes; the one that a bundle is asked for first, first.
RUNNABLE: Final[tuple[Precision, ...]] = ("int8", "float32", "float16")
# Fetched only where the browser offers WebGPU.
_WEBGPU: Final = "jspi"


@dataclass(frozen=True)
class WebPage:
    """What was written.

    Attributes:
        path: the folder, absolute.
        precision: of the graph that the page runs.
        adapters: that answer.
        files: path in the folder -> bytes.
    """

    path: Path
    precision: Precision
    adapters: tuple[str, ...]
    files: Mapping[str, int]

    @property
    def sent(self) -> int:
        """Bytes that a first visit loads where there is no WebGPU, uncompressed."""
        return sum(size for path, size in self.files.items() if _WEBGPU not in path)


def _foreign(path: Path) -> str | None:
    """Why a directory is not a page that `write_web_page` wrote, or None."""
    try:
        known = set(json.loads(read_plain(path / FACTS))["sizes"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return f"it has no {FACTS} that lists its files"
    return strangers(path, {*known, FACTS, _SERVICE}, "the page does not have")


_PAGE = Replaceable("a page", _foreign)


def write_web_page(
    path: str | Path,
    out: str | Path,
    *,
    precision: Precision | None = None,
    title: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> WebPage:
    """Write a folder that any web server of files makes a page of: pictures in, answers out.

    The model runs in the browser, on ONNX Runtime Web; pictures stay there. The page is for the
    adapters that the bundle has now: write it again after adding or removing some.

    Args:
        path: the bundle.
        out: the folder.
        precision: of the graph; None: ``int8`` where the bundle has it, else ``float32``, else
            ``float16``.
        title: of the page; None: the bundle's name.
        overwrite: replace a page that is there.
        progress: called with a few words at each step.

    Raises:
        BundleError: no such graph, one that takes or gives others than the manifest tells, no
            graphs that take pictures, or a damaged file.
        PlanError: a precision that no browser computes, or a bundle without logits.
        MissingDependencyError: no Node.js here, or no ``export`` extra.
        HhdeployError: it could not compile the page.
        WriteError: OUT exists, or the file system refused.
    """
    progress = listener(progress)
    bundle, out = Bundle.open(path), as_path(out, "out")
    overwrite = yes_or_no(overwrite, "overwrite")
    bundle.manifest.check_logits_alone("a page")
    chosen = _precision(bundle, precision)
    names = _names(bundle, chosen)
    check_target(out, _PAGE, overwrite=overwrite)
    checked_graph(bundle, chosen, "writing a page")  # the browser would refuse it, at every visit
    files = page_code(progress)
    service = files.pop(_SERVICE)
    progress(f"copying the {chosen} graph")
    files |= {f"{_BUNDLE}/{name}": bundle.read(name) for name in names}
    files[f"{_BUNDLE}/{MANIFEST}"] = json_bytes(_part(bundle.manifest, chosen, names).to_json())
    title = title or bundle.path.resolve().name
    files["manifest.webmanifest"] = json_bytes(_application(title))
    facts = {
        "title": title,
        "version": own_version(),
        "precision": chosen,
        "sizes": {name: len(content) for name, content in files.items()},
    }
    files[FACTS] = json_bytes(facts)
    hashes = {name: sha256_of_bytes(content) for name, content in sorted(files.items())}
    files[_SERVICE] = f"const FILES = {json.dumps(hashes, indent=1)};\n".encode() + service
    with atomic_directory(out, overwrite=overwrite, kind=_PAGE) as scratch:
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(scratch / name, content)
    adapters = tuple(entry.name for entry in bundle.manifest.adapters)
    sizes = {name: len(content) for name, content in files.items()}
    return WebPage(out.absolute(), chosen, adapters, sizes)


def _precision(bundle: Bundle, wanted: Precision | None) -> Precision:
    if wanted is not None and wanted not in RUNNABLE:
        raise PlanError(
            f"`precision={wanted!r}`: expected what ONNX Runtime Web computes, one of "
            f"{', '.join(RUNNABLE)}."
        )
    there = bundle.manifest.graphs
    if wanted is None:
        found = next((precision for precision in RUNNABLE if precision in there), None)
        if found is None:
            raise BundleError(
                f"{bundle.path}: expected a graph of {', '.join(RUNNABLE)}, which browsers "
                f"compute, found {', '.join(there)}. {graph_hint(bundle.path, 'float32')}"
            )
        return found
    if wanted not in there:
        bundle.graph(wanted)  # says what it has, and what brings it
    return wanted


def _names(bundle: Bundle, precision: Precision) -> list[str]:
    """The bundle's files that the page needs."""
    manifest = bundle.manifest
    if not manifest.adapters and not manifest.answers_backbone:
        raise BundleError(
            f"{bundle.path} has no adapter to answer. Add one with: "
            f"{as_code('add_adapter', bundle.path, 'NAME', 'DIR')}"
        )
    graph = manifest.graphs[precision]
    names = [graph, f"{graph}.data"]
    if manifest.layout is not None:
        bundle.bank()  # compared with what the adapters are said to have, also where it is baked in
        if not manifest.bank_as_constant:
            names.append(manifest.named(BANK_FILE))
    names += _picture_graphs(bundle)
    return [name for name in names if name in manifest.files or name == graph]


def _picture_graphs(bundle: Bundle) -> Iterable[str]:
    """Files of the graphs that take pictures, for all that answers."""
    manifest = bundle.manifest
    needed = {entry.name: entry.preprocess for entry in manifest.adapters}
    needed = needed or {"backbone": manifest.backbone.preprocess}
    graphs = {name: manifest.picture_graph(transform) for name, transform in needed.items()}
    without = sorted(name for name, graph in graphs.items() if not graph)
    if without:
        raise BundleError(
            f"{bundle.path} has no graph that preprocesses pictures for {', '.join(without)}. "
            f"{_why_none(needed[without[0]])}"
        )
    return sorted({graph["preprocess_graph"]["file"] for graph in graphs.values()})


def _why_none(transform: Preprocess) -> str:
    """Why a bundle has no graph that takes pictures as a transform says, and what helps."""
    channels = transform.input_size[0]
    if channels not in PICTURE_CHANNELS:
        return f"The model takes {channels} channels, a picture has 1 or 3: no page can feed it."
    if transform.interpolation not in GRAPH_FILTERS:
        return (
            f"Graphs resize by {' or '.join(GRAPH_FILTERS)}, and this takes "
            f"{transform.interpolation}: train and export with one of these."
        )
    return "It was exported by an older hhdeploy: export it again."


def _part(manifest: Manifest, precision: Precision, names: list[str]) -> Manifest:
    """The manifest of what the page has of a bundle."""
    return replace(
        manifest,
        graphs={precision: manifest.graphs[precision]},
        engines=(),
        files={name: manifest.files[name] for name in names},
    )


def _application(title: str) -> dict[str, Any]:
    """manifest.webmanifest: what a device shows of a page that was installed."""
    return {
        "name": title,
        "short_name": title,
        "start_url": "./",
        "scope": "./",
        "display": "standalone",
        "background_color": "#ffffff",
        "theme_color": "#2f6fb2",
        "icons": [{"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}],
    }
