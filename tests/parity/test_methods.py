"""One bank with adapters of nine methods, one batch that mixes them, in every runtime.

The truth is PEFT's own unmerged model; of HTA and of a classifier alone the training-time model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from benchmarks.peft_methods import (
    CLASSES,
    TIMM,
    arguments_of,
    images,
    logits_of,
    timm_vit,
    trained,
)
from hhdeploy.adapters.format import save_adapter
from hhdeploy.adapters.importers import import_adapter
from hhdeploy.building import build
from hhdeploy.bundle import Bundle
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.exporting.bundles import export
from hhdeploy.quantising import CalibrationOptions, calibrate_bundle
from hhdeploy.runtime import open_session
from hhdeploy.training import attach, detach
from tests.calibration.conftest import write_pictures
from tests.support import assert_caught, assert_parity, random_adapter
from tests.support import logits_of as logits_of_ours

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about training

# Name -> PEFT's method and what differs from its arguments.
PEFTS = {
    "lora": ("LORA", {}),
    "dora": ("LORA", {"use_dora": True}),
    "ia3": ("IA3", {"feedforward_modules": ["mlp.fc2"]}),
    "adalora": ("ADALORA", {}),
    "vera": ("VERA", {}),
    "miss": ("MISS", {}),
    "bias": ("BEFT", {}),
}
NAMES = (*PEFTS, "hta", "head")
# Every adapter twice, neighbours differ.
BATCH = tuple(NAMES[(4 * i) % len(NAMES)] for i in range(2 * len(NAMES)))


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """The bundle, and what every image of `BATCH` (three in turn) has to be answered."""
    root = tmp_path_factory.mktemp("methods")
    vit, _ = timm_vit()
    state = {name: t.contiguous() for name, t in vit.model.state_dict().items()}
    save_file(state, root / "vit.safetensors")
    truth = {}
    for name, (method, changes) in PEFTS.items():
        arguments = {**arguments_of(method, TIMM), "modules_to_save": [TIMM.head], **changes}
        model = trained(vit, method, arguments)
        model.save_pretrained(str(root / "peft" / name))
        truth[name] = logits_of(model)
        save_adapter(import_adapter(root / "peft" / name, vit), root / name)
    own = {
        "hta": random_adapter(vit.facts, targets=("q", "v", "fc1"), r=2, classes=CLASSES, seed=4),
        "head": random_adapter(vit.facts, targets=(), classes=3, seed=5),
    }
    for name, adapter in own.items():
        save_adapter(adapter, root / name)
        attach(vit.model, adapter)
        truth[name] = logits_of_ours(vit.model, images())
        detach(vit.model)
        vit.model.float()
    export(
        vit.facts.model,
        {name: root / name for name in NAMES},
        root / "bundle",
        checkpoint=root / "vit.safetensors",
        cache=root / "cache",
        verify_images=1,
    )
    expected = np.full((len(BATCH), CLASSES), -np.inf)
    for i, name in enumerate(BATCH):
        expected[i, : truth[name].shape[1]] = truth[name][i % 3]
    return root / "bundle", expected


def batch():
    return images()[[i % 3 for i in range(len(BATCH))]]


def check(found, expected, stage, precision):
    """Each adapter's images in its own columns; another order of adapters must be seen."""
    for name in NAMES:
        own = [i for i, other in enumerate(BATCH) if other == name]
        columns = slice(3 if name == "head" else CLASSES)
        assert_parity(expected[own, columns], found[own, columns], stage, precision)
    whole = [i for i, name in enumerate(BATCH) if name != "head"]
    assert_caught(expected[whole], np.roll(found[whole], 1, axis=0), stage, precision)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_a_mixed_batch(bank, device):
    path, expected = bank
    with open_session(path, device=device, threads=1, cache=None) as session:
        check(session.run(batch(), list(BATCH)), expected, "branches", "float32")


def test_in_int8(bank, tmp_path):
    path, _ = bank
    for number, name in enumerate(NAMES):
        write_pictures(tmp_path / "pictures" / name / "a", 4, number)
    options = CalibrationOptions(cache=None, threads=1)
    calibrate_bundle(path, tmp_path / "pictures", CalibrationSettings(images=18), options)
    manifest = Bundle.open(path).manifest
    files = [tmp_path / "pictures" / name / "a" / "0.png" for name in BATCH]
    from hhdeploy.preprocess import open_image

    with open_session(path, threads=1, cache=None) as session:
        x = np.concatenate(
            [
                session.preprocess([open_image(f)], adapter=n)
                for f, n in zip(files, BATCH, strict=True)
            ]
        )
        exact = session.run(x, list(BATCH))
    with open_session(path, threads=1, cache=None, precision="int8") as session:
        found = session.run(x, list(BATCH))
    assert {"float32", "int8"} <= set(manifest.graphs)
    check(found, exact, "quantised", "int8")


def test_as_an_engine(bank):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path, _ = bank
    entry = build(path, backend="tensorrt-rtx")
    assert entry.bytes > 10_000
    assert entry.slots[1] == len(NAMES) + 1
