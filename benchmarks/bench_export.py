"""One more adapter of a traced backbone, against tracing the adapted model again.

    python -m benchmarks.bench_export [--model vit_base_patch16_224] [--pairs 3]

Two ratios: graph work in memory (torch.onnx.export against clone + fold), and with writing the
ONNX file and hashing it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
import onnx_ir as ir

from benchmarks.harness import report
from benchmarks.models import adapter_directories
from hhdeploy.adapters.format import load_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.trace import base_graph, trace
from hhdeploy.exporters.writer import save_graph
from hhdeploy.files.writing import sha256_of
from hhdeploy.timing import paired


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--pairs", default=3, show_default=True)
def main(model: str, pairs: int) -> None:
    """Trace again against fold, in memory and with files."""
    backbone = load_backbone(BackboneSpec(model, pretrained=False))
    base = base_graph(backbone, None)
    adapter = load_adapter(adapter_directories(model, 1)["task0"])
    scratch = Path(tempfile.mkdtemp())

    def read(graph: ir.Model) -> None:
        """A weight is folded when it is read."""
        for value in graph.graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()

    def write(graph: object) -> None:
        save_graph(graph, scratch / "model.onnx")  # type: ignore[arg-type]
        for name in ("model.onnx", "model.onnx.data"):
            sha256_of(scratch / name)

    results = {
        "model": model,
        "trace / fold, graph work in memory": paired(
            lambda: trace(backbone),
            lambda: read(folded_model(base, adapter)),
            pairs=pairs,
            warmup=1,
        ),
        "trace / fold, with writing and hashing": paired(
            lambda: write(trace(backbone)),
            lambda: write(folded_model(base, adapter)),
            pairs=pairs,
            warmup=1,
        ),
    }
    shutil.rmtree(scratch)
    report("one more adapter", results)


if __name__ == "__main__":
    main()
