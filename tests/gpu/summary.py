"""The reports of all parts as one, and the table of what ran and what did not.

Standard library alone.
"""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("parity", "speed", "serve", "memory")
_OUTCOMES = ("passed", "failed", "skipped", "interrupted", "not reached")
_KINDS = ("package", "driver", "chip", "graph")
_WIDTH = 98


@dataclass(frozen=True)
class Files:
    """Where reports are.

    Attributes:
        stem: their common path, without a suffix.
    """

    stem: Path

    @property
    def json(self) -> Path:
        """All parts."""
        return self.stem.with_name(f"{self.stem.name}.json")

    @property
    def text(self) -> Path:
        """The table."""
        return self.stem.with_name(f"{self.stem.name}.txt")

    def part(self, name: str) -> Path:
        """One part's report."""
        return self.stem.with_name(f"{self.stem.name}.{name}.json")

    def amend(self, part: str, state: str, code: int) -> None:
        """Note how a part that did not end by itself was ended."""
        file = self.part(part)
        content = _read(file) or {"schema_version": 2, "dry": None, "tests": []}
        write_whole(file, json.dumps({**content, "state": state, "exit_code": code}, indent=1))

    def write(self, content: dict[str, Any], text: str) -> None:
        """Both files of all parts."""
        write_whole(self.json, json.dumps(content, indent=1))
        write_whole(self.text, text)


def merge(files: Files, *, dry: bool) -> dict[str, Any]:
    """What there is of all parts; a dry run's report never becomes part of a real one's."""
    parts = {}
    for name in PARTS:
        content = _read(files.part(name))
        if content is None:
            content = {"state": "not run", "tests": []}
        elif content["dry"] not in (dry, None):
            content = {"state": "not run: there is another kind of run's report", "tests": []}
        counts = {o: sum(t["outcome"] == o for t in content["tests"]) for o in _OUTCOMES}
        parts[name] = {**content, "counts": counts}
    return {"schema_version": 2, "dry": dry, "parts": parts}


def table(content: dict[str, Any]) -> str:
    """What ran, what was skipped and for want of what."""
    parts = content["parts"]
    lines = []
    if content["dry"]:
        lines += ["A dry run: the CPU in a GPU's place. Its figures mean nothing.", ""]
    lines += _heads(parts)
    lines += ["", f"{'part':8}" + "".join(f"{o:>13}" for o in _OUTCOMES) + "   ended"]
    for name, part in parts.items():
        counts = "".join(f"{part['counts'][o]:>13}" for o in _OUTCOMES)
        lines.append(f"{name:8}{counts}   {part['state']}")
    tests = [(name, test) for name, part in parts.items() for test in part["tests"]]
    ran = [(name, test) for name, test in tests if test["outcome"] != "skipped"]
    if ran:
        lines += ["", "ran", *(_ran(name, test) for name, test in ran)]
    lines += ["", *_skipped(tests)]
    return "\n".join(lines)


def _heads(parts: dict[str, Any]) -> list[str]:
    """Once for all parts that ran on the same machine with the same versions."""
    heads: dict[str, list[str]] = {}
    for name, part in parts.items():
        if "machine" not in part:
            continue
        versions = ", ".join(f"{k} {v}" for k, v in part["versions"].items())
        gpus = "; ".join(f"{g['name']} ({g['architecture']})" for g in part["gpus"]) or "none"
        driver = part["driver"] + (f", {part['driver_version']}" if part["driver_version"] else "")
        head = "\n".join(
            [
                f"GPU       {gpus}",
                f"driver    {driver}",
                f"machine   {part['machine']}",
                _filled("versions  ", versions),
                _filled("absent    ", ", ".join(part["absent"])),
            ]
        )
        heads.setdefault(head, []).append(f"{name} ({part['date']})")
    return [f"{head}\n{_filled('parts     ', ', '.join(names))}" for head, names in heads.items()]


def _filled(label: str, text: str) -> str:
    indent = " " * len(label)
    return textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent=indent)


def _ran(part: str, test: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {short(value)}" for name, value in test["figures"].items())
    reason = test["reason"].partition("\n")[0]
    about = "; ".join(filter(None, (reason, figures)))
    name = test["test"].partition("::")[2].removeprefix("test_").replace("_", " ")
    start = f"{test['outcome']:11} {test['seconds']:7.1f} s  {part}: {name}"
    return f"{start}: {about}" if about else start


def _skipped(tests: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """For want of what, and which tests: by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for part, test in tests:
        if test["outcome"] != "skipped":
            continue
        kind, _, what = test["reason"].partition(": ")
        if kind not in _KINDS:
            kind, what = "other", test["reason"]
        name = test["test"].partition("::")[2].partition("[")[0].removeprefix("test_")
        reasons.setdefault((kind, what), []).append(f"{part}: {name.replace('_', ' ')}")
    if not reasons:
        return ["nothing was skipped"]
    lines = [f"{'skipped':>7}  for want of"]
    for (kind, what), names in sorted(reasons.items()):
        lines.append(f"{len(names):>7}  {kind}: {what}")
        indent = " " * 11
        lines.append(
            textwrap.fill(
                "; ".join(dict.fromkeys(names)),
                _WIDTH,
                initial_indent=indent,
                subsequent_indent=indent,
            )
        )
    return lines


def short(value: object) -> str:
    """A figure as the table shows it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict) and "ratio" in value:
        low, high = value["quartiles"]
        return (
            f"{value['a']['median_ms']:.2f} ms / {value['b']['median_ms']:.2f} ms = "
            f"{value['ratio']:.3f} (quartiles {low:.3f} to {high:.3f})"
        )
    if isinstance(value, dict):
        return "in the JSON"
    return str(value)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def write_whole(file: Path, text: str) -> None:
    """Replace a text file by another, so that nobody finds half of it."""
    scratch = file.with_name(f"{file.name}.new")
    scratch.write_text(f"{text}\n", encoding="utf-8")
    os.replace(scratch, file)
