"""The table of a parity report: what export, verify and demo print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group

from hhdeploy.cli import ui
from hhdeploy.files.folders import in_words
from hhdeploy.parity import ParityReport, StageResult, bound


def parity_table(report: ParityReport) -> Group:
    """One line a stage and adapter."""
    rows = []
    for stage in report.stages:
        c = stage.comparison
        rows.append(
            (
                stage.adapter if stage.output == "logits" else f"{stage.adapter} {stage.output}",
                f"{stage.stage} {stage.precision}",
                f"{c.max_abs:.1e}",
                f"{c.range_error:.1e}",
                "–" if c.cosine is None else f"{c.cosine:.6f}",
                "inf" if math.isinf(c.sqnr_db) else f"{c.sqnr_db:.0f}",
                "–" if c.top1 is None else f"{c.top1:.1%}{_near_ties(stage)}",
                ui.verdict(not stage.failures, "passed", "FAILED"),
            )
        )
    columns = ("adapter", "stage", "max abs", "of range", "cosine", "SQNR dB", "top-1", "parity")
    runtimes = ", ".join(dict.fromkeys(s.runtime for s in report.stages))
    title = ui.titled(
        "Parity with the PyTorch training-time model (float64)",
        f"{runtimes}, {describe_data(report.data)}",
    )
    return ui.table(title, columns, rows)


def _near_ties(stage: StageResult) -> str:
    """What explains a top-1 below its bound that is no failure."""
    count = stage.comparison.near_ties(bound(stage.stage, stage.precision))
    return f" ({count} near {'tie' if count == 1 else 'ties'})" if count else ""


def describe_data(data: Mapping[str, Any]) -> str:
    """The verification's images, in words."""
    if data.get("kind") == "noise":
        return "seeded noise (real images: --verify-data DIR)"
    skipped = data.get("skipped")
    left_out = f", left out: {in_words(skipped)}" if skipped else ""
    folder = str(data.get("folder"))
    return f"images in {folder}{'' if folder.endswith('.txt') else '/'}{left_out}"
