"""`hhdeploy train --labels`: independent labels and values instead of class folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.adapters.format import Head, load_adapter
from hhdeploy.adapters.labels import mean_absolute_error, mean_average_precision
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.cli import main
from hhdeploy.parity import bound
from hhdeploy.preprocess import open_image
from hhdeploy.training import attach
from hhdeploy.training.labelled import read_labelled
from hhdeploy.training.objective import Objective
from hhdeploy.training.recipe import EpochReport, TrainingError, TrainSettings, train
from hhdeploy.training.state import STATE_FILE
from tests.support import TINY_ARGS, TINY_MODEL, assert_parity

COUNT = 29
ROUNDING = bound("algebra", "float32").range_error


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of two colours: which of them are bright, and how bright on a scale from 1000."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(3)
    tags, values, classes = ["path,labels"], ["path,brightness,number"], []
    for i in range(COUNT):
        red, blue = (int(n) for n in random.integers(20, 235, 2))
        pixels = random.integers(0, 20, (23, 31, 3), np.uint8)
        pixels[..., 0] += np.uint8(red)
        pixels[..., 2] += np.uint8(blue)
        Image.fromarray(pixels).save(root / f"{i}.png")
        names = [name for name, level in (("red", red), ("blue", blue)) if level > 120]
        tags.append(f"{i}.png,{';'.join(names)}")
        values.append(f"{i}.png,{1000 + 10 * red},{blue / 1e4}")
        classes.append(f"{i}.png,{int(red > blue)}")
    for name, lines in (("tags", tags), ("values", values), ("classes", classes)):
        (root / f"{name}.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def settings(data) -> TrainSettings:
    return TrainSettings(
        model=TINY_MODEL,
        data=data,
        model_args=TINY_ARGS,
        pretrained=False,
        val_fraction=0.25,
        epochs=5,
        batch_size=8,
        lr=1e-2,
        augment=False,
        device="cpu",
        threads=1,
    )


def outputs_of(settings, paths):
    """Of the adapter that was written, on a fresh backbone."""
    adapter = load_adapter(settings.out)
    spec = BackboneSpec(TINY_MODEL, TINY_ARGS, pretrained=False, seed=settings.seed)
    model = attach(load_backbone(spec).model, adapter).eval()
    inputs = np.stack([adapter.config.preprocess(open_image(p)) for p in paths])
    with torch.no_grad():
        return adapter, model(torch.from_numpy(inputs)).double().numpy()


def test_labels_are_learnt_each_by_itself(settings, data, tmp_path):
    ours = replace(settings, labels=data / "tags.csv", out=tmp_path / "tags")
    result = train(ours)
    assert result.problem_type == LABELS
    assert result.history[-1].loss < 0.8 * result.history[0].loss
    assert (result.last.val_top1, result.last.val_mae) == (None, None)
    assert result.last.val_map > 0.8  # half of the images have each label
    folder = read_labelled(ours, ours.labels)
    adapter, outputs = outputs_of(ours, folder.val.paths)
    assert adapter.config.problem_type == LABELS
    assert adapter.config.class_names == ("blue", "red")
    truths = np.asarray(folder.val.labels)
    assert mean_average_precision(outputs, truths) == pytest.approx(result.last.val_map)
    record = adapter.config.extra["training"]
    assert record["recipe"]["loss"] == "binary cross-entropy"
    assert record["val_map"] == result.last.val_map


def test_paths_from_the_root_are_the_same_images(settings, data, tmp_path, monkeypatch):
    """A table that a data frame wrote, beside a folder that is named from here."""
    monkeypatch.chdir(data.parent)
    ours = replace(settings, data=Path(data.name))
    table = tmp_path / "absolute.csv"
    lines = (data / "tags.csv").read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{data}/{line}" for line in lines[1:])]))
    found, wanted = read_labelled(ours, table), read_labelled(ours, data / "tags.csv")
    assert found.digest == wanted.digest
    assert found.skipped == wanted.skipped == {}
    assert found.val.labels == wanted.val.labels


def test_columns_of_the_validation_go_by_their_names(settings, data, tmp_path):
    lines = (data / "values.csv").read_text().splitlines()
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join(",".join(line.split(",")[i] for i in (0, 2, 1)) for line in lines))
    labels = data / "values.csv"
    ours = replace(settings, labels=labels, val_labels=turned, val_data=data)
    assert read_labelled(ours, labels).val == read_labelled(ours, labels).train


def test_values_come_in_their_own_unit(settings, data, tmp_path):
    """One is in thousands, the other in thousandths: both are learnt, and neither is scaled."""
    ours = replace(settings, labels=data / "values.csv", out=tmp_path / "values")
    result = train(ours)
    assert result.problem_type == VALUES
    assert result.best.val_mae == min(e.val_mae for e in result.history)
    folder = read_labelled(ours, ours.labels)
    adapter, outputs = outputs_of(ours, folder.val.paths)
    assert adapter.config.problem_type == VALUES
    assert adapter.config.class_names == ("brightness", "number")
    truths = np.asarray(folder.val.labels)
    assert mean_absolute_error(outputs, truths) == pytest.approx(
        result.last.val_mae, rel=bound("folded", "float32").range_error
    )
    spread = np.asarray(folder.train.labels).std(axis=0)
    errors = np.abs(outputs - truths).mean(axis=0)
    assert (errors < 0.7 * spread).all(), "better than their mean"


def test_classes_of_a_table_are_those_of_folders(settings, data, tmp_path):
    ours = replace(settings, epochs=1, labels=data / "classes.csv", problem_type=CLASSES)
    result = train(replace(ours, out=tmp_path / "a"))
    assert (result.problem_type, result.class_names) == (CLASSES, ("0", "1"))
    assert result.last.val_top1 is not None
    assert load_adapter(tmp_path / "a").config.problem_type is None


def test_the_split_is_seeded_and_whole(settings, data):
    ours = replace(settings, labels=data / "tags.csv")
    folder = read_labelled(ours, ours.labels)
    assert (len(folder.train), len(folder.val)) == (22, 7)
    assert not {*folder.train.paths} & {*folder.val.paths}
    assert read_labelled(ours, ours.labels) == folder
    assert read_labelled(replace(ours, seed=1), ours.labels).val != folder.val
    assert len(read_labelled(replace(ours, val_fraction=0.0), ours.labels).val) == 0


def test_copies_are_on_one_side(settings, data, tmp_path):
    """Of labels as of classes; by content, and by another way to the same file."""
    lines = (data / "tags.csv").read_text().splitlines()
    for i in range(COUNT):
        shutil.copy(data / f"{i}.png", tmp_path / f"{i}.png")
        shutil.copy(data / f"{i}.png", tmp_path / f"copy-{i}.png")
    (tmp_path / "in").mkdir()
    lines += [f"copy-{line}" for line in lines[1:]] + [f"in/../{line}" for line in lines[1:]]
    (tmp_path / "tags.csv").write_text("\n".join(lines))
    paths = [line.split(",")[0] for line in lines[1:]]
    classes = [f"{path},{'even' if path[-5] in '02468' else 'odd'}" for path in paths]
    (tmp_path / "classes.csv").write_text("\n".join(classes))
    ours = replace(settings, data=tmp_path)
    for name in ("tags", "classes"):
        folder = read_labelled(ours, tmp_path / f"{name}.csv")
        assert len(folder.train) + len(folder.val) == 3 * COUNT
        train, val = ({p.read_bytes() for p in part.paths} for part in (folder.train, folder.val))
        assert val
        assert not train & val
        assert folder.val_trained_on == 0
    (tmp_path / "val.csv").write_text("\n".join(lines[:4]))
    folder = read_labelled(replace(ours, val_labels=tmp_path / "val.csv"), tmp_path / "tags.csv")
    assert (folder.val_trained_on, folder.contrary) == (3, 0)


def test_a_table_of_its_own_validates(settings, data, tmp_path):
    lines = (data / "tags.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(lines[:11]))
    (tmp_path / "val.csv").write_text("\n".join(lines[11:16]))
    ours = replace(settings, labels=tmp_path / "train.csv", val_labels=tmp_path / "val.csv")
    ours = replace(ours, problem_type=LABELS)  # these few have one each, or none
    folder = read_labelled(ours, ours.labels)
    assert (len(folder.train), len(folder.val)) == (10, 5)
    assert folder.skipped == {"pictures without a label": COUNT - 15}


def test_other_labels_are_other_data(settings, data, tmp_path):
    before = read_labelled(settings, data / "tags.csv")
    lines = (data / "tags.csv").read_text().splitlines()
    lines[3] = lines[3].split(",")[0] + ",red" * ("red" not in lines[3])
    (tmp_path / "tags.csv").write_text("\n".join(lines).replace(".png,red,", ".png,"))
    assert read_labelled(settings, tmp_path / "tags.csv").digest != before.digest


class StopError(Exception):
    """Stands for Ctrl-C."""


def stop_after_an_epoch(report):
    if isinstance(report, EpochReport):
        raise StopError


@pytest.fixture
def unfinished(settings, data, tmp_path):
    """Of two columns of 0 and 1, which are labels or values; it ended after its first epoch."""
    lines = (f"{i}.png,{i % 2},{i // 2 % 2}" for i in range(COUNT))
    (tmp_path / "marks.csv").write_text("\n".join(["path,a,b", *lines]))
    ours = replace(settings, labels=tmp_path / "marks.csv", epochs=2, out=tmp_path / "o")
    with pytest.raises(StopError):
        train(ours, stop_after_an_epoch)
    return replace(ours, resume=True)


def test_a_training_is_resumed_as_what_it_was(unfinished, tmp_path):
    table = unfinished.labels
    with pytest.raises(
        TrainingError, match=f"`problem_type` is '{VALUES}', but the .* has '{LABELS}'. Use that"
    ):
        train(replace(unfinished, problem_type=VALUES))
    text = table.read_text()
    table.write_text(text.replace("path,a,b", "path,b,a"))
    with pytest.raises(TrainingError, match=r"class names is \['b', 'a'\], but .* \['a', 'b'\]"):
        train(unfinished)
    table.write_text(text)
    # Said or told by the table is the same.
    assert train(replace(unfinished, problem_type=LABELS)).problem_type == LABELS


def test_a_state_from_before_kinds_were_compared_goes_on(unfinished, tmp_path):
    file = tmp_path / "o.training" / STATE_FILE
    content = json.loads(file.read_text())
    buffers = "the digest of the backbone's buffers"
    content["settings"][buffers] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match=buffers):
        train(unfinished)
    for name in ("`problem_type`", "the list of class names", buffers):
        del content["settings"][name]
    file.write_text(json.dumps(content))
    assert len(train(unfinished).history) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_type": LABELS}, "need `labels`"),
        ({"val_labels": Path("v.csv")}, "need `labels`"),
        ({"labels": Path("t.csv"), "val_data": Path("v")}, "`val_data` needs `val_labels`"),
    ],
)
def test_settings_that_make_no_sense(settings, tmp_path, change, message):
    with pytest.raises(TrainingError, match=message):
        train(replace(settings, out=tmp_path / "o", **change))


def test_a_head_of_standardised_values_is_written_in_their_unit():
    random = np.random.default_rng(0)
    truths = torch.from_numpy(random.normal([40, -1e6, 7], [3, 1e5, 0], (13, 3)).astype("f4"))
    objective = Objective.of(VALUES, truths)
    head = Head("head", *(random.standard_normal(s).astype("f4") for s in ((3, 5), 3)))
    features = random.standard_normal((13, 5))
    standardised = features @ head.weight.T + head.bias
    restored = objective.restored(head)
    found = features @ restored.weight.T + restored.bias
    deviation = truths.double().numpy().std(axis=0)
    assert deviation[2] == 0  # never changes: not scaled
    deviation[2] = 1
    expected = standardised * deviation + truths.double().numpy().mean(axis=0)
    for ours, theirs in zip(found.T, expected.T, strict=True):  # each in its own unit
        assert_parity(theirs, ours, "algebra", "float32")
    outputs = torch.from_numpy(standardised)
    mae = mean_absolute_error(expected, truths.numpy())
    assert objective.scores(outputs, truths)[2] == pytest.approx(mae)
    # The loss is the squared error of standardised values, a mean over images.
    error = (expected - truths.numpy()) / deviation
    assert float(objective.loss(outputs, truths)) == pytest.approx((error**2).mean(), rel=ROUNDING)
    total = objective.loss(outputs, truths, reduction="sum")
    assert float(total) == pytest.approx(13 * (error**2).mean(), rel=ROUNDING)


def test_cli(data, tmp_path):
    tiny = ["--model", TINY_MODEL, "--model-args", json.dumps(TINY_ARGS), "--no-pretrained"]
    tiny += ["--epochs", "1", "--threads", "1", "--device", "cpu", "--data", str(data)]

    def run(*arguments):
        return CliRunner().invoke(main, ["train", *tiny, *map(str, arguments)])

    result = run("--labels", data / "values.csv", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "2 values, 26 training and 3 validation images" in result.stdout
    assert "last epoch 1: val MAE" in result.stdout
    (tmp_path / "none.csv").write_text("0.png,\n1.png,\n")
    unjudged = run(
        "--labels", data / "tags.csv", "--val-labels", tmp_path / "none.csv", tmp_path / "c"
    )
    assert unjudged.exit_code == 0, unjudged.output
    assert "2 validation images" in unjudged.stdout
    assert (
        "last epoch 1: val mAP n/a, no label is true of any validation image\n" in unjudged.stdout
    )
    assert "top-1" not in unjudged.output
    refused = run("--problem-type", LABELS, tmp_path / "b")
    assert refused.exit_code == 2
    assert "--labels" in refused.stderr
    wrong = run("--labels", data / "tags.csv", "--problem-type", CLASSES, tmp_path / "b")
    assert wrong.exit_code == 1
    assert "the problem type is multi_label_classification" in " ".join(wrong.stderr.split())
