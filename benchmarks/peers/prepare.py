"""Make the files of a case, those that are missing: some minutes the first time."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import calibrated, starter_images
from benchmarks.peers.tasks import BATCH, CLASSES, RANK, SCALE, Case, mixes, task
from benchmarks.peers.torches import base_model, peft_model
from hhdeploy.adapters.format import save_adapter
from hhdeploy.adapters.importers import import_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import Backbone, BackboneSpec
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.membership import remove_adapter
from hhdeploy.exporting.bundles import export

ARGS: Mapping[str, int] = {"num_classes": CLASSES}
# INT8's ranges come from these; whatever else a bank holds, calibration has not seen.
CALIBRATED_ON = 8


def prepare(case: Case, bank: int) -> None:
    """All that peers read, for that many adapters."""
    case.folder.mkdir(parents=True, exist_ok=True)
    count = max(bank, CALIBRATED_ON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about configurations, torch's about exports
        backbone = _base(case)
        _adapters(case, backbone, count)
        _graphs(case)
        _onnx_adapters(case, count)
        _bundle(case)
        _truth(case, count)


def _base(case: Case) -> Backbone:
    from safetensors.torch import save_file

    backbone = load_backbone(BackboneSpec(case.model, dict(ARGS), pretrained=False))
    if not case.weights.is_file():
        save_file(backbone.model.state_dict(), str(case.weights))
    return backbone


def _adapters(case: Case, backbone: Backbone, count: int) -> None:
    """PEFT writes each, from random values of trained size; our importer converts it."""
    import peft
    import torch

    missing = [i for i in range(count) if not case.imported(task(i)).is_dir()]
    if not missing:
        return
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(SCALE * RANK),
        target_modules=["attn.qkv"],
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(base_model(case), config)
    for index in missing:
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.requires_grad:
                    size = 0.05 if "lora_B" in name or "head" in name else value.shape[-1] ** -0.5
                    value.copy_(torch.randn(value.shape, generator=generator) * size)
        path = case.peft(task(index))
        shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(str(path))
        save_adapter(import_adapter(path, backbone), case.imported(task(index)), overwrite=True)


def _graphs(case: Case) -> None:
    """The bare model by torch's exporter, and the same with LoRA and head as inputs."""
    if case.graph_with_inputs.is_file():
        return
    import onnx
    import torch

    images = torch.zeros(BATCH, 3, 224, 224)
    shapes = ({0: torch.export.Dim("batch")},)
    bare = base_model(case)
    torch.manual_seed(0)
    # Every adapter brings its own; the exporter would leave zeros out of the graph.
    torch.nn.init.normal_(bare.head.bias)
    program = torch.onnx.export(
        bare,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(case.graph, external_data=False)
    model = onnx.load(case.graph)
    sites = _qkv(model, case)
    content = case.graph.read_bytes()
    tensors = {t.name: t for t in model.graph.initializer}
    names = {site: tensors[node.input[1]] for site, node in sites.items()}
    names |= {f"head.{part}": tensors[f"head.{part}"] for part in ("weight", "bias")}
    offsets = {name: content.find(tensor.raw_data) for name, tensor in names.items()}
    assert min(offsets.values()) > 0
    (case.folder / "offsets.json").write_text(json.dumps(offsets))
    _with_lora_inputs(model, sites)
    onnx.save(model, case.graph_with_inputs)


def _qkv(model, case: Case) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """timm's name of a weight -> the MatMul that has it, transposed; in the order of blocks."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul"
        and len(shape := shapes.get(node.input[1], ())) == 2
        and shape[1] == 3 * shape[0]
    ]
    assert len(found) == 12, f"expected 12 qkv products in {case.graph}, found {len(found)}"
    return {f"blocks.{i}.attn.qkv": node for i, node in enumerate(found)}


def _with_lora_inputs(model, sites) -> None:  # type: ignore[no-untyped-def]
    """Add x A B beside every product; A, B and the head become inputs with defaults."""
    from onnx import helper, numpy_helper

    graph = model.graph
    for site, product in sites.items():
        weight = next(t for t in graph.initializer if t.name == product.input[1])
        wide, out = weight.dims
        given = {f"{site}.A": (wide, RANK), f"{site}.B": (RANK, out)}
        for name, shape in given.items():
            graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        whole = product.output[0]
        product.output[0] = f"{whole}.bare"
        nodes = [
            helper.make_node("MatMul", [product.input[0], f"{site}.A"], [f"{site}.low"]),
            helper.make_node("MatMul", [f"{site}.low", f"{site}.B"], [f"{site}.delta"]),
            helper.make_node("Add", [f"{whole}.bare", f"{site}.delta"], [whole]),
        ]
        place = list(graph.node).index(product) + 1
        for node in reversed(nodes):
            graph.node.insert(place, node)
    changed = {f"{site}.{part}" for site in sites for part in "AB"} | {"head.weight", "head.bias"}
    for tensor in graph.initializer:
        if tensor.name in changed:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )


def _onnx_adapters(case: Case, count: int) -> None:
    import onnxruntime

    from benchmarks.peers.runtimes import lora_tensors

    case.onnx_adapter("").parent.mkdir(exist_ok=True)
    for name in map(task, range(count)):
        path = case.onnx_adapter(name)
        if path.is_file():
            continue
        values = {
            key: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for key, value in lora_tensors(case, name).items()
        }
        written = onnxruntime.AdapterFormat()
        written.set_adapter_version(1)
        written.set_model_version(1)
        written.set_parameters(values)
        written.export_adapter(str(path))


def _bundle(case: Case) -> None:
    """Calibrated on 8 adapters, of which one stays in it: the others are added live."""
    if not (case.bundle / "hhdeploy.json").is_file():
        names = [task(i) for i in range(CALIBRATED_ON)]
        scratch = case.folder / "calibrating"
        shutil.rmtree(scratch, ignore_errors=True)
        export(
            case.model,
            {name: case.imported(name) for name in names},
            scratch,
            model_args=dict(ARGS),
            pretrained=False,
            verify=False,
            cache=None,
        )
        calibrated(scratch, "int8")
        for name in names[1:]:
            remove_adapter(scratch, name)
        shutil.rmtree(case.bundle, ignore_errors=True)
        scratch.rename(case.bundle)
    if not (case.folder / "images.npy").is_file():
        np.save(
            case.folder / "images.npy", starter_images(Bundle.open(case.bundle).manifest, BATCH)
        )


def _truth(case: Case, count: int) -> None:
    """[adapters, images, classes] by PEFT in float64: what some batch asks for, the rest NaN."""
    path = case.folder / "truth.npy"
    known: NDArray[np.float64] = np.full((0, BATCH, CLASSES), np.nan)
    if path.is_file():
        known = np.load(path)
    if len(known) >= count:
        return
    import torch

    model = peft_model(case, [task(i) for i in range(count)]).double()
    images = torch.from_numpy(case.images()).double()
    table = np.full((count, BATCH, CLASSES), np.nan)
    table[: len(known)] = known
    wanted = {(number, i) for bank in (1, count) for m in mixes(bank) for i, number in enumerate(m)}
    with torch.inference_mode():
        for number in sorted({number for number, _ in wanted}):
            own = [i for i in range(BATCH) if (number, i) in wanted]
            if np.isfinite(table[number, own]).all():
                continue
            model.set_adapter(task(number))
            table[number, own] = model(images[own]).numpy()
    np.save(path, table)
