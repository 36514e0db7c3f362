"""What a measurement's JSON becomes in the documentation: Markdown, a function a kind of block."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.bench_machine import page as machine_text

Content = Mapping[str, Any]
# Less than this of a core is no load.
_QUIET_CORES = 0.15
_BESIDE = "beside other work"


def _loaded(content: Content) -> bool:
    return content["load"] is not None and content["load"] >= _QUIET_CORES


def about(*contents: Content) -> str:
    """Commands, machine, date, and whether other work ran beside; a line for each result."""
    lines = []
    for content in contents:
        note = f" {content['note']}" if "note" in content else ""
        machine, load = content["machine"], content["load"]
        beside = f"; **{_BESIDE}, which kept {load:.1f} cores busy**" if _loaded(content) else ""
        lines.append(
            f"`{content['command']}`: {machine['cpu']}, {machine['threads']} threads, "
            f"{content['date']}{beside}.{note}"
        )
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    head, *lines = (f"| {' | '.join(map(str, line))} |" for line in (columns, *rows))
    return "\n".join([head, f"|{'---|' * len(columns)}", *lines])


def ms(value: float) -> str:
    """Milliseconds, three digits or all that there are before the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


_MODELS = {
    "vit_base_patch16_224": "ViT-B/16",
    "vit_small_patch16_224": "ViT-S/16",
    "vit_tiny_patch16_224": "ViT-Ti/16",
    "starter": "the starter model",
}


def model(results: Content) -> str:
    """What it was measured on, in words; nothing where that is no model."""
    name = results.get("model", "")
    return _MODELS.get(name, name)


def _ratio(found: Content) -> str:
    """With what the rounds or the middle half of the pairs gave."""
    rounds = found.get("of the rounds")
    low, high = (min(rounds), max(rounds)) if rounds else found["quartiles"]
    return f"{found['ratio']:.2f} ({'rounds' if rounds else 'quartiles'} {low:.2f} to {high:.2f})"


def _milliseconds(found: Content) -> str:
    pair = [found[f"{side}_ms"] if f"{side}_ms" in found else found[side]["median_ms"]
            for side in "ab"]  # fmt: skip
    return " / ".join(map(ms, pair))


def comparisons(*contents: Content) -> str:
    """Every A / B of interleaved runs."""
    rows = []
    for content in contents:
        results = content["results"]
        where = {"cpu": ", ONNX Runtime", "openvino": ", OpenVINO"}.get(results.get("device"), "")
        rows += [
            [f"{name}{where}", _ratio(found), _milliseconds(found)]
            for name, found in results.items()
            if isinstance(found, dict) and "ratio" in found
        ]
    whose = f" of {of}" if (of := model(contents[0]["results"])) else ""
    return f"{about(*contents)}\n\n{table([f'A / B{whose}', 'ratio', 'ms'], rows)}"


def amounts(content: Content) -> str:
    """Plain numbers, whose names end with their unit."""
    rows = [[name, f"{value:,}"] for name, value in content["results"].items() if name[-2:] == "MB"]
    return f"{about(content)}\n\n{table([model(content['results']), ''], rows)}"


def parity(content: Content) -> str:
    """Models in float32."""
    models = content["results"]["models"]
    rows = [[name, *(f"{error:.1e}" for error in found.values())] for name, found in models.items()]
    return f"{about(content)}\n\n{table(['model', *next(iter(models.values()))], rows)}"


def rounding(content: Content) -> str:
    """The starter models in 16 bits."""
    rows = [
        [name, f"{100 * found['top1']:.1f} %", f"{found['cosine']:.5f}"]
        for name, found in content["results"]["rounding"].items()
    ]
    columns = ["graph", "top-1 as the training-time model", "least cosine"]
    return f"{about(content)}\n\n{table(columns, rows)}"


def cold_start(content: Content) -> str:
    """Seconds to the first answer."""
    rows = [
        [name, *(f"{found[key]:.2f}" for key in ("cache, s", "no cache, s", "ORT, s"))]
        for name, found in content["results"].items()
        if isinstance(found, dict)
    ]
    columns = [
        f"seconds, {model(content['results'])}",
        "OpenVINO with its cache",
        "without",
        "ONNX Runtime",
    ]
    return f"{about(content)}\n\n{table(columns, rows)}"


def serve(content: Content) -> str:
    """Throughput and latency of the server against the bare session."""
    results, rows = content["results"], []
    for name, found in results.items():
        if name.endswith("saturation"):
            low, high = min(found["of the rounds"]), max(found["of the rounds"])
            rows.append([
                f"{name}: served / bare session, batches of 8",
                f"{found['served / bare']:.2f} (rounds {low:.2f} to {high:.2f}); "
                f"{found['served images/s']:,} / {found['bare images/s']:,} images/s",
            ])  # fmt: skip
            rows.append([
                f"{name}: CPU of an image, ms: server, bare session, client",
                ", ".join(
                    ms(found[f"CPU ms of an image, {who}"])
                    for who in ("server", "bare session", "client")
                ),
            ])  # fmt: skip
        elif "one request at a time" in name:
            added, bare = found["added, median of the blocks, ms"], found["bare, median ms"]
            rows.append([f"{name}: added latency", f"{ms(added)} ms to {ms(bare)}"])
    decoded = results["decoding 8 x 3 x 224 x 224 float32"]
    rows.append([
        "decoding a binary request of 4.8 MB; half of it as JSON",
        f"{decoded['binary, median ms']:.3f} ms; {ms(decoded['half as JSON, median ms'])} ms",
    ])  # fmt: skip
    return f"{about(content)}\n\n{table(['', 'measured'], rows)}"


def bank(content: Content) -> str:
    """Adapters of a running bank."""
    results = content["results"]
    adding, others, memory = (
        results[key] for key in ("adding an adapter", "requests of others", "memory")
    )
    sides = [others[f"{side} changes"] for side in ("with", "without")]
    (one, few), (many, much) = list(memory.items())[:2]
    rows = [
        [
            "adding an adapter: read, check, pack, put; put alone",
            f"{ms(adding['read, pack and put, ms']['median_ms'])} ms; "
            f"{adding['put, ms']['median_ms']:.3f} ms",
        ],
        [
            "the same over HTTP, seen by the client, p50",
            f"{ms(others['uploads, seen by the client']['p50_ms'])} ms",
        ],
        *(
            [
                f"{key[:3]} of others' requests, with changes / without",
                " / ".join(f"{ms(side[key])} ms" for side in sides),
            ]
            for key in ("p50_ms", "p99_ms")
        ),
        [
            f"memory: {many.removesuffix(', MB')} / {one.removesuffix(', MB')}",
            f"{much} MB / {few} MB = {much / few:.2f}",
        ],
    ]
    return f"{about(content)}\n\n{table([model(results), ''], rows)}"


_VITS14 = {
    "probe": "linear probe", "lora": "LoRA", "hta": "HTA", "branches-float32": "branches, float32",
    "branches-bfloat16": "bfloat16", "branches-int8": "INT8",
}  # fmt: skip


def vits14_means(content: Content) -> dict[str, float]:
    """Method -> top-1 in percent, the mean of the tasks."""
    tasks = content["tasks"].values()
    return {method: statistics.fmean(t[method]["top1"] for t in tasks) for method in _VITS14}


def vits14(content: Content) -> str:
    """The example's tasks, side branches alone."""
    rows = [
        [
            name,
            *(f"{task[method]['top1']:.1f}" for method in _VITS14),
            f"{task['images']['test']:,}",
        ]
        for name, task in content["tasks"].items()
    ]
    images = sum(task["images"]["test"] for task in content["tasks"].values())
    means = [f"{mean:.2f}" for mean in vits14_means(content).values()]
    rows.append(["mean", *means, f"{images:,}"])
    return table(["top-1 in percent", *_VITS14.values(), "test images"], rows)


def starter(content: Content) -> str:
    """The starter models' tasks."""
    rows = []
    for name, task in content["tasks"].items():
        top1, probe = f"{task['adapter_top1']:.2f}", task["linear_probe_converged_top1"]
        best = f"**{top1}**" if task["adapter_top1"] > probe else top1
        recipe = task["recipe"]
        turned = ", orthogonal" if recipe["reflection"] == "orthogonal" else ""
        sizes = (task["adapter_parameters"], task["adapter_parameters_with_head"])
        rows.append([
            name, f"{probe:.2f}", best, f"{recipe['form']}{turned}, r = {recipe['r']}",
            *(f"{size:,}" for size in (*sizes, task["images"]["test"])),
        ])  # fmt: skip
    columns = ["task", "linear probe", "adapter", "form", "adapter parameters", "with head"]
    return table([*columns, "test images"], rows)


def machine_page(content: Content) -> str:
    """What docs/machine.md says below its heading."""
    return f"{about(content)}\n\n{machine_text(content['results'], content['machine'])}".strip()


def unseen_summary(content: Content) -> str:
    """In a sentence or two."""
    found = content["results"]
    check, trained = found["check"], found["trained"]
    said = {
        key: "undefined" if check[key] is None else f"{check[key]:.2f}"
        for key in ("precision", "recall")
    }
    return (
        f"{found['unseen']} adapters of a ViT-S/14 ({trained['pixels']} px) that the "
        f"calibration "
        f"on {len(found['adapters']) - found['unseen']} "
        f"others never saw lost {found['mean drop']:.2f} "
        f"points of top-1 in the mean, the worst {found['worst drop']:.1f}; "
        f"{len(found['dropped'])} dropped by more than a point and beyond chance"
        f"{''.join(f' ({name})' for name in [', '.join(found['dropped'])] if name)}. "
        f"`--check` warned of {check['flagged']}: precision {said['precision']}, recall "
        f"{said['recall']}."
    )


def unseen_adapters(content: Content) -> str:
    """Every adapter, and what would have told the drop."""
    found = content["results"]
    rows = [
        [
            f"{'*' * r['calibrated']}{r['name']}{'*' * r['calibrated']}",
            f"{r['float32']:.1f}",
            f"{r['int8']:.1f}",
            f"{'**' * r['dropped']}{r['drop']:.1f}{'**' * r['dropped']}",
            f"{100 * r['test_changed']:.1f}",
            f"{r['test_images']}",
            f"{100 * r['clipped']:.3f}",
            f"{r['ratio']:.1f}",
            f"{100 * r['changed']:.0f}",
            f"{r['sqnr_db']:.0f}",
        ]
        for r in found["adapters"]
    ]
    columns = [
        "adapter", "float32", "INT8", "drop", "answers changed, %", "test images",
        "clipped, % of a site at most", "beyond the range, times", "changed of the check, %",
        "SQNR, dB",
    ]  # fmt: skip
    return "\n\n".join([
        about(content), unseen_summary(content), table(columns, rows), _statistics(found),
    ])  # fmt: skip


_STATISTICS = {
    "clipped": "share clipped at the worst site, above",
    "clipped_mean": "share clipped, mean of the sites, above",
    "lost": "energy lost at the worst site, above",
    "ratio": "largest value over the range, above",
    "changed": "answers changed on the check's images, above",
    "sqnr_db": "SQNR of the logits on them in dB, below",
}


def _statistics(found: Content) -> str:
    rows = []
    for name, judged in found["statistics"].items():
        correlations = [
            judged[f"rank correlation with {what}"] for what in ("the drop", "answers changed")
        ]
        for bound, at in judged["at"].items():
            shares = ["" if at[k] is None else f"{at[k]:.2f}" for k in ("precision", "recall")]
            told = ["" if c is None else f"{c:.2f}" for c in correlations]
            rows.append([f"{_STATISTICS[name]} {bound}", at["flagged"], *shares, *told])
            correlations = [None, None]  # of the statistic, not of the bound: said once
    columns = ["warns of", "adapters", "precision", "recall", "rank correlation with the drop",
               "with answers changed"]  # fmt: skip
    return table(columns, rows)


def _while(content: Content) -> str:
    return f" ({_BESIDE})" if _loaded(content) else ""


def headlines(
    examples: Content,
    unseen: Content | None,
    errors: Content | None,
    branches: Content | None,
    gpu: Content,
    peers: Content,
    adapters: Content | None,
) -> str:
    """README's table; what was never measured has no row."""
    means = vits14_means(examples)
    rows = [
        [
            "top-1 of a ViT-S/14 on four data sets: linear probe, LoRA, HTA "
            "([how](examples/vits14/README.md))",
            ", ".join(f"{means[method]:.1f}" for method in ("probe", "lora", "hta")),
        ],
        [
            "the same HTA adapters beside one backbone in ONNX Runtime: float32, INT8",
            ", ".join(f"{means[method]:.1f}" for method in ("branches-float32", "branches-int8")),
        ],
    ]
    if unseen is not None:
        loss = unseen["results"]
        rows.append([
            f"points of top-1 that {loss['unseen']} adapters lose in INT8 whose calibration never "
            "saw them: mean, worst",
            f"{loss['mean drop']:.2f}, {loss['worst drop']:.1f}",
        ])  # fmt: skip
    if errors is not None:
        largest, worst = next(iter(errors["results"]["models"].items()))
        rows.append([
            f"largest error over the logits' range, {largest} in float32, four adapters in a mixed "
            "batch",
            f"{worst['side branches']:.1e}",
        ])  # fmt: skip
    if branches is not None:
        found = branches["results"]
        ratios = [found[f"branches / folded, batch {size}"]["ratio"] for size in (1, 8)]
        rows.append([
            f"four adapters beside {model(found)} / one folded, on a CPU, float32, batch 1 and 8"
            + (f" ({_BESIDE})" if _loaded(branches) else ""),
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
        ])  # fmt: skip
    rows += [
        [
            "the same of ViT-S/16 on an H100, float16, batch 1, 8 and 32",
            ", ".join(f"{ratio:.2f}" for ratio in _graphics(gpu)),
        ],
        [
            "images/s of a batch of 8, each image with its own of 1, 8, 64 adapters, OpenVINO / "
            "the best of PEFT, torch.compile and ONNX Runtime or OpenVINO with a model a task",
            ", ".join(f"{ratio:.2f}" for ratio in _raced(peers)),
        ],
    ]
    if adapters is not None:
        memory = list(adapters["results"]["memory"].values())
        whose = model(adapters["results"])
        rows.append(
            [f"memory with 100 adapters of {whose} / with one", f"{memory[1] / memory[0]:.2f}"]
        )
    return table(["measured", ""], rows)


def _graphics(gpu: Content) -> list[float]:
    """Side branches / folded in float16, batch 1, 8 and 32."""
    (found,) = (
        entry["figures"]
        for entry in gpu["parts"]["speed"]["tests"]
        if "side_branches_against_folded" in entry["test"]
        and entry["outcome"] == "passed"
        and entry["figures"]["precision"] == "float16"
        and not entry["figures"]["cuda_graphs"]
    )
    return [found[f"batch {size}"]["ratio"] for size in (1, 8, 32)]


def _raced(peers: Content) -> list[float]:
    """Throughput in OpenVINO over the best peer's, with 1, 8 and 64 adapters."""
    ratios = []
    for number in (1, 8, 64):
        at = {
            race["peer"]: race["images_per_s"]
            for race in peers["races"]
            if (race["bank"], race["model"], race.get("right")) == (number, "ViT-S/16", True)
        }
        best = max(speed for peer, speed in at.items() if not peer.startswith("hhdeploy"))
        ratios.append(at["hhdeploy, OpenVINO"] / best)
    return ratios


COVERAGE = ("fold", "branches", "row 0", "int8", "engine")


def coverage(content: Content) -> str:
    """A table of the families that go through, and the reasons of the others."""
    rows = content["results"]
    versions = ", ".join(
        f"{name} {found}" for name, found in content["machine"]["versions"].items()
    )
    gone = {name: row for name, row in rows.items() if row["fold"].startswith("refused")}
    through = [
        [name, f"`{row['model']}`", *(row[column] for column in COVERAGE)]
        for name, row in rows.items()
        if name not in gone
    ]
    refused = [
        [f"`{row['model']}`", row["fold"].removeprefix("refused: ")] for row in gone.values()
    ]
    return "\n\n".join([
        about(content),
        versions,
        table(["family", "model", "fold", "branches", "row 0", "INT8", "engine"], through),
        "Refused, with the reason that the command gives:",
        table(["model", "reason"], refused),
    ])  # fmt: skip


# What an engine may have beyond its weights: 5 % of them, and kernels.
_SHARE, _KERNELS_MB = 1.05, 12.0


def engines(content: Content) -> str:
    """Engines and their weights."""
    rows = []
    for row in content["results"]:
        size, weights = row["engine_mb"], row["weights_mb"]
        rows.append([
            row["model"], row["precision"], f"{row['seconds']:.0f}", f"{size:.1f}",
            f"{weights:.1f}", f"{size - weights:.1f}",
            "yes" if size <= _SHARE * weights + _KERNELS_MB else "**no**",
        ])  # fmt: skip
    columns = ["model", "precision", "build, s", "engine, MB", "weights, MB", "difference, MB"]
    within = f"within {_SHARE} x weights + {_KERNELS_MB:.0f} MB"
    return f"{about(content)}\n\n{table([*columns, within], rows)}"
