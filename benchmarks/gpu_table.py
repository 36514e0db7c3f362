"""The GPU table of docs/measured.md, from the report of a GPU check.

    python -m benchmarks.tables --keep gpu gpu-report.json    takes a report of `make gpu-check`

A dry run's report is refused: its figures are a CPU's. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

_MODELS = {"starter": "starter ViT", "vit-s": "ViT-S/16"}
_PRECISIONS = ("float32", "float16", "bfloat16", "int8")
_VERSIONS = ("onnxruntime-gpu", "onnxruntime", "torch", "python")

Entry = dict[str, Any]
Section = Callable[[Sequence[Entry]], list[str]]


def check(content: dict[str, Any]) -> None:
    """Whether all figures are a GPU's. Raises SystemExit."""
    ran = {
        name: part
        for name, part in content["parts"].items()
        if any(test["outcome"] != "skipped" for test in part["tests"])
    }
    if content["dry"] is not False or any(part["dry"] for part in ran.values()):
        raise SystemExit("this is the report of a dry run: its figures are a CPU's.")
    without = [name for name, part in ran.items() if not part["gpus"]]
    if without or not ran:
        raise SystemExit(f"no GPU ran {', '.join(without) or 'anything'}: nothing to publish.")


def table(content: dict[str, Any]) -> str:
    """The figures in Markdown, and what has none."""
    check(content)
    sections: dict[str, Section] = {
        "parity": _parity, "speed": _speed, "serve": _serve, "memory": _memory,
    }  # fmt: skip
    blocks, said = [], None
    for name, section in sections.items():
        part = content["parts"][name]
        if not any(test["outcome"] == "passed" for test in part["tests"]):
            continue
        if (about := _about(part)) != said:
            blocks.append(about)
            said = about
        blocks += ["\n".join(lines) for lines in [section(part["tests"])] if lines]
    blocks.append("\n".join(_remains(content["parts"])))
    return "\n\n".join(blocks)


def _about(part: dict[str, Any]) -> str:
    gpus = "; ".join(f"{gpu['name']} ({gpu['architecture']})" for gpu in part["gpus"])
    driver = f", driver {part['driver_version']}" if part["driver_version"] else ""
    versions = ", ".join(
        f"{name} {part['versions'][name]}" for name in _VERSIONS if name in part["versions"]
    )
    return f"{gpus}{driver}; {part['machine']}; {versions}."


def _parity(tests: Sequence[Entry]) -> list[str]:
    rows: dict[str, dict[str, str]] = {}
    for test in _named(tests, "test_parity", "test_folded_weights_in_torch"):
        figures = test["figures"]
        if figures.get("device", "cuda") != "cuda" or "range_error" not in figures:
            continue
        graph = "folded, torch" if figures["graph"] == "torch" else figures["graph"]
        row = rows.setdefault(f"{_model(figures)}, {graph}", {})
        good = test["outcome"] == "passed"
        row[figures["precision"]] = f"{figures['range_error']:.1e}" if good else "**failed**"
    return _markdown(
        "Parity with the float64 training-time model, max abs error over the logits' range",
        _PRECISIONS,
        ((name, [row.get(p, "") for p in _PRECISIONS]) for name, row in rows.items()),
    )


def _speed(tests: Sequence[Entry]) -> list[str]:
    rows: list[tuple[str, dict[str, str]]] = []
    for name, label in (
        ("test_side_branches_against_folded", "side branches / folded"),
        ("test_cuda_graphs_against_none", "CUDA graphs / none"),
        ("test_side_branches_against_torch", "side branches / torch, one adapter folded"),
        ("test_many_slots_against_two", "{slots:,} slots / 2"),
    ):
        for test in _passed(_named(tests, name)):
            figures = test["figures"]
            words = [label.format(**figures), figures.get("precision", "float32")]
            words += ["CUDA graphs"] if figures.get("cuda_graphs") else []
            cells = {
                key.removeprefix("batch "): f"{pair['ratio']:.2f} ({pair['a']['median_ms']:.2f} / "
                f"{pair['b']['median_ms']:.2f} ms)"
                for key, pair in figures.items()
                if key.startswith("batch ")
            }
            rows.append((f"{_model(figures)}, {', '.join(words)}", cells))
    batches = list(dict.fromkeys(batch for _, cells in rows for batch in cells))
    lines = _markdown(
        "Speed, medians of interleaved runs, transfers included",
        [f"batch {batch}" for batch in batches],
        ((name, [cells.get(batch, "") for batch in batches]) for name, cells in rows),
    )
    changes = [
        (
            f"{_model(f)}, bank of {f['bank_megabytes']:.0f} MB"
            + (", CUDA graphs" if f["cuda_graphs"] else ""),
            [f"{f['add_ms']:.2f}", f"{f['run_meanwhile_ms']:.2f}", f"{f['run_alone_ms']:.2f}"],
        )
        for f in (t["figures"] for t in _passed(_named(tests, "test_adapters_added_while")))
    ]
    heads = ("adding one, ms", "a batch of 8 meanwhile, ms", "alone, ms")
    more = _markdown("Adapters added while requests run", heads, changes)
    return [*lines, "", *more] if lines and more else lines + more


def _serve(tests: Sequence[Entry]) -> list[str]:
    names = {
        "test_under_load": "`hhdeploy serve` under load, {adapters} adapters in {rows} rows",
        "test_requests_of_all_adapters": "the same without its wire, {clients} clients",
    }
    rows = []
    for name, label in names.items():
        for f in (test["figures"] for test in _passed(_named(tests, name))):
            about = f"{_model(f)}, {f['precision']}: {label.format(**f)}, {f['seconds']:.0f} s"
            figures = (f["images_per_second"], f["p50_ms"], f["p99_ms"])
            rows.append((about, [f"{value:.1f}" for value in figures]))
    return _markdown("Serving, every answer compared", ("images/s", "p50 ms", "p99 ms"), rows)


def _memory(tests: Sequence[Entry]) -> list[str]:
    rows = [
        (
            f"{_model(f)}, {f['adapters']:,} adapters",
            [_megabytes(f[key]) for key in ("bank_megabytes", "gpu_megabytes", "host_megabytes")],
        )
        for f in (test["figures"] for test in _passed(_named(tests, "test_memory")))
    ]
    return _markdown("Memory of an open session, MB", ("bank", "GPU, in all", "process"), rows)


def _remains(parts: dict[str, Any]) -> list[str]:
    """What has no figure, part by part."""
    lines = []
    for name, part in parts.items():
        counts = {
            outcome: sum(test["outcome"] == outcome for test in part["tests"])
            for outcome in ("failed", "interrupted", "not reached", "skipped")
        }
        left = [f"{number} {outcome}" for outcome, number in counts.items() if number]
        if part["state"] != "finished" or left:
            lines.append(f"* {name}: {', '.join([part['state'], *left])}")
    return ["No GPU has run the rest:", *lines] if lines else ["All of the check ran."]


def _markdown(
    title: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    body = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    if not body:
        return []
    return [
        f"| {title} | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
        *body,
    ]


def _named(tests: Sequence[Entry], *names: str) -> list[Entry]:
    """ONNX Runtime's and torch's; engines have tables of their own."""
    return [
        test
        for test in tests
        if "test_engines.py" not in test["test"]
        and test["outcome"] != "skipped"
        and test["test"].partition("::")[2].startswith(names)
    ]


def _passed(tests: Sequence[Entry]) -> list[Entry]:
    return [test for test in tests if test["outcome"] == "passed"]


def _model(figures: dict[str, Any]) -> str:
    return _MODELS.get(figures["model"], figures["model"])


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
