"""Figures of the documentation, each from JSON that a named command left.

    python -m benchmarks.tables                  write every block of every page anew
    python -m benchmarks.tables --run NAME ...   measure first, alone on the machine (`--list`)
    python -m benchmarks.tables --keep NAME FILE take the JSON at the end of FILE instead

A run's JSON is kept as benchmarks/results/NAME.json, with command, date, machine, versions and how
many cores other work kept busy meanwhile. What stands between the marks of a page is written from
it, and `tests/docs/test_tables.py` compares.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import blocks, gpu_table
from benchmarks.harness import machine
from benchmarks.peers import page as peers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTHING = "Not measured yet."
_VITS14, _STARTER = "examples/vits14/results.json", "examples/starter/results.json"

# Name of the result -> arguments of Python.
RUNS: Mapping[str, Sequence[str]] = {
    "fold": ("-m", "benchmarks.bench_fold", "--pairs", "5"),
    "branches": ("-m", "benchmarks.bench_branches", "--pairs", "4", "--rounds", "2"),
    "branches-openvino": (
        "-m", "benchmarks.bench_branches", "--pairs", "4", "--rounds", "2",
        "--device", "openvino",
    ),
    "branches-starter": ("-m", "benchmarks.bench_branches", "--model", "starter", "--pairs", "40"),
    "branches-starter-openvino": (
        "-m", "benchmarks.bench_branches", "--model", "starter", "--pairs", "40",
        "--device", "openvino",
    ),
    "int8": ("-m", "benchmarks.bench_int8", "--pairs", "5", "--rounds", "4"),
    # The same, kept of a processor with AMX.
    "int8-amx": ("-m", "benchmarks.bench_int8", "--pairs", "3", "--rounds", "3"),
    "slots": ("-m", "benchmarks.bench_slots"),
    "export": ("-m", "benchmarks.bench_export", "--pairs", "2"),
    "cold-start": ("-m", "benchmarks.bench_cold_start", "--starts", "5", "--kind", "branches"),
    "serve": (
        "-m", "benchmarks.bench_serve", "--rounds", "3", "--images", "160", "--requests", "20",
        "--no-profile",
    ),
    "bank": ("-m", "benchmarks.bench_bank", "--rounds", "2", "--requests", "40"),
    "memory": ("-m", "benchmarks.bench_memory"),
    "parity": ("-m", "benchmarks.bench_parity"),
    "machine": ("-m", "benchmarks.bench_machine", "--runs", "20"),
    "unseen-adapters": ("-m", "benchmarks.unseen_adapters"),
    "peers": ("-W", "ignore", "-m", "benchmarks.peers"),
    "coverage": ("-m", "benchmarks.coverage"),
    "engines": ("-m", "benchmarks.build_engines"),
}  # fmt: skip
# What is appended for a rehearsal, which takes a small model.
_SMALL = ("--model", "vit_tiny_patch16_224")
QUICK: Mapping[str, Sequence[str]] = {
    "branches": (*_SMALL, "--rounds", "1"),
    "branches-openvino": (*_SMALL, "--rounds", "1"),
    "branches-starter": ("--rounds", "1", "--pairs", "10"),
    "branches-starter-openvino": ("--rounds", "1", "--pairs", "10"),
    "fold": ("--pairs", "2"),
    "int8": (*_SMALL, "--pairs", "3", "--rounds", "1"),
    "slots": ("--pairs", "4", "--slots", "64"),
    "export": (*_SMALL, "--pairs", "2"),
    "cold-start": (*_SMALL, "--starts", "2"),
    "serve": (*_SMALL, "--rounds", "1", "--images", "80", "--requests", "20"),
    "bank": (*_SMALL, "--rounds", "1", "--requests", "20", "--runs", "10"),
    "memory": _SMALL,
    "parity": ("--model", "EVA-02-Ti", "--images", "2"),
    "machine": (*_SMALL, "--runs", "3"),
}
# What is run if nothing is named, in the order of their worth; the last two count no seconds.
QUIET = (
    "branches", "branches-openvino", "int8", "fold", "branches-starter",
    "branches-starter-openvino", "serve", "bank", "export", "cold-start", "slots", "memory",
    "parity",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A part of a page that is written.

    Attributes:
        page: path in the checkout.
        results: names of results, or paths of other JSON files in the checkout.
        markdown: of the results' contents, in their order.
        partial: it is written of what there is; None stands for a result that there is not.
        drawings: file name -> content, beside the page.
    """

    page: str
    results: tuple[str, ...]
    markdown: Callable[..., str]
    drawings: Callable[..., Mapping[str, str]] | None = None
    partial: bool = False

    def contents(self) -> list[Any] | None:
        """None: one was never measured."""
        found = [
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            for file in map(place, self.results)
        ]
        return found if self.partial or None not in found else None


_PAGE = "docs/measured.md"
BLOCKS: Mapping[str, Block] = {
    "headlines": Block(
        "README.md",
        (_VITS14, "unseen-adapters", "parity", "branches", "gpu", "peers", "bank"),
        blocks.headlines,
        partial=True,
    ),
    "parity": Block(_PAGE, ("parity",), blocks.parity),
    "branches": Block(_PAGE, ("branches", "branches-openvino"), blocks.comparisons),
    "branches-starter": Block(
        _PAGE, ("branches-starter", "branches-starter-openvino"), blocks.comparisons
    ),
    "int8": Block(_PAGE, ("int8",), blocks.comparisons),
    "int8-amx": Block(_PAGE, ("int8-amx",), blocks.comparisons),
    "slots": Block(_PAGE, ("slots",), blocks.comparisons),
    "fold": Block(_PAGE, ("fold",), blocks.comparisons),
    "export": Block(_PAGE, ("export",), blocks.comparisons),
    "memory": Block(_PAGE, ("memory",), blocks.amounts),
    "cold-start": Block(_PAGE, ("cold-start",), blocks.cold_start),
    "rounding": Block(_PAGE, ("parity",), blocks.rounding),
    "vits14": Block(_PAGE, (_VITS14,), blocks.vits14),
    "unseen-adapters": Block(_PAGE, ("unseen-adapters",), blocks.unseen_adapters),
    "unseen-summary": Block("docs/calibration.md", ("unseen-adapters",), blocks.unseen_summary),
    "peers": Block(_PAGE, ("peers",), peers.section, peers.drawings),
    "serve": Block(_PAGE, ("serve",), blocks.serve),
    "bank": Block(_PAGE, ("bank",), blocks.bank),
    "gpu": Block(_PAGE, ("gpu",), gpu_table.table),
    "starter": Block(_PAGE, (_STARTER,), blocks.starter),
    "coverage": Block("docs/coverage.md", ("coverage",), blocks.coverage),
    "engines": Block("docs/tensorrt.md", ("engines",), blocks.engines),
    "machine": Block("docs/machine.md", ("machine",), blocks.machine_page),
}


def place(name: str) -> Path:
    """Where a block's JSON lies."""
    return ROOT / name if name.endswith(".json") else RESULTS / f"{name}.json"


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a block."""
    return f"<!-- {name}: written by python -m benchmarks.tables -->", f"<!-- end of {name} -->"


def with_blocks(page: str, text: str) -> str:
    """A page with its blocks as the results have them; all else as it is."""
    for name, block in BLOCKS.items():
        if block.page != page:
            continue
        begin, end = marks(name)
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            raise SystemExit(f"{page} has no place for {name}: expected {begin} and {end}.")
        contents = block.contents()
        markdown = NOTHING if contents is None else block.markdown(*contents)
        text = f"{before}{begin}\n{markdown}\n{end}{after}"
    return text


def drawings() -> dict[str, str]:
    """Path in the checkout -> content, of all blocks."""
    return {
        f"{Path(block.page).parent}/{name}": content
        for block in BLOCKS.values()
        if block.drawings is not None and (contents := block.contents()) is not None
        for name, content in block.drawings(*contents).items()
    }


def write() -> None:
    """All pages and drawings."""
    for page in dict.fromkeys(block.page for block in BLOCKS.values()):
        file = ROOT / page
        file.write_text(with_blocks(page, file.read_text(encoding="utf-8")), encoding="utf-8")
    for name, content in drawings().items():
        (ROOT / name).write_text(content, encoding="utf-8")


def keep(name: str, content: Mapping[str, Any]) -> None:
    """Store a result, unless a block of it alone cannot be made of it, and write the pages."""
    for block in BLOCKS.values():
        if block.results == (name,):
            block.markdown(content)
    RESULTS.mkdir(exist_ok=True)
    place(name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write()


def measure(name: str, *, quick: bool = False) -> dict[str, Any]:
    """Run what gives a result. Raises SystemExit: it left no JSON."""
    begin, others = time.perf_counter(), _seconds_of_others()
    arguments = [*RUNS[name], *(QUICK.get(name, ()) if quick else ())]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    took = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: nothing is kept of it.")
    # Not below nothing: the kernel counts in ticks, of which a short run has few.
    load = None if others is None else max(0.0, round((_seconds_of_others() - others) / took, 2))
    return {
        "benchmark": name,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *arguments]),
        **json_at_end(done.stdout),  # some say themselves by what commands all of it came
        "seconds": round(took),
        "load": load,
    }


def json_at_end(text: str) -> dict[str, Any]:
    """What a command printed last: a line, or a document that begins a line with its brace."""
    start = f"\n{text}".rfind("\n{")
    if start < 0:
        raise SystemExit(f"no JSON at the end of: {text[-500:]!r}")
    content: dict[str, Any] = json.loads(text[start:])
    return content


def _seconds_of_others() -> float | None:
    """CPU seconds that other processes than this and its children took; Linux."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    # user, nice, system; irq, softirq and steal. Not idle, iowait.
    ticks = [int(value) for value in line.split()[1:9]]
    busy = sum(ticks[:3]) + sum(ticks[5:])
    own = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy / os.sysconf("SC_CLK_TCK") - sum(u.ru_utime + u.ru_stime for u in own)


@click.command(help=__doc__)
@click.option("--run", "run", is_flag=True, help="NAMES; all that count seconds if there is none.")
@click.option("--quick", is_flag=True, help="A rehearsal: few runs, whose figures mean little.")
@click.option("--keep", "kept", nargs=2, metavar="NAME FILE")
@click.option("--list", "listed", is_flag=True, help="Names and commands.")
@click.argument("names", nargs=-1, type=click.Choice(list(RUNS)), metavar="[NAME]...")
def main(
    run: bool, quick: bool, kept: tuple[str, str] | None, listed: bool, names: Sequence[str]
) -> None:
    if listed:
        for name, arguments in RUNS.items():
            print(f"{name:28}python {' '.join(arguments)}")
        return
    if kept is not None:
        content = json_at_end(Path(kept[1]).read_text(encoding="utf-8"))
        keep(kept[0], {"load": None, **content})
    for name in (names or QUIET) if run else ():
        print(f"{name}: {' '.join(RUNS[name])}", flush=True)
        content = measure(name, quick=quick)
        keep(name, content)
        print(f"{name}: {content['seconds']} s, others {content['load']} cores", flush=True)
    write()


if __name__ == "__main__":
    main()
