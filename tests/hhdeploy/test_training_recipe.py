"""`hhdeploy train`: it learns, repeats and resumes to the bit, and refuses what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.adapters.format import load_adapter
from hhdeploy.cli import main
from hhdeploy.errors import AdapterError, BackboneError, DataError, PlanError, WriteError
from hhdeploy.preprocess import Preprocess, open_image
from hhdeploy.training import attach
from hhdeploy.training.data import (
    BatchSource,
    PixelCache,
    Samples,
    canvas_view,
    crop_box,
    read_image_folder,
)
from hhdeploy.training.loop import learning_rate
from hhdeploy.training.recipe import (
    EpochReport,
    StepReport,
    TrainingError,
    TrainResult,
    TrainSettings,
    train,
)
from hhdeploy.training.state import STATE_FILE, StateDirectory
from tests.support import TINY_ARGS, TINY_MODEL, tiny_spec
from tests.workshop import run_python

CLASSES = {"bars": (200, 60, 40), "discs": (40, 180, 80), "frames": (60, 80, 210)}
PER_CLASS = 13
EPOCHS = 4


def _draw(name: str, random: np.random.Generator) -> Image.Image:
    """One noisy 41 x 37 image: a coloured shape of its class at a random place."""
    noise = random.integers(0, 70, (37, 41, 3), np.uint8)
    image = Image.fromarray(noise)
    pen, colour = ImageDraw.Draw(image), CLASSES[name]
    x, y = (int(n) for n in random.integers(2, 12, 2))
    if name == "bars":
        for offset in (0, 8, 16):
            pen.rectangle((x + offset, y, x + offset + 3, y + 22), fill=colour)
    elif name == "discs":
        pen.ellipse((x, y, x + 22, y + 22), fill=colour)
    else:
        pen.rectangle((x, y, x + 22, y + 22), outline=colour, width=5)
    return image


def draw_folder(directory: Path, names: Sequence[str], per_class: int, seed: int) -> Path:
    """A seeded DIR/CLASS/image folder."""
    random = np.random.default_rng(seed)
    for name in names:
        (directory / name).mkdir(parents=True)
        for i in range(per_class):
            _draw(name, random).save(directory / name / f"{i:03}.png")
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("images") / "shapes", list(CLASSES), PER_CLASS, 3)


@pytest.fixture(scope="module")
def base_settings(images: Path) -> TrainSettings:
    return TrainSettings(
        model=TINY_MODEL,
        data=images,
        model_args=TINY_ARGS,
        pretrained=False,
        val_fraction=0.25,
        epochs=EPOCHS,
        batch_size=8,
        device="cpu",
        threads=1,
    )


@pytest.fixture(scope="module")
def trained(
    base_settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainSettings, TrainResult]:
    """The uninterrupted training that the others are compared with."""
    settings = replace(base_settings, out=tmp_path_factory.mktemp("trained") / "shapes")
    return settings, train(settings)


class StopError(Exception):
    """Stands for Ctrl-C in these tests."""


def interrupt_at(epoch: int, step: int) -> Callable[[StepReport | EpochReport], None]:
    """A callback that raises in the given epoch and step; step 0: right after the epoch."""

    def callback(report: StepReport | EpochReport) -> None:
        now = (report.epoch, report.step if isinstance(report, StepReport) else 0)
        if now == (epoch, step):
            raise StopError

    return callback


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def cli_arguments(images: Path, *more: str | Path) -> list[str | Path]:
    tiny = ["--model", TINY_MODEL, "--model-args", json.dumps(TINY_ARGS), "--no-pretrained"]
    short = ["--epochs", "2", "--batch-size", "8", "--threads", "1", "--device", "cpu"]
    return [*tiny, *short, "--data", images, *more]


# --- learning ---------------------------------------------------------------------------------


def test_learns_and_writes_a_whole_adapter(trained: tuple[TrainSettings, TrainResult]) -> None:
    settings, result = trained
    assert settings.out is not None
    assert result.last.val_top1 is not None
    assert result.last.val_top1 >= 0.8  # chance is 1/3
    assert result.history[-1].loss < 0.7 * result.history[0].loss
    assert [e.epoch for e in result.history] == [1, 2, 3, 4]
    assert (result.train_images, result.val_images) == (30, 9)
    assert sorted(contents(settings.out)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not StateDirectory.beside(settings.out).exists

    adapter = load_adapter(settings.out)
    config, record = adapter.config, adapter.config.extra["training"]
    assert config.base_model.startswith(f"{TINY_MODEL}.")
    assert config.base_model_args == TINY_ARGS
    assert config.base_sha256 is not None
    assert len(config.base_sha256) == 64
    assert config.class_names == ("bars", "discs", "frames")
    assert config.target_modules == ("q", "k", "v", "proj")
    assert config.preprocess is not None
    assert config.preprocess.input_size == (3, 32, 32)
    assert len(adapter.sites) == result.sites == 8
    assert adapter.parameters == result.parameters
    assert record["recipe"]["optimizer"] == "AdamW"
    assert record["recipe"]["lr"] == settings.lr
    assert record["val_top1"] == result.last.val_top1
    assert record["train_images"] == 30
    assert {"hhdeploy", "torch", "timm", "python"} == set(record["versions"])


def test_the_adapter_gives_the_reported_accuracy(
    trained: tuple[TrainSettings, TrainResult],
) -> None:
    """Read back, on a fresh backbone, with inference's own preprocessing."""
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec

    settings, result = trained
    assert settings.out is not None
    adapter = load_adapter(settings.out)
    spec = BackboneSpec(TINY_MODEL, TINY_ARGS, pretrained=False, seed=settings.seed)
    backbone = load_backbone(spec)
    assert backbone.facts.sha256 == adapter.config.base_sha256
    model = attach(backbone.model, adapter).eval()
    val = read_image_folder(settings.data, None, settings.val_fraction, settings.seed).val
    assert adapter.config.preprocess is not None
    inputs = np.stack([adapter.config.preprocess(open_image(p)) for p in val.paths])
    with torch.no_grad():
        found = model(torch.from_numpy(inputs)).argmax(dim=1).tolist()
    right = sum(a == b for a, b in zip(found, val.labels, strict=True))
    assert right / len(val) == result.last.val_top1


def test_every_tensor_of_the_adapter_is_trained(trained: tuple[TrainSettings, TrainResult]) -> None:
    """All tensors left their start; u and v too, which a zero start would forbid."""
    settings, _ = trained
    assert settings.out is not None
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.training import extract
    from hhdeploy.training.data import derived_seed

    adapter = load_adapter(settings.out)
    seed = derived_seed(settings.seed, "weights")
    start = extract(attach(load_backbone(tiny_spec()).model, adapter.config, seed=seed))
    for name, site in adapter.sites.items():
        for tensor in ("u", "v", "d", "lora_A", "lora_B"):
            before, after = getattr(start.sites[name], tensor), getattr(site, tensor)
            assert not np.array_equal(before, after), f"{name}.{tensor}"


def test_sequential_form_learns(base_settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(
        base_settings,
        form="sequential",
        reflection="orthogonal",
        r=2,
        augment=False,
        num_workers=2,
        out=tmp_path / "seq",
    )
    result = train(settings)
    assert result.last.val_top1 is not None
    assert result.last.val_top1 >= 0.8
    adapter = load_adapter(tmp_path / "seq")
    assert adapter.config.target_modules == ("proj", "fc2")
    assert adapter.config.extra["training"]["recipe"]["augmentation"] is None
    assert set(adapter.sites) == {
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.proj", "mlp.fc2")
    }


def test_adapted_weights_are_computed_once_a_step(
    base_settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a training step and once for the whole validation, whatever its batches."""
    from hhdeploy.training.householder import HouseholderMatrix

    whole, calls = HouseholderMatrix.forward, []

    def forward(self: HouseholderMatrix) -> torch.Tensor:
        calls.append(self)
        return whole(self)

    monkeypatch.setattr(HouseholderMatrix, "forward", forward)
    steps = []
    settings = replace(base_settings, epochs=1, batch_size=4, out=tmp_path / "o")
    train(settings, lambda r: steps.append(calls.count(calls[0])))
    *during, after = steps  # after: the report of the epoch, behind the validation
    assert during == list(range(during[0], during[0] + 8))
    assert after == during[-1] + 1


def test_validation_folder_and_best_epoch(base_settings: TrainSettings, tmp_path: Path) -> None:
    val = draw_folder(tmp_path / "val", list(CLASSES), 5, seed=8)
    result = train(replace(base_settings, val_data=val, epochs=2, out=tmp_path / "o"))
    assert (result.train_images, result.val_images) == (39, 15)
    assert result.best is not None
    top1s = [e.val_top1 for e in result.history]
    assert result.best.val_top1 == max(t for t in top1s if t is not None)
    assert result.last is result.history[-1]


def test_paths_may_be_strings(base_settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(base_settings, data=str(base_settings.data), out=str(tmp_path / "o"))
    assert settings == replace(base_settings, out=tmp_path / "o")


@pytest.mark.parametrize("turn", [False, True])
def test_a_class_is_a_name_whether_listed_or_a_folder(tmp_path: Path, turn: bool) -> None:
    """Numbers above 9: a folder has them sorted as text, a list as numbers."""
    numbers = [str(n) for n in range(12)]
    folder = tmp_path / "folder"
    for number in numbers:
        (folder / number).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(folder / number / f"{i}.png")
    listed = tmp_path / "list.txt"
    paths = sorted(p.relative_to(tmp_path) for p in folder.rglob("*.png"))
    listed.write_text("".join(f"{p.as_posix()} {p.parent.name}\n" for p in paths))
    data, val = (listed, folder) if turn else (folder, listed)
    found = read_image_folder(data, val, 0.1, 0)
    for part in (found.train, found.val):
        assert len(part.paths) == 24
        for path, label in zip(part.paths, part.labels, strict=True):
            assert found.class_names[label] == path.parent.name


def test_lists_of_vtab(images: Path, tmp_path: Path) -> None:
    """train800val200.txt and test.txt, whose labels are numbers; they tell a resumed training."""
    paths = sorted(images.rglob("*.png"))
    numbers = {name: i for i, name in enumerate(sorted(CLASSES))}
    lines = [f"{images.name}/{p.relative_to(images)} {numbers[p.parent.name]}\n" for p in paths]
    lists = [images.parent / name for name in ("train800val200.txt", "test.txt")]
    for file, chosen in zip(lists, (lines[::2], lines[1::2]), strict=True):
        file.write_text("".join(chosen))
    found = read_image_folder(lists[0], lists[1], 0.25, 0)
    assert found.class_names == tuple(map(str, range(len(CLASSES))))
    assert (len(found.train), len(found.val)) == (len(lines[::2]), len(lines[1::2]))
    truth = dict(zip(found.train.paths, found.train.labels, strict=True))
    assert {p.resolve(): n for p, n in truth.items()} == {
        p.resolve(): numbers[p.parent.name] for p in paths[::2]
    }
    relabelled = [
        line.replace(" 0\n", " 1\n", 1) if i == 0 else line for i, line in enumerate(lines[::2])
    ]
    lists[0].write_text("".join(relabelled))
    assert read_image_folder(lists[0], lists[1], 0.25, 0).digest != found.digest


# --- same bits --------------------------------------------------------------------------------


def test_same_seed_same_bits_whatever_the_cache_and_workers(
    trained: tuple[TrainSettings, TrainResult], tmp_path: Path
) -> None:
    settings, result = trained
    assert settings.out is not None
    again = train(replace(settings, out=tmp_path / "again", cache_mb=0, num_workers=3))
    assert contents(tmp_path / "again") == contents(settings.out)
    assert again.history == result.history
    train(replace(settings, out=tmp_path / "other", seed=1, epochs=1))
    train(replace(settings, out=tmp_path / "first", epochs=1))
    tensors = [(tmp_path / n / TENSOR_FILE).read_bytes() for n in ("other", "first")]
    assert tensors[0] != tensors[1]


@pytest.mark.parametrize(("epoch", "step"), [(2, 0), (3, 3), (EPOCHS, 0)])
def test_resume_equals_uninterrupted_to_the_bit(
    trained: tuple[TrainSettings, TrainResult], tmp_path: Path, epoch: int, step: int
) -> None:
    settings, result = trained
    assert settings.out is not None
    cut = replace(settings, out=tmp_path / "cut")
    with pytest.raises(StopError):
        train(cut, interrupt_at(epoch, step))
    assert not (tmp_path / "cut").exists()
    state = tmp_path / "cut.training"
    done = epoch if step == 0 else epoch - 1
    assert sorted(contents(state)) == [f"epoch-{done}.safetensors", STATE_FILE]
    resumed = train(replace(cut, resume=True))
    assert contents(tmp_path / "cut") == contents(settings.out)
    assert resumed.history == result.history
    assert not state.exists()


def test_what_fails_before_its_first_epoch_leaves_nothing(
    trained: tuple[TrainSettings, TrainResult], images: Path, tmp_path: Path
) -> None:
    settings, _ = trained
    assert settings.out is not None
    cut = replace(settings, out=tmp_path / "cut")
    with pytest.raises(StopError):
        train(cut, interrupt_at(1, 2))
    assert not list(tmp_path.iterdir())
    data = shutil.copytree(images, tmp_path / "data")
    (data / "discs" / "zz.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"zz\.png cannot be decoded"):
        train(replace(cut, data=data))
    (data / "discs" / "zz.png").unlink()
    train(replace(cut, data=data))
    assert contents(tmp_path / "cut") == contents(settings.out)


# --- resume refuses ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(
    base_settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory
) -> TrainSettings:
    """Settings of a training that ended after its first epoch. Read only."""
    settings = replace(base_settings, out=tmp_path_factory.mktemp("cut") / "half", epochs=2)
    with pytest.raises(StopError):
        train(settings, interrupt_at(1, 0))
    return settings


@pytest.fixture
def unfinished(interrupted: TrainSettings, tmp_path: Path) -> TrainSettings:
    """The test's own copy of it."""
    assert interrupted.out is not None
    shutil.copytree(f"{interrupted.out}.training", tmp_path / "half.training")
    return replace(interrupted, out=tmp_path / "half")


def test_unfinished_state_needs_a_decision(unfinished: TrainSettings) -> None:
    with pytest.raises(TrainingError, match=r"half\.training holds .* `resume=True`, or delete"):
        train(unfinished)


def test_a_full_disk_names_the_epochs_that_are_kept(
    unfinished: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise WriteError("No space left on device.")

    monkeypatch.setattr("hhdeploy.training.recipe._data", full)
    with pytest.raises(
        WriteError, match=r"^No space .* kept in .*half\.training: .* `resume=True`"
    ):
        train(replace(unfinished, resume=True))
    assert unfinished.out is not None
    with pytest.raises(WriteError, match=r"No space left on device\.$"):
        train(replace(unfinished, out=unfinished.out.with_name("other")))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lr": 1e-3}, "`lr` is 0.001, but .* has 0.005"),
        ({"targets": ("q", "proj")}, "`targets` is"),
        ({"epochs": 3}, "`epochs` is 3"),
        ({"flip": False}, "`flip` is False"),
        ({"linear_probe": True}, "`linear_probe` is True"),
        ({"val_fraction": 0.5}, "digest of the image names"),
        ({"model_args": {**TINY_ARGS, "depth": 1}}, "`model_args` is"),
    ],
)
def test_resume_names_the_setting_that_differs(
    unfinished: TrainSettings, change: dict[str, Any], name: str
) -> None:
    with pytest.raises(TrainingError, match=name):
        train(replace(unfinished, resume=True, **change))


def test_resume_refuses_a_damaged_state(unfinished: TrainSettings) -> None:
    assert unfinished.out is not None
    state = StateDirectory.beside(unfinished.out)
    tensor_file = state.path / "epoch-1.safetensors"
    tensor_file.write_bytes(tensor_file.read_bytes()[:-4] + b"oops")
    with pytest.raises(TrainingError, match=r"another sha256 .* Delete that directory"):
        train(replace(unfinished, resume=True))
    (state.path / STATE_FILE).write_text("{")
    with pytest.raises(TrainingError, match=r"state\.json: .* Delete that directory"):
        train(replace(unfinished, resume=True))


def test_resume_without_a_state(base_settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nothing to continue\. Leave out `resume=True`"):
        train(replace(base_settings, out=tmp_path / "none", resume=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_training_at_a_time_has_an_output(
    base_settings: TrainSettings, tmp_path: Path, overwrite: bool
) -> None:
    settings = replace(base_settings, out=tmp_path / "o", epochs=2, overwrite=overwrite)
    refused = []

    def callback(report: StepReport | EpochReport) -> None:
        # Before there is a state, and once there is one.
        with pytest.raises(TrainingError, match=rf"into .*/o is running \(process {os.getpid()}\)"):
            train(replace(settings, seed=1, resume=report.epoch == 2))
        refused.append(report.epoch)
        if report.epoch == 2:
            raise StopError

    with pytest.raises(StopError):
        train(settings, callback)
    assert set(refused) == {1, 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.training"]  # no lock is left
    train(replace(settings, resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_the_lock_of_a_training_that_was_killed_keeps_nobody_out(
    base_settings: TrainSettings, tmp_path: Path
) -> None:
    (tmp_path / ".o.training.lock").write_text("123")
    (tmp_path / ".o.training.lock").chmod(0o444)
    train(replace(base_settings, epochs=1, out=tmp_path / "o"))
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_a_directory_of_that_name_keeps_its_other_files(
    base_settings: TrainSettings, tmp_path: Path
) -> None:
    (tmp_path / "o.training").mkdir()
    names = (
        "notes.txt",
        "epoch-best.safetensors",
        "epoch-1.safetensors.old",
        "my-epoch-1.safetensors",
    )
    for name in names:
        (tmp_path / "o.training" / name).write_text("mine")
    settings = replace(base_settings, epochs=2, out=tmp_path / "o")
    with pytest.raises(StopError):
        train(settings, interrupt_at(1, 0))
    train(replace(settings, resume=True))
    assert contents(tmp_path / "o.training") == dict.fromkeys(names, b"mine")


def test_a_file_of_a_state_s_name_that_is_none_is_not_written_over(
    base_settings: TrainSettings, tmp_path: Path
) -> None:
    (tmp_path / "o.training").mkdir()
    (tmp_path / "o.training" / "epoch-1.safetensors").write_text("mine")
    with pytest.raises(TrainingError, match=r"no epoch-1\.safetensors without state\.json.* Move"):
        train(replace(base_settings, epochs=1, out=tmp_path / "o"))
    assert contents(tmp_path / "o.training") == {"epoch-1.safetensors": b"mine"}


# --- refused before any work ------------------------------------------------------------------


def test_one_class_is_refused(base_settings: TrainSettings, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "one", ["bars"], 3, seed=1)
    with pytest.raises(DataError, match=r"1 class folder \(bars\); expected 2 or more"):
        train(replace(base_settings, data=data, out=tmp_path / "o"))


def test_empty_class_is_refused(base_settings: TrainSettings, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "two", ["bars", "discs"], 3, seed=1)
    (data / "void").mkdir()
    with pytest.raises(DataError, match="void holds no image"):
        train(replace(base_settings, data=data, out=tmp_path / "o"))


def test_other_validation_classes_are_refused(base_settings: TrainSettings, tmp_path: Path) -> None:
    val = draw_folder(tmp_path / "val", ["bars", "frames"], 2, seed=1)
    (val / "frames").rename(val / "wheels")
    with pytest.raises(DataError, match="missing: discs, frames; not in `data`: wheels"):
        train(replace(base_settings, val_data=val, out=tmp_path / "o"))


def test_validation_classes_in_another_way_of_unicode_are_refused(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", ["discs", "bars"], 2, seed=1)
    val = draw_folder(tmp_path / "val", ["discs", "bars"], 2, seed=2)
    (data / "discs").rename(data / "caf\u00e9")
    (val / "discs").rename(val / "cafe\u0301")
    with pytest.raises(DataError, match=r"val: expected cafe. .* 'cafe\\u0301' and 'caf\\xe9'"):
        read_image_folder(data, val, 0.1, seed=0)


def test_unwritable_output_is_refused_first(base_settings: TrainSettings, tmp_path: Path) -> None:
    """Before the model is even looked up: its name is wrong here."""
    settings = replace(base_settings, model="no_such_model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="Could not write"):
        train(replace(settings, out=tmp_path / "file" / "out"))
    with pytest.raises(WriteError, match="is a file, not a directory"):
        train(replace(settings, out=tmp_path / "file", overwrite=True))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"already exists.*`overwrite=True`"):
        train(replace(settings, out=tmp_path / "there"))
    with pytest.raises(WriteError, match="is not an adapter directory that hhdeploy wrote"):
        train(replace(settings, out=tmp_path / "there", overwrite=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("fc7",)}, "'fc7' matches no site of vit_tiny.* sites are blocks"),
        ({"form": "sequential", "targets": ("q",)}, "expected proj, fc2 or site names"),
        ({"lr": 0.0}, "`lr`: expected a positive number, found 0.0"),
        ({"form": "lora"}, "`form`: expected one of additive, sequential, found lora"),
        ({"reflection": "orthogonl"}, "`reflection`: expected one of unnormalized, orthogonal, "),
        ({"problem_type": "classes"}, "`problem_type`: expected one of .*, found classes"),
        ({"device": "gpu"}, "`device`: expected one of auto, cpu, cuda, found gpu"),
        ({"warmup_epochs": EPOCHS}, "`warmup_epochs`: expected less than `epochs`"),
        ({"epochs": 2.5}, r"^`epochs`: expected a whole number, found 2\.5\.$"),
        ({"batch_size": 2.0}, "^`batch_size`: expected a whole number"),
        ({"r": 1.5}, "^`r`: expected a whole number"),
        ({"epochs": None}, "^`epochs`: expected a whole number, found None"),
        ({"lr": "1e-3"}, r"^`lr`: expected a number, found '1e-3'\.$"),
        ({"seed": 2**64}, "^`seed`: expected a number of 64 bits"),
        ({"model_args": {"norm_layer": torch.nn.LayerNorm}}, "^`model_args`: .* written as JSON"),
        ({"out": None}, "Only `linear_probe=True` works without `out`"),
        ({"checkpoint": Path("w.safetensors")}, "`checkpoint` and `pretrained=False` exclude"),
    ],
)
def test_settings_that_make_no_sense(
    base_settings: TrainSettings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    error = AdapterError if "targets" in change else TrainingError
    with pytest.raises(error, match=message):
        train(replace(base_settings, **{"out": tmp_path / "o", **change}))
    assert not list(tmp_path.iterdir())


def test_numpy_s_numbers_are_numbers(base_settings: TrainSettings, tmp_path: Path) -> None:
    """Also in what an epoch leaves on disk."""
    numbers = {"epochs": np.int64(1), "seed": np.uint8(3), "r": np.int32(1), "lr": np.float32(0.5)}
    settings = replace(base_settings, out=tmp_path / "o", **numbers)
    assert (settings.epochs, settings.seed, settings.r, settings.lr) == (1, 3, 1, 0.5)
    train(settings)
    assert load_adapter(tmp_path / "o").config.r == 1


def test_a_diverged_training_says_so_and_leaves_nothing(
    base_settings: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(base_settings, lr=1e30, warmup_epochs=0, out=tmp_path / "o")
    with pytest.raises(TrainingError, match=r"diverged: .*lower `lr` \(it was 1e\+30\)"):
        train(settings)
    assert not list(tmp_path.iterdir())


def test_a_backbone_without_sites_is_refused(base_settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(base_settings, model="resnet10t", model_args={}, out=tmp_path / "o")
    with pytest.raises(PlanError, match="zero sites found in resnet10t"):
        train(settings)


# --- linear probe -----------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [True, False])
def test_a_model_without_a_classifier_is_refused(base_settings: TrainSettings, probe: bool) -> None:
    settings = replace(
        base_settings,
        model="python:tests.own_models:tower",
        model_args={},
        input_size=(3, 32, 32),
        pretrained=True,
        linear_probe=probe,
        out=None if probe else base_settings.data.with_name("none"),
    )
    with pytest.raises(
        TrainingError, match=r"^`model`: expected a model with a classifier, .* none"
    ):
        train(settings)


@pytest.mark.parametrize("probe", [True, False])
def test_what_is_no_classifier_is_refused_before_the_training(
    base_settings: TrainSettings, probe: bool
) -> None:
    settings = replace(
        base_settings,
        model="python:tests.own_models:gated",
        model_args={},
        pretrained=True,
        linear_probe=probe,
        out=None if probe else base_settings.data.with_name("gated"),
    )
    with pytest.raises(BackboneError, match=r"gated: gate, the last Linear, was taken for the cl"):
        train(settings, lambda report: pytest.fail(f"{report}"))


def test_linear_probe_trains_the_head_alone(base_settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(base_settings, linear_probe=True, lr=2e-2, epochs=8)
    result = train(settings)
    assert (result.sites, result.parameters, result.head_parameters) == (0, 0, 3 * 48 + 3)
    assert result.last.val_top1 is not None
    assert result.last.val_top1 > 0.5
    out = tmp_path / "probe"
    with pytest.raises(StopError):
        train(replace(settings, out=out), interrupt_at(2, 0))
    assert train(replace(settings, out=out, resume=True)).history == result.history
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["val_top1"] == result.last.val_top1
    assert metrics["training"]["seed"] == 0
    with pytest.raises(AdapterError, match=r"adapter_config\.json does not exist"):
        load_adapter(out)


# --- data -------------------------------------------------------------------------------------

VIEW = Preprocess((3, 31, 29), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=0.875)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.2])
def test_evaluation_batches_are_what_inference_sees(
    images: Path, mode: str, crop_pct: float
) -> None:
    view = replace(VIEW, crop_mode=mode, crop_pct=crop_pct)
    samples = read_image_folder(images, None, 0.1, 0).val
    with BatchSource(view, batch_size=2, cache=PixelCache(1 << 20)) as source:
        batches = list(source.evaluation(samples))
    assert [len(x) for x, _ in batches] == [2, 1]
    found = torch.cat([x for x, _ in batches]).numpy()
    expected = np.stack([view(open_image(p)) for p in samples.paths])
    assert np.array_equal(found, expected)


def test_splits_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    for part, count, seed in (("train", 5, 1), ("val", 3, 2), ("test", 2, 3)):
        draw_folder(tmp_path / "d" / part, list(CLASSES), count, seed)
    folder = read_image_folder(tmp_path / "d", None, 0.5, seed=4)
    assert folder.class_names == tuple(sorted(CLASSES))
    assert folder.sources == (tmp_path / "d" / "train", tmp_path / "d" / "val")
    assert (len(folder.train), len(folder.val)) == (15, 9)
    other = draw_folder(tmp_path / "other", list(CLASSES), 1, 5)
    folder = read_image_folder(tmp_path / "d", other, 0.5, seed=4)
    assert folder.sources == (tmp_path / "d" / "train", other)
    shutil.rmtree(tmp_path / "d" / "val")
    folder = read_image_folder(tmp_path / "d", None, 0.4, seed=4)
    assert (len(folder.train), len(folder.val)) == (9, 6)  # test is left alone


def test_pictures_on_their_side_are_trained_on_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    for name in ("bars", "discs"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "u" / name).mkdir(parents=True)
        image = _draw(name, np.random.default_rng(3))
        image.save(tmp_path / "u" / name / "0.png")
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(tmp_path / "d" / name / "0.png", exif=exif)
    seen = []
    for place in ("d", "u"):
        samples = read_image_folder(tmp_path / place, None, 0.0, 0).train
        with BatchSource(VIEW, batch_size=2, cache=PixelCache(0)) as source:
            options = {"seed": 0, "epoch": 1, "flip": False}
            batches = [*source.evaluation(samples)]
            batches += source.training(samples, augment=True, **options)
        seen.append(torch.cat([x for x, _ in batches]))
    assert torch.equal(*seen)


@pytest.mark.parametrize("augment", [False, True])
def test_a_model_of_one_channel_trains_on_grey_pictures(images: Path, augment: bool) -> None:
    view = replace(VIEW, input_size=(1, 31, 29), mean=(0.4,), std=(0.3,))
    samples = read_image_folder(images, None, 0.1, 0).val
    with BatchSource(view, batch_size=2, cache=PixelCache(1 << 20)) as source:
        options = {"seed": 0, "epoch": 1, "augment": augment, "flip": True}
        trained = torch.cat([x for x, _ in source.training(samples, **options)])
        judged = torch.cat([x for x, _ in source.evaluation(samples)])
    assert trained.shape == (3, 1, 31, 29)
    expected = np.stack([view(open_image(p)) for p in samples.paths])
    assert np.array_equal(judged.numpy(), expected)
    assert torch.equal(trained.sort(dim=0).values, judged.sort(dim=0).values) != augment


def test_split_is_stratified_seeded_and_never_takes_the_only_image(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "d", ["bars", "discs"], 11, seed=2)
    (data / "frames").mkdir()
    _draw("frames", np.random.default_rng(0)).save(data / "frames" / "0.png")
    folder = read_image_folder(data, None, 0.2, seed=4)
    assert [folder.val.labels.count(c) for c in range(3)] == [2, 2, 0]
    assert [folder.train.labels.count(c) for c in range(3)] == [9, 9, 1]
    assert not set(folder.train.paths) & set(folder.val.paths)
    assert read_image_folder(data, None, 0.2, seed=4) == folder
    assert read_image_folder(data, None, 0.2, seed=5).val != folder.val
    assert len(read_image_folder(data, None, 0.0, seed=4).val) == 0


def _repeated(root: Path, how: str) -> Path:
    """Ten pictures of each of two classes, every one of them three times."""
    data = draw_folder(root / "once", ["bars", "discs"], 10, seed=2)
    lines = [f"once/{p.parent.name}/{p.name} {p.parent.name}" for p in data.rglob("*.png")]
    if how == "list":
        (root / "thrice.txt").write_text("\n".join(lines * 3))
        return root / "thrice.txt"
    for source in data.rglob("*.png"):
        for i in range(3):
            target = root / how / source.parent.name / f"{source.stem}-{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            if how == "links":
                target.symlink_to(source)
            else:
                shutil.copy(source, target)
    return root / how


@pytest.mark.parametrize("how", ["list", "links", "copies"])
def test_what_is_held_out_is_not_trained_on_under_any_name(tmp_path: Path, how: str) -> None:
    folder = read_image_folder(_repeated(tmp_path, how), None, 0.3, seed=4)
    contents = [{p.read_bytes() for p in part.paths} for part in (folder.train, folder.val)]
    assert (len(folder.train), len(folder.val)) == (42, 18)
    assert [len(part) for part in contents] == [14, 6]
    assert not contents[0] & contents[1]
    assert (folder.val_trained_on, folder.contrary) == (0, 0)


def test_a_picture_of_two_classes_judges_neither(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "d", ["bars", "discs"], 4, seed=2)
    for i in range(3):
        shutil.copy(data / "bars" / f"{i:03}.png", data / "discs" / f"also-{i}.png")
    folder = read_image_folder(data, None, 0.9, seed=4)
    assert (folder.val_trained_on, folder.contrary) == (0, 3)
    assert {p.name for p in folder.val.paths} == {f"{i:03}.png" for i in range(4)}
    assert [folder.val.labels.count(c) for c in range(2)] == [1, 4]


def test_validation_images_that_are_trained_on_are_counted(
    base_settings: TrainSettings, tmp_path: Path
) -> None:
    val = draw_folder(tmp_path / "val", list(CLASSES), 2, seed=9)
    shutil.copy(base_settings.data / "bars" / "003.png", val / "bars" / "mine.png")
    shutil.copy(base_settings.data / "bars" / "004.png", val / "discs" / "mine.png")
    result = train(replace(base_settings, val_data=val, epochs=1, out=tmp_path / "o"))
    assert (result.val_images_trained_on, result.contrary_pictures) == (2, 1)
    assert load_adapter(tmp_path / "o").config.extra["training"]["val_images_trained_on"] == 2
    said = cli(*cli_arguments(base_settings.data, "--linear-probe", "--val-data", str(val))).stdout
    assert "of the 8 validation images 2 are trained on too" in said
    assert "1 pictures are there again" in said


def test_epochs_shuffle_and_augment_differently_but_repeatably(images: Path) -> None:
    samples = read_image_folder(images, None, 0.0, 0).train
    with BatchSource(VIEW, batch_size=64, cache=PixelCache(1 << 20)) as source:

        def batch(epoch: int, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = {"augment": True, "flip": True, **options}
            (found,) = source.training(samples, seed=0, epoch=epoch, **chosen)
            return found

        first, again, second = batch(1), batch(1), batch(2)
        unflipped, plain = batch(1, flip=False), batch(1, augment=False)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[1], plain[1])
    same = (first[0] == unflipped[0]).flatten(1).all(dim=1)
    assert 0 < int(same.sum()) < len(samples)  # the others are mirrored
    eval_first = VIEW(open_image(samples.paths[0]))
    assert any(np.array_equal(x.numpy(), eval_first) for x in plain[0])


def test_cache_keeps_to_its_limit(images: Path) -> None:
    samples = read_image_folder(images, None, 0.0, 0).train
    one = 31 * 29 * 3
    cache = PixelCache(5 * one + 1)
    first = [cache.pixels(p, VIEW) for p in samples.paths]
    again = [cache.pixels(p, VIEW) for p in samples.paths]
    assert cache.used_bytes == 5 * one
    assert [a is b for a, b in zip(first, again, strict=True)] == [True] * 5 + [False] * 34
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    samples = Samples((tmp_path / "bad.png",), (0,))
    for workers in (0, 2):
        source = BatchSource(VIEW, batch_size=2, cache=PixelCache(0), workers=workers)
        with source, pytest.raises(DataError, match=r"bad\.png cannot be decoded"):
            list(source.evaluation(samples))


def test_canvas_is_the_resized_image_around_the_evaluation_crop(images: Path) -> None:
    view = replace(VIEW, input_size=(3, 28, 28))
    image = open_image(images / "bars" / "000.png")
    canvas = canvas_view(view)(image)
    assert canvas.shape == (3, 32, 32)
    assert np.array_equal(canvas[:, 2:30, 2:30], view(image))


def test_crop_boxes_stay_inside_and_are_mild() -> None:
    random = np.random.default_rng(0)
    for draws in [*random.random((200, 4)).tolist(), [0.0] * 4, [1 - 2**-53] * 4]:
        left, top, right, bottom = crop_box(53, 41, draws)
        assert 0 <= left < right <= 53
        assert 0 <= top < bottom <= 41
        assert (right - left) * (bottom - top) >= 0.55 * 53 * 41


def test_schedule_warms_up_and_falls_to_zero() -> None:
    lrs = [learning_rate(s, peak=2.0, warmup_steps=4, total_steps=12) for s in range(12)]
    assert lrs[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert lrs[4:] == sorted(lrs[4:], reverse=True)
    assert 0 < lrs[-1] < 0.1
    assert learning_rate(8, peak=2.0, warmup_steps=4, total_steps=12) == 1.0


# --- command line -----------------------------------------------------------------------------


def test_cli_trains_and_prints_json(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = cli(*cli_arguments(images, "--target", "proj", "--r", "2", "--json", out))
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["sites"] == 2
    assert answer["class_names"] == list(CLASSES)
    assert "epoch 2/2  loss" in result.stderr
    assert load_adapter(out).config.r == 2
    refused = cli(*cli_arguments(images, out))
    assert refused.exit_code == 1
    assert "already exists" in refused.stderr
    assert "Traceback" not in refused.output


def test_cli_names_splits_and_what_it_left_out(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1)):
        draw_folder(tmp_path / "d" / part, list(CLASSES), count, 1)
    (tmp_path / "d" / "train" / "bars" / "x.heic").write_bytes(b"")
    (tmp_path / "d" / "val" / "loose.png").write_bytes(b"")
    data = tmp_path / "d"
    result = cli(*cli_arguments(data, "--linear-probe"))
    assert result.exit_code == 0, result.output
    assert f"trained on {data / 'train'}, validated on {data / 'val'}" in result.stdout
    assert "1 .heic, 1 pictures outside of a class folder" in result.stdout
    refused = cli(*cli_arguments(data, "--linear-probe", "--val-fraction", "0.3"))
    assert refused.exit_code == 2
    assert "--val-fraction does not go with" in refused.stderr


def test_cli_says_where_it_trained_and_which_parts_it_did_not_read(tmp_path: Path) -> None:
    data = tmp_path / "d"
    for part in ("train", "test"):
        draw_folder(data / part, list(CLASSES), 3, 1)
    held_out = cli(*cli_arguments(data, "--linear-probe"))
    assert held_out.exit_code == 0, held_out.output
    assert f"trained on {data / 'train'}, validated on the part of it" in held_out.stdout
    assert f"not read: {data / 'test'}\n" in held_out.stdout

    draw_folder(data / "val", list(CLASSES), 1, 2)
    judged = cli(*cli_arguments(data, "--linear-probe", "--val-data", data / "test"))
    assert judged.exit_code == 0, judged.output
    assert f"validated on {data / 'test'}" in judged.stdout
    assert f"not read: {data / 'val'}\n" in judged.stdout


def test_cli_takes_names_that_are_not_utf8(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pictures and of OUT, where what is printed has to be UTF-8."""
    data = shutil.copytree(images, tmp_path / "d")
    odd = Path(os.fsdecode(os.fsencode(data / "bars") + b"/caf\xe9.png"))
    (data / "bars" / "000.png").rename(odd)
    first = read_image_folder(data, None, 0.25, 0).digest
    odd.rename(Path(os.fsdecode(os.fsencode(data / "bars") + b"/caf\xe8.png")))
    assert read_image_folder(data, None, 0.25, 0).digest != first
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    code = "from hhdeploy.cli import main; import sys; main(sys.argv[1:])"
    done = run_python(code, "train", *cli_arguments(data), "--epochs", "1", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"wrote {tmp_path}/out\\udce9\n")


def test_cli_says_last_and_best(images: Path, tmp_path: Path) -> None:
    result = cli(*cli_arguments(images, "--linear-probe"))
    assert result.exit_code == 0, result.output
    assert "last epoch 2: val top-1" in result.stdout
    assert "best epoch" in result.stdout


def test_cli_interrupt_hints_at_resume(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hhdeploy.training.loop import Trainer

    whole, calls = Trainer.run_epoch, []

    def run_epoch(self: Trainer, epoch: int, on_step: Any) -> EpochReport:
        calls.append(epoch)
        if calls == [1, 2]:
            raise KeyboardInterrupt
        return whole(self, epoch, on_step)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    arguments = cli_arguments(images, tmp_path / "a")
    cut = cli(*arguments)
    assert cut.exit_code == 130
    assert "Interrupted. Continue with the same command and --resume." in cut.stderr
    resumed = cli(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert calls == [1, 2, 2]
    assert (tmp_path / "a" / TENSOR_FILE).is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Only --linear-probe works without OUT"),
        (["--linear-probe", "--resume"], "--resume needs the OUT"),
        (["--checkpoint", "w.safetensors", "out"], "exclude each other"),
        (["--model-args", "[1]", "out"], "expected a JSON object"),
        (["--model-args", "{", "out"], "expected a JSON object"),
    ],
)
def test_cli_usage_errors(images: Path, more: list[str], message: str) -> None:
    result = cli(*cli_arguments(images, *more))
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_imports_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from hhdeploy.cli import main; main(['train', '-h'], standalone_mode=False); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'timm')))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "--linear-probe" in done.stdout
