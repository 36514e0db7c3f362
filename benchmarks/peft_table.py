"""Every method of the installed PEFT, imported: live, folded, compressed or refused, and how exact.

    python -m benchmarks.peft_table                          the table, on timm and transformers
    python -m benchmarks.peft_table --random 500 --seed 0    random adapters, whole and damaged

The error is that of the imported adapter (float32 tensors, computed in float64) against PEFT's
unmerged model, over the range of its logits. The last line is JSON. Exit code 1: an error above
1e-5, a wrong answer without a word, a traceback, or too few of the random adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import peft_random
from benchmarks.peft_methods import (
    BOUND,
    PROMPTS,
    Names,
    answers,
    arguments_of,
    logits_of,
    quiet,
    range_error,
    timm_vit,
    trained,
    transformers_vit,
)
from hhdeploy.adapters.importers import ImportOptions, import_adapter
from hhdeploy.backbones.spec import Backbone
from hhdeploy.errors import HhdeployError

COMPRESSED_RANK = 16

# Variants of LoRA that are methods of their own to everybody but PEFT's file format.
VARIANTS: dict[str, dict[str, Any]] = {
    "LORA rsLoRA": {"use_rslora": True},
    "LORA DoRA": {"use_dora": True},
    "LORA PiSSA": {"init_lora_weights": "pissa"},
    "LORA OLoRA": {"init_lora_weights": "olora"},
    "LORA lora_bias": {"lora_bias": True},
    "LORA bias=lora_only": {"bias": "lora_only"},
    "LORA bias=all": {"bias": "all"},
}


def main(arguments: Sequence[str]) -> int:
    """Print the table, or the counts of random adapters; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, metavar="N", help="import N random adapters instead")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with quiet() as folder:
        if chosen.random is None:
            result = table(folder)
        else:
            result = peft_random.run(chosen.random, chosen.seed, folder)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({**result, "seconds": seconds}))
    return int(bool(result["wrong"]))


def methods() -> list[str]:
    """All that the installed PEFT has, then the variants of LoRA."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
    return [*names, *VARIANTS]


def table(folder: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Import an adapter of every method on both models; prints a line each."""
    import peft

    rows: list[dict[str, Any]] = []
    print(f"PEFT {peft.__version__}", flush=True)
    backbones = {"timm": timm_vit(), "transformers": transformers_vit(folder)}
    for method in methods() if only is None else only:
        for model, (backbone, names) in backbones.items():
            row = {"method": method, "model": model, **outcome(method, backbone, names, folder)}
            rows.append(row)
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            print(f"{method:24}{model:14}{row['as']:12}{error:8}{row['said']}", flush=True)
    inexact = [r for r in rows if r["as"] in ("live", "fold") and not r["error"] <= BOUND]
    counts = {kind: sum(r["as"] == kind for r in rows) for kind in ("live", "fold", "refused")}
    compressed = sum(r["compressed"] is not None for r in rows)
    worst = max((r["error"] for r in rows if r["error"] is not None), default=None)
    wrong = [f"{r['method']} on {r['model']}" for r in inexact]
    return {
        "peft": peft.__version__,
        "methods": len({r["method"] for r in rows}),
        **counts,
        "compressed": compressed,
        "worst": worst,
        "wrong": wrong,
    }


def outcome(method: str, backbone: Backbone, names: Names, folder: Path) -> dict[str, Any]:
    """How one method comes in: what as, the error, and what was said."""
    kind, _, variant = method.partition(" ")
    nothing = {"error": None, "compressed": None}
    if kind in PROMPTS:
        model = None
        source = _prompt_directory(kind, folder)
    else:
        arguments = {
            **arguments_of(kind, names),
            **(VARIANTS[method] if variant else {}),
            "modules_to_save": [names.head],
        }
        try:
            model = trained(backbone, kind, arguments)
        except Exception as error:  # noqa: BLE001  (PEFT's own refusal is the table's entry)
            return {**nothing, "as": "not made", "said": f"PEFT: {_short(error)}"}
        source = folder / "adapter"
        model.save_pretrained(str(source))
    try:
        adapter = import_adapter(source, backbone)
    except HhdeployError as error:
        return {**nothing, "as": "refused", "said": _short(error)}
    error = range_error(logits_of(model), answers(backbone, adapter))
    if not adapter.config.fold_only:
        return {"as": "live", "error": error, "compressed": None, "said": _ranks(adapter)}
    compressed, said = _compressed(source, backbone)
    return {"as": "fold", "error": error, "compressed": compressed, "said": said}


def _compressed(source: Path, backbone: Backbone) -> tuple[float | None, str]:
    options = ImportOptions(compress_rank=COMPRESSED_RANK, accept_error=1.0)
    try:
        adapter = import_adapter(source, backbone, options)
    except HhdeployError as error:
        return None, f"not compressed: {_short(error)}"
    assert adapter.config.compressed is not None
    found = adapter.config.compressed.max_range_error
    return found, f"compressed to rank {COMPRESSED_RANK}: {found:.0e}"


def _ranks(adapter: Any) -> str:
    found = {t.lora_A.shape[0] for t in adapter.sites.values() if t.lora_A is not None}
    parts = {part for t in adapter.sites.values() for part in t.parts}
    ranks = f"rank {', '.join(map(str, sorted(found)))}" if found else ""
    return " + ".join(filter(None, [ranks, *sorted(parts)]))


def _prompt_directory(kind: str, folder: Path) -> Path:
    """A file as such a method leaves it, as far as an import looks at it."""
    from safetensors.torch import save_file

    source = folder / "prompts"
    source.mkdir(exist_ok=True)
    save_file(
        {"base_model.model.prompt_embeddings": torch.zeros(4, 64)},
        str(source / "adapter_model.safetensors"),
    )
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    return source


def _short(error: Exception) -> str:
    text = str(error).partition("adapter_config.json: ")[2] or str(error)
    return " ".join(text.split())[:110]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
