"""hhdeploy triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hhdeploy.choices import Precision
from hhdeploy.cli import ui
from hhdeploy.cli.progress import steps

if TYPE_CHECKING:
    from hhdeploy.exporters.triton import TritonBackend
    from hhdeploy.repositories.triton import TritonModel


@click.command()
@ui.repository_options
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="tensorrt takes an engine that hhdeploy build made.",
)
@click.option("--gpu-arch", metavar="SM", help="tensorrt: which engine, if there are several.")
@click.option(
    "--max-batch", type=click.IntRange(1), help="Default: 32, or the most that the engine takes."
)
@click.option(
    "--preferred-batch",
    multiple=True,
    type=click.IntRange(1),
    help="Run a batch of this size as soon as it is there. Repeatable.",
)
@click.option(
    "--max-queue-delay-us",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="How long a request may wait for others.",
)
@click.option("--instances", default=1, show_default=True, type=click.IntRange(1))
@click.option("--gpu/--cpu", default=None, help="Where it runs; default: GPUs if there are any.")
@click.option(
    "--ensemble",
    is_flag=True,
    help="Also a model that takes pictures, with what the logits mean.",
)
@ui.overwrite_model_option
@ui.json_option
def command(
    bundle: Path,
    out: Path,
    name: str | None,
    precision: Precision,
    backend: TritonBackend,
    gpu_arch: str | None,
    max_batch: int | None,
    preferred_batch: tuple[int, ...],
    max_queue_delay_us: int,
    instances: int,
    gpu: bool | None,
    ensemble: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write BUNDLE as a model of the Triton Inference Server repository OUT.

    The bank is baked in: write the model again after adding or removing adapters. Other models
    in OUT stay.

    \b
      hhdeploy triton bundle/ models/ --precision float16
      hhdeploy triton bundle/ models/ --backend tensorrt --preferred-batch 8
      hhdeploy triton bundle/ models/ --ensemble
    """
    from hhdeploy.repositories.triton import TritonOptions, write_triton_repository

    options = TritonOptions(
        name=name,
        precision=precision,
        backend=backend,
        gpu_arch=gpu_arch,
        max_batch=max_batch,
        preferred_batch=preferred_batch,
        max_queue_delay_us=max_queue_delay_us,
        instances=instances,
        gpu=gpu,
        ensemble=ensemble,
    )
    with steps(as_json) as step:
        model = write_triton_repository(bundle, out, options, overwrite=overwrite, progress=step)
    if as_json:
        ui.print_json(model.to_json())
        return
    ui.say_unverified(bundle, model.unverified)
    click.echo(_summary(model))


def _summary(model: TritonModel) -> str:
    """What was written, how to serve it, and a client to paste."""
    written = "\n".join(f"  {model.repository / file}" for file in model.files)
    needs = ""
    if model.engine is not None:
        where = ", ".join(model.engine.architectures) or "Ampere and newer"
        needs = f"It needs a Triton with TensorRT {model.engine.version}, on {where}.\n"
    for ensemble in dict.fromkeys(model.ensembles.values()):
        asked = ", ".join(name for name, other in model.ensembles.items() if other == ensemble)
        needs += f"{ensemble} takes pictures, for {asked}.\n"
    if model.removed:
        needs += (
            f"Removed {', '.join(model.removed)}: made for the {model.name} that was there before. "
            "--ensemble writes what takes pictures.\n"
        )
    shape = ", ".join(map(str, model.input_size))
    return (
        f"Wrote Triton model {model.name}:\n{written}\n{needs}\n"
        f"Serve:  tritonserver --model-repository {ui.quoted(model.repository)}\n"
        f"Look:   curl localhost:8000/v2/models/{model.name}/config\n"
        "Ask, with the rows of adapters.json (pip install 'tritonclient[grpc]'):\n\n"
        "    import numpy as np\n"
        "    from tritonclient.grpc import InferenceServerClient, InferInput\n"
        f'    images = InferInput("images", [1, {shape}], "FP32")\n'
        f"    images.set_data_from_numpy(np.zeros((1, {shape}), np.float32))\n"
        f"{_ids(model)}"
        '    client = InferenceServerClient("localhost:8001")\n'
        f'    logits = client.infer("{model.name}", {_inputs(model)}).as_numpy("logits")\n'
    )


def _ids(model: TritonModel) -> str:
    """The lines that choose the adapter, none for a folded bundle."""
    name, row = list(model.rows.items())[-1]
    if row is None:
        return ""
    return (
        '    ids = InferInput("adapter_ids", [1, 1], "INT64")\n'
        f"    ids.set_data_from_numpy(np.array([[{row}]], np.int64))  # {name}\n"
    )


def _inputs(model: TritonModel) -> str:
    return "[images, ids]" if _ids(model) else "[images]"
