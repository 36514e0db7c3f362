"""The model card of a bundle: README.md, with the front matter that hubs read.

It says what manifest, parity.json and the findings of calibrations say, and has no date: the same
bundle has the same card, to the byte. A change of the bundle writes it again (`store`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.backbones.licences import CARD, UNKNOWN, Licences, in_words, together
from hhdeploy.bundle.manifest import PARITY_FILE, AdapterEntry, Manifest, write_manifest
from hhdeploy.bundle.reading import Bundle
from hhdeploy.choices import QUANTISED, Precision
from hhdeploy.errors import BundleError
from hhdeploy.files.bundle_json import json_object
from hhdeploy.files.writing import sha256_of_bytes, write_bytes

# Licences by the names that the Hugging Face hub has for them; others are its "other", with a name.
_HUB = frozenset(
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib unlicense wtfpl "
    "cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 "
    "cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 "
    "afl-3.0 artistic-2.0 bsl-1.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gpl gpl-2.0 gpl-3.0 "
    "agpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0 "
    "odbl pddl postgresql openrail openrail++ creativeml-openrail-m bigscience-openrail-m "
    "bigscience-bloom-rail-1.0 bigcode-openrail-m apple-ascl apple-amlr c-uda gfdl gemma "
    "intel-research llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 other".split()
)
_MEANS = {
    CLASSES: ("class", "classes"),
    LABELS: ("independent label", "independent labels"),
    VALUES: ("value", "values"),
}
# Labels that a line of the card names.
_NAMED = 12


def write_card(bundle: Bundle) -> Manifest:
    """Write the card of a new bundle, which nobody reads yet, and the manifest that names it."""
    content = card_of(bundle).encode()
    write_bytes(bundle.path / CARD, content)
    files = {**bundle.manifest.files, CARD: sha256_of_bytes(content)}
    manifest = replace(bundle.manifest, files=files)
    write_manifest(bundle.path, manifest)
    return manifest


def card_of(bundle: Bundle) -> str:
    """The card as it is to be; all files that the manifest names are there, but the card.

    Raises:
        BundleError: a graph is missing, or parity.json or a calibration's findings are damaged.
    """
    manifest = bundle.manifest
    blocks = [
        f"---\n{_front_matter(manifest)}---",
        f"# {_text(manifest.backbone.model)}: {_kind(manifest)}",
        _about(manifest),
        _adapters(manifest),
        "## Images\n\n" + "\n".join(_images(manifest)),
        _graphs(bundle),
        *_engines(manifest),
        _use(manifest),
        _licence(manifest),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(manifest: Manifest) -> str:
    found: dict[str, Any] = {
        **_hub_licence(_stated(manifest)),
        "library_name": "hhdeploy",
        **({"pipeline_tag": task} if (task := _pipeline(manifest)) else {}),
        **({"base_model": base} if (base := hub_id(manifest.backbone.model)) else {}),
        "tags": ["onnx", "vision-transformer", "adapters", "image"],
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in found.items())


def _stated(manifest: Manifest) -> list[Licences]:
    return [manifest.backbone.license, *(a.license for a in _own(manifest))]


def _own(manifest: Manifest) -> tuple[AdapterEntry, ...]:
    """The adapters; a model exported as it is has none."""
    return () if manifest.whole else manifest.adapters


def _hub_licence(stated: Sequence[Licences]) -> dict[str, object]:
    """All of them; ``unknown`` is one where a part of the bundle states none."""
    names = [*together(*stated), *([UNKNOWN] if not all(stated) else [])]
    ids = [name.lower() for name in names]
    if not {*ids} <= {*_HUB, UNKNOWN}:
        return {"license": "other", "license_name": " and ".join(names)}
    return {"license": ids[0] if len(ids) == 1 else ids}


def _pipeline(manifest: Manifest) -> str | None:
    if not manifest.classes:
        return "image-feature-extraction"
    kinds = {a.problem_type for a in manifest.adapters} | (
        {CLASSES} if manifest.answers_backbone else set()
    )
    return "image-classification" if kinds - {VALUES} else None


def hub_id(model: str) -> str | None:
    """Where the Hugging Face hub has a backbone, as far as its name tells: timm has each of its
    weights (models with a tag) below timm/."""
    source, separator, name = model.partition(":")
    if not separator:
        return f"timm/{model}" if "." in model else None
    known = source in ("transformers", "hf-hub")
    return name if known and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _kind(manifest: Manifest) -> str:
    if manifest.whole:
        return "as an ONNX graph"
    if manifest.kind == "folded":
        return f"with {_text(manifest.adapters[0].name)} folded in"
    count = len(manifest.adapters)
    return f"{count} adapter{'s' if count != 1 else ''} beside one backbone"


def _about(manifest: Manifest) -> str:
    facts = manifest.backbone
    how = (
        "Every image of a batch may go through another adapter of the table below."
        if manifest.layout is not None
        else "The graph is a plain one: images in, outputs out."
    )
    return (
        f"A bundle of hhdeploy: ONNX graphs of the Vision Transformer `{_code(facts.model)}` "
        f"(sha256 of its weights `{facts.sha256[:16] or UNKNOWN}`), made to be compared with the "
        f"PyTorch model that was trained. {how} `hhdeploy.json` names every file with its sha256."
    )


def _adapters(manifest: Manifest) -> str:
    rows = [
        (
            _text(entry.name),
            _answers(entry),
            f"{entry.strength:g}",
            _text(in_words(entry.license)),
            "yes" if entry.verified else "not yet",
        )
        for entry in _own(manifest)
    ]
    if manifest.whole:
        return f"## Answers\n\n{_answers(manifest.adapters[0])}."
    if not rows:
        return "## Adapters\n\nNone."
    lost = [
        f"* {_text(a.name)} is {_text(str(a.compressed))}."
        for a in manifest.adapters
        if a.compressed
    ]
    table = _table(("adapter", "answers", "strength", "licence", "verified"), rows)
    return "\n\n".join(["## Adapters", table, *(["\n".join(lost)] if lost else [])])


def _answers(entry: AdapterEntry) -> str:
    if not entry.classes:
        return "features"
    named = [_text(name) for name in (entry.class_names or ())[:_NAMED]]
    more = entry.classes - len(named) if named else 0
    listed = ", ".join(named) + (f" and {more} more" if more else "")
    one, several = _MEANS[entry.problem_type]
    what = f"{entry.classes} {one if entry.classes == 1 else several}"
    return what + (f": {listed}" if named else "")


def _images(manifest: Manifest) -> list[str]:
    """How pictures become inputs; who sees them alike is named together."""
    seen: dict[str, list[str]] = {}
    for entry in manifest.adapters:
        seen.setdefault(entry.preprocess.described(), []).append(_text(entry.name))
    if manifest.answers_backbone:
        seen.setdefault(manifest.backbone.preprocess.described(), []).append("the bare backbone")
    return [f"* {', '.join(names)}: {_text(how)}" for how, names in seen.items()]


def _graphs(bundle: Bundle) -> str:
    manifest = bundle.manifest
    report = bundle.parity() if manifest.has(PARITY_FILE) else {"stages": []}
    rows = [
        (
            precision,
            f"`{name}`",
            _megabytes(bundle.path, manifest, name),
            *_measured(report, precision),
        )
        for precision, name in manifest.graphs.items()
    ]
    table = _table(("precision", "graph", "MB with weights", "largest error", "top-1"), rows)
    lines = ["## Precisions", table, _how_measured(report.get("data"))]
    return "\n\n".join([*lines, *_findings(bundle)])


def _megabytes(root: Path, manifest: Manifest, graph: str) -> str:
    there = [n for n in (graph, f"{graph}.data") if n in manifest.files]
    try:
        return f"{sum((root / n).stat().st_size for n in there) / 1e6:.1f}"
    except OSError as error:
        raise BundleError(
            f"{error.filename}: expected a file of the bundle's {graph}, found none: "
            f"{error.strerror}. Copy or export the bundle again."
        ) from error


def _measured(report: Mapping[str, Any], precision: Precision) -> tuple[str, str]:
    """The worst of all adapters, of the range of the outputs; of classes the share that agrees."""
    stages = [s for s in report["stages"] if s["precision"] == precision]
    if not stages:
        return "not measured", "not measured"
    worst = max(stages, key=lambda s: float(s["range_error"]))
    top1 = [s["top1"] for s in stages if s.get("top1") is not None]
    error = f"{float(worst['range_error']):.1e} of the range ({_text(worst['adapter'])})"
    return error, f"{100 * min(top1):.1f} %" if top1 else "-"


def _how_measured(data: Mapping[str, Any] | None) -> str:
    if not data:
        return "Nothing was compared with the training-time model."
    what = "seeded noise" if data.get("kind") == "noise" else "pictures"
    return (
        "Errors are those of the graph against the training-time model in float64, on "
        f"{what} ({data.get('images_per_adapter', '?')} an adapter; parity.json has every figure). "
        "They say how faithful a graph is, not how good a model."
    )


def _findings(bundle: Bundle) -> list[str]:
    """What calibrations found, in their words."""
    found = []
    for precision in QUANTISED:
        role = f"calibration.{precision}.json"
        if bundle.manifest.has(role):
            name = bundle.manifest.named(role)
            verdict = json_object(bundle.read(name), bundle.path / name).get("verdict")
            found += [f"* {precision}: {_text(str(verdict))}"] if verdict else []
    return ["\n".join(found)] if found else []


def _engines(manifest: Manifest) -> list[str]:
    rows = [
        (
            f"`{e.file}`",
            f"{e.backend} {e.version}",
            e.precision,
            ", ".join(e.architectures) or "Ampere and newer",
            f"{e.bytes / 1e6:.1f}",
        )
        for e in manifest.engines
    ]
    columns = ("engine", "for", "precision", "GPUs", "MB")
    return ["## Engines\n\n" + _table(columns, rows)] if rows else []


def _use(manifest: Manifest) -> str:
    name = manifest.adapters[0].name if manifest.adapters else "backbone"
    quoted = json.dumps(name)
    fed = "".join(
        f'request.set_tensor("{tensor}", {tensor}); '
        for tensor in ("adapter_ids", "adapter_bank")
        if manifest.layout is not None
        and (tensor == "adapter_ids" or not manifest.bank_as_constant)
    )
    output = next(iter(manifest.outputs))
    graph = manifest.graphs["float32"]
    python = (
        f"print(session.classify([Image.open('photo.jpg')], {quoted}))"
        if manifest.classes
        else f"print(session.run(images, {quoted}))  # float32 [n, {_shape(manifest)}]"
    )
    # The package knows logits alone.
    javascript = f"""
JavaScript (the package hhdeploy, with onnxruntime-node):

```js
const bundle = await openBundle(fromFolder("BUNDLE"), ort);
const [answers] = await bundle.classify([{{ data, width, height }}], {quoted});
console.log(answers);
```
"""
    # Else processors that have bfloat16 compute in it.
    float32 = "ov::hint::inference_precision(ov::element::f32)"
    return f"""## Use

Python (`pip install 'hhdeploy[cpu]'`):

```python
from PIL import Image; from hhdeploy import open_session
session = open_session("BUNDLE", device="cpu")
{python}
```
{javascript if manifest.classes else ""}
C++ (OpenVINO; `images` is what a `preprocess.*.onnx` graph makes of a picture):

```cpp
auto request = ov::Core().compile_model("BUNDLE/{graph}", "CPU", {float32}).create_infer_request();
request.set_tensor("images", images); {fed}request.infer();
auto {output} = request.get_tensor("{output}");
```"""


def _shape(manifest: Manifest) -> str:
    return ", ".join(map(str, manifest.input_size))


def _licence(manifest: Manifest) -> str:
    facts = manifest.backbone
    lines = [f"* backbone `{_code(facts.model)}`: {_text(in_words(facts.license))}"]
    lines += [f"* adapter {_text(a.name)}: {_text(in_words(a.license))}" for a in _own(manifest)]
    said = "As their sources state them; unknown is what no source states."
    return "\n\n".join(["## Licences", "\n".join(lines), said])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(words: str) -> str:
    """Words of others in Markdown: no markup, no line breaks, no cells of a table."""
    plain = " ".join(words.split())
    return re.sub(r"([\\`*_{}\[\]<>|#!~])", r"\\\1", plain)


def _code(words: str) -> str:
    return re.sub(r"[`\s|]+", " ", words)
