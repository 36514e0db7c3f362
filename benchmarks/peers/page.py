"""What was found, as tables and plots for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.plots import Axis, nice_ticks, plot
from benchmarks.peers.rounds import AGAIN, BATCHES, INT8, OURS, PEERS
from benchmarks.peers.tasks import BANKS

Record = dict[str, Any]


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
    blocks += [_change_table(content["changes"]), _accuracy_table(content["accuracies"])]
    blocks.append(_failures([*content["races"], *content["changes"], *content["accuracies"]]))
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


def _verdicts(model: str, records: Sequence[Record]) -> list[str]:
    """Ours over the best float32 peer, losses included: ratios of throughput."""
    lines = []
    for bank in BANKS:
        at = {r["peer"]: r for r in records if r["bank"] == bank and "failed" not in r}
        peers = {n: r for n, r in at.items() if not n.startswith("hhdeploy") and r["right"]}
        if OURS not in at or not peers:
            continue
        best = max(peers, key=lambda name: float(peers[name]["images_per_s"]))
        speed = peers[best]["images_per_s"]
        said = [
            f"{name.removeprefix('hhdeploy, ')} {at[name]['images_per_s'] / speed:.2f}x"
            + (" (a loss)" if at[name]["images_per_s"] < speed else "")
            for name in (OURS, INT8, "hhdeploy, ONNX Runtime")
            if name in at
        ]
        control = f"; control {at[AGAIN]['ours_faster']:.2f}" if AGAIN in at else ""
        lines.append(
            f"- {model}, {bank} adapters: hhdeploy over the best peer ({best}): "
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
