"""What was found, as tables and plots for the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.plots import Axis, nice_ticks, plot
from benchmarks.peers.rounds import AGAIN, BATCHES, PEERS
from benchmarks.peers.tasks import BANKS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers.json"
# What a run has records of.
TABLES = ("races", "latencies", "servers", "changes", "accuracies")
# How our names begin, and that of our second one, the control, ends.
_OURS, _AGAIN = "hhdeploy", " again"
Record = dict[str, Any]


def merged(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """What was found now, and of what was not measured now, what was found before.

    Raises:
        SystemExit: some would be kept, and was measured on another machine or other versions.
    """
    tables: dict[str, list[Record]] = {}
    kept = False
    for table in TABLES:
        new = now.get(table, [])
        measured = {_subject(r) for r in new}
        old = [r for r in (before or {}).get(table, []) if _subject(r) not in measured]
        kept = kept or bool(old)
        tables[table] = [*old, *new]
    if before is None or not kept:
        return now | tables
    if before["machine"] != now["machine"]:
        raise SystemExit(
            f"{RESULTS} is of another machine or of other versions: race all models and the "
            "servers again, or delete it."
        )
    both = {
        key: between.join(dict.fromkeys([*before[key].split(between), now[key]]))
        for key, between in (("date", ", "), ("command", "; "))
    }
    return now | tables | both


def _subject(record: Record) -> tuple[object, object]:
    return record.get("model"), record.get("bank")


def stored() -> dict[str, Any] | None:
    """The run that the page is written from; None: there was none."""
    if not RESULTS.is_file():
        return None
    content: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return content


def section(content: dict[str, Any]) -> str:
    """Tables, and the plots that there is something for."""
    pictures = [f"![{name}]({name})" for name in drawings(content)]
    return "\n\n".join([tables(content), *pictures])


def tables(content: dict[str, Any]) -> str:
    """In Markdown: what was measured on, races, changes, accuracies, and what failed."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    blocks = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {versions}; "
        f"{content['date']}."
    ]
    for model in dict.fromkeys(r["model"] for r in content["races"]):
        own = [r for r in content["races"] if r["model"] == model]
        blocks += [_race_table(model, own), *_verdicts(model, own)]
    served = content.get("servers", [])
    blocks += [_server_table(served), *_server_verdicts(served)]
    blocks += [_change_table(content["changes"]), _accuracy_table(content["accuracies"])]
    blocks.append(
        _failures([*content["races"], *served, *content["changes"], *content["accuracies"]])
    )
    return "\n\n".join(filter(None, blocks))


def _race_table(model: str, records: Sequence[Record]) -> str:
    banks = [b for b in BANKS if any(r["bank"] == b for r in records)]
    columns = [f"{bank} at hand" for bank in banks]
    rows = []
    for peer in PEERS:
        found = [next((r for r in _of(records, peer) if r["bank"] == b), {}) for b in banks]
        worst = max((r["error"] for r in found if "error" in r), default=None)
        error = "" if worst is None else f"{worst:.0e}"
        if any(r.get("right") is False for r in found):
            error += " **off**"
        rows.append([peer, *map(_race_cell, found), error])
    title = f"{model}, images/s (p50 / p99 ms of a batch of 8, each image with its own adapter)"
    return _markdown([title, *columns, "error over the range"], rows)


def _race_cell(record: Record) -> str:
    if not record:
        return ""
    if "failed" in record:
        return "–"
    return f"{record['images_per_s']} ({record['p50_ms']} / {record['p99_ms']})"


def _server_table(records: Sequence[Record]) -> str:
    """Of each model and server a row; nothing where there was no race of servers."""
    banks = [b for b in BANKS if any(r["bank"] == b for r in records)]
    rows = []
    for model in dict.fromkeys(r["model"] for r in records):
        for peer in dict.fromkeys(r["peer"] for r in records):
            own = {r["bank"]: r for r in _of(records, peer) if r["model"] == model}
            memory = " / ".join(str(own[b].get("rss_mb", "–")) for b in banks if b in own)
            cells = [_race_cell(own.get(bank, {})) for bank in banks]
            rows.append([f"{model}, {peer}", *cells, memory])
    columns = [f"{bank} at hand" for bank in banks]
    title = "Servers, images/s (p50 / p99 ms of a request; 8 clients, an image each)"
    return _markdown([title, *columns, "resident MB"], rows) if rows else ""


def _server_verdicts(records: Sequence[Record]) -> list[str]:
    """As `_verdicts`, of servers."""
    return [
        line
        for model in dict.fromkeys(r["model"] for r in records)
        for line in _verdicts(model, [r for r in records if r["model"] == model])
    ]


def _verdicts(model: str, records: Sequence[Record]) -> list[str]:
    """Ours over the best float32 peer, losses included: ratios of throughput."""
    lines = []
    for bank in BANKS:
        at = {r["peer"]: r for r in records if r["bank"] == bank and "failed" not in r}
        peers = {n: r for n, r in at.items() if not n.startswith(_OURS) and r["right"]}
        own = [name for name in at if name.startswith(_OURS) and not name.endswith(_AGAIN)]
        if not own or not peers:
            continue
        best = max(peers, key=lambda name: float(peers[name]["images_per_s"]))
        speed = peers[best]["images_per_s"]
        said = [
            f"{name.split(', ', 1)[1]} {at[name]['images_per_s'] / speed:.2f}x"
            + (" (a loss)" if at[name]["images_per_s"] < speed else "")
            for name in own
        ]
        again = next((at[name]["ours_faster"] for name in at if name.endswith(_AGAIN)), None)
        control = "" if again is None else f"; control {again:.2f}"
        lines.append(
            f"- {model}, {bank} adapters: {own[0].split(', ')[0]} over the best peer ({best}): "
            f"{', '.join(said)}{control}"
        )
    return ["\n".join(lines)] if lines else []


def _change_table(records: Sequence[Record]) -> str:
    rows = []
    for model in dict.fromkeys(r["model"] for r in records):
        for peer in PEERS:
            own = [r for r in _of(records, peer) if r["model"] == model and "failed" not in r]
            if not own:
                continue
            memory = " / ".join(str(r["rss_mb"]) for r in own)
            grown = f"{own[-1]['rss_mb'] / own[0]['rss_mb']:.2f}x" if len(own) > 1 else ""
            banks = " / ".join(str(r["bank"]) for r in own)
            switch = own[-1]["switch_ms"]
            said = "none needed" if switch is None else f"{switch:g}"
            rows.append([f"{model}, {peer}", banks, memory, grown, f"{own[-1]['add_ms']:g}", said])
    columns = ["A process each", "adapters", "resident MB", "grown", "add, ms", "switch, ms"]
    return _markdown(columns, rows) if rows else ""


def _accuracy_table(records: Sequence[Record]) -> str:
    rows = [
        [r["graph"], f"{r['top1']:.2f}", f"{r['p50_ms']:.2f}"] for r in records if "failed" not in r
    ]
    if not rows:
        return ""
    count = next(r["images"] for r in records if "failed" not in r)
    title = f"hhdeploy, starter models, {count} held-out images of four tasks"
    return _markdown([title, "top-1 %", "ms a batch of 8"], rows)


def _failures(records: Sequence[Record]) -> str:
    lines = {
        ", ".join(str(r[key]) for key in ("model", "peer", "graph", "bank") if key in r)
        + f": {r['failed']}"
        for r in records
        if "failed" in r
    }
    return "\n".join(["Without a figure:", "", *(f"- {line}" for line in sorted(lines))]) * bool(
        lines
    )


def drawings(content: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG, of what there are figures for."""
    found = {}
    for model in dict.fromkeys(r["model"] for r in content["races"]):
        label = model.split("/")[0].lower()
        named = (("throughput", "races", "images_per_s"), ("memory", "changes", "rss_mb"))
        titles = {"throughput": "images/s, batch of 8", "memory": "resident memory, MB"}
        for name, table, key in named:
            own = [r for r in content[table] if r["model"] == model and key in r]
            lines = _lines(own, "bank", key)
            if lines:
                found[f"peers-{name}-{label}.svg"] = plot(
                    f"{model}: {titles[name]}, against adapters at hand",
                    Axis("adapters", tuple(float(b) for b in BANKS), log=True),
                    Axis(titles[name], nice_ticks([r[key] for r in own])),
                    lines,
                    list(PEERS),
                )
        own = [r for r in content["latencies"] if r["model"] == model]
        if own:
            found[f"peers-latency-{label}.svg"] = plot(
                f"{model}: ms of a batch, 8 adapters at hand",
                Axis("images in the batch, each with its own adapter", BATCHES, log=True),
                Axis("ms", nice_ticks([r["p50_ms"] for r in own])),
                _lines(own, "batch", "p50_ms"),
                list(PEERS),
            )
    points = [r for r in content["accuracies"] if "failed" not in r]
    if points:
        found["peers-accuracy.svg"] = plot(
            "Starter models: top-1 against ms of a batch of 8",
            Axis("ms", nice_ticks([r["p50_ms"] for r in points])),
            Axis("top-1 %", nice_ticks([r["top1"] for r in points], zero=False)),
            {r["graph"]: [(r["p50_ms"], r["top1"])] for r in points},
            [r["graph"] for r in points],
        )
    return found


def _lines(records: Sequence[Record], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for peer in PEERS:
        points = [(float(r[x]), float(r[y])) for r in _of(records, peer)]
        if points and peer != AGAIN:
            lines[peer] = points
    return lines


def _of(records: Sequence[Record], peer: str) -> list[Record]:
    return [r for r in records if r["peer"] == peer]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
