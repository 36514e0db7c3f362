"""Calibration images: whose they are, how they are fed, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import BANK_FILE
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.feeds import Feeder
from hhdeploy.calibration.judging.exam import make_exam
from hhdeploy.errors import DataError
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.preprocess import open_image
from tests.calibration.conftest import ADAPTERS, write_pictures
from tests.workshop import flip_byte


@pytest.fixture
def bundle(branches) -> Bundle:
    return Bundle.open(branches)


@pytest.fixture
def copied(pictures, tmp_path):
    """The pictures, free to be changed."""
    return shutil.copytree(pictures, tmp_path / "pictures")


def opened(bundle, source, images=36, seed=0) -> CalibrationData:
    return CalibrationData.open(bundle, source, images=images, seed=seed)


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


# -- folders ------------------------------------------------------------------------------------


def test_every_adapter_and_class_has_its_turn(bundle, pictures):
    data = opened(bundle, pictures, images=12)
    assert len(data) == len(list(data)) == 12
    assert data.description["images_per_adapter"] == dict.fromkeys(sorted(ADAPTERS), 2)
    assert data.description["classes_per_adapter"] == dict.fromkeys(sorted(ADAPTERS), 2)
    assert data.description["seed"] == 0
    assert data.description["sha256"] == data.digest


def test_feeds_hold_the_adapters_own_row_and_preprocessing(bundle, copied):
    """Gamma has a mean, std and crop of its own."""
    shutil.rmtree(copied / "gamma" / "b")
    paths = sorted((copied / "gamma").rglob("*.png"))
    for path in paths[1:]:
        path.unlink()
    data = opened(bundle, copied)
    (feed,) = [f for s, f in zip(data.samples, data, strict=True) if s.adapter == "gamma"]
    entry = bundle.manifest.adapter("gamma")
    assert entry.preprocess != bundle.manifest.adapter("alpha").preprocess
    assert_array_equal(feed["images"][0], entry.preprocess(open_image(paths[0])))
    assert_array_equal(feed["adapter_bank"], bundle.bank()[[entry.row]])
    assert_array_equal(feed["adapter_ids"], [0])


def test_the_backbone_is_fed_row_0(bundle, pictures):
    data = opened(bundle, pictures)
    rows = [
        f["adapter_bank"]
        for s, f in zip(data.samples, data, strict=True)
        if s.adapter == "backbone"
    ]
    assert len(rows) == 6
    assert not np.any(rows)


def test_a_graph_with_its_bank_baked_in_is_fed_row_numbers(constant, pictures, copied):
    for other in set(ADAPTERS) - {"alpha", "gamma"}:
        shutil.rmtree(copied / other)
    data = opened(Bundle.open(constant), copied)
    assert {int(feed["adapter_ids"][0]) for feed in data} == {1, 2}
    assert all(set(feed) == {"images", "adapter_ids"} for feed in data)


def test_a_folded_bundle_takes_its_adapters_part_of_the_folder(folded, pictures):
    bundle = Bundle.open(folded)
    data = opened(bundle, pictures)
    assert len(data) == 6
    assert data.digest == opened(bundle, pictures / "alpha").digest
    assert all(set(feed) == {"images"} for feed in data)


def test_passes_are_repeatable_and_seeds_matter(bundle, pictures):
    data = opened(bundle, pictures, images=12)
    for first, second in zip(data, data, strict=True):
        assert_array_equal(first["images"], second["images"])
    assert opened(bundle, pictures, images=12).digest == data.digest
    assert opened(bundle, pictures, images=12, seed=1).digest != data.digest


def test_the_digest_sees_the_content(bundle, copied):
    before = opened(bundle, copied).digest
    path = next((copied / "beta").rglob("*.png"))
    path.unlink()
    write_pictures(path.parent / "new", 1, seed=99)
    (path.parent / "new" / "0.png").rename(path)
    assert opened(bundle, copied).digest != before


def test_the_digest_sees_whose_row_is_whose(bundle, pictures):
    """The same rows under each other's names: other inputs of the same images."""
    rows = {
        "alpha": bundle.manifest.adapter("rival").row,
        "rival": bundle.manifest.adapter("alpha").row,
    }
    entries = tuple(replace(a, row=rows.get(a.name, a.row)) for a in bundle.manifest.adapters)
    other = replace(bundle, manifest=replace(bundle.manifest, adapters=entries))
    assert opened(other, pictures).digest != opened(bundle, pictures).digest


def test_the_digest_sees_other_rows_and_preprocessing(bundle, pictures):
    """Else the scales in a cache would be those of the adapters that were replaced."""
    bank = bundle.bank().copy()
    bank[bundle.manifest.adapter("alpha").row, 0] += 1.0
    trained = {bundle.manifest.named(BANK_FILE): tensor_bytes({"adapter_bank": bank})}
    first, *rest = bundle.manifest.adapters
    first = replace(first, preprocess=replace(first.preprocess, crop_pct=0.5))
    manifest = replace(bundle.manifest, adapters=(first, *rest))
    found = (bundle, replace(bundle, held=trained), replace(bundle, manifest=manifest))
    assert len({opened(each, pictures).digest for each in found}) == 3


def test_a_folded_bundle_s_images_are_its_adapter_s(folded):
    bundle = Bundle.open(folded)
    (entry,) = bundle.manifest.adapters
    entry = replace(entry, preprocess=replace(entry.preprocess, crop_pct=0.5))
    feeder = Feeder(replace(bundle, manifest=replace(bundle.manifest, adapters=(entry,))))
    assert feeder.preprocess(None) == entry.preprocess
    assert feeder.class_count(None) == entry.classes


def test_images_are_decoded_when_they_are_asked_for(bundle, copied):
    (copied / "alpha" / "a" / "0.png").write_bytes(b"no picture")
    data = opened(bundle, copied)
    with pytest.raises(DataError, match=r"alpha/a/0\.png cannot be decoded"):
        list(data)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO")
def test_an_image_on_a_disk_that_fails_is_named(bundle, pictures, copied):
    path = copied / "alpha" / "a" / "0.png"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"alpha/a/0\.png cannot be read: Input/output error"):
        opened(bundle, copied)
    used = opened(bundle, pictures)
    with pytest.raises(DataError, match=r"alpha/a/0\.png cannot be read: Input/output error"):
        make_exam(copied, used, seed=0)


def test_lists_stand_for_folders(bundle, folded, copied):
    """DIR/ADAPTER.txt of side branches, one list of a folded bundle: the same images."""
    whole = opened(bundle, copied)
    for adapter in ADAPTERS:
        files = sorted((copied / adapter).rglob("*.png"))
        lines = [f".images-{p.relative_to(copied).as_posix()} {p.parent.name}\n" for p in files]
        (copied.parent / "lists").mkdir(exist_ok=True)
        (copied.parent / "lists" / f".images-{adapter}").symlink_to(copied / adapter)
        (copied.parent / "lists" / f"{adapter}.txt").write_text("".join(lines))
    lists = copied.parent / "lists"
    found = opened(bundle, lists)
    assert {(s.adapter, s.digest) for s in found.samples} == {
        (s.adapter, s.digest) for s in whole.samples
    }
    first = lists / f"{sorted(ADAPTERS)[0]}.txt"
    assert {s.adapter for s in opened(Bundle.open(folded), first).samples} == {None}
    with pytest.raises(DataError, match=r"has the images of one adapter, .*DIR/ADAPTER\.txt"):
        opened(bundle, first)


def test_an_unknown_adapter_folder_is_refused(bundle, copied):
    (copied / "beta").rename(copied / "betta")
    (copied / "README.txt").write_text("Of whom the pictures are.")
    with pytest.raises(
        DataError, match=r"DIR/ADAPTER/CLASS.*alpha.*found README\.txt, betta\. Move"
    ):
        opened(bundle, copied)


def test_a_folder_and_a_list_for_one_adapter(bundle, copied):
    """The list was passed over, and may name a part of the folder."""
    picture = next((copied / "beta").rglob("*.png"))
    (copied / "beta.txt").write_text(f"{picture.relative_to(copied)} a\n")
    with pytest.raises(DataError, match=r"found both beta and beta\.txt"):
        opened(bundle, copied)


def test_doubts_become_warnings(bundle, copied):
    shutil.rmtree(copied / "rival")
    shutil.rmtree(copied / "beta" / "b")
    warnings = "\n".join(opened(bundle, copied).warnings)
    assert "no calibration images for adapter 'rival'" in warnings
    assert "bare 'backbone'" not in warnings
    shutil.rmtree(copied / "backbone")
    warned = opened(bundle, copied).warnings
    assert any("no calibration images for the bare 'backbone'" in line for line in warned)
    assert "adapter 'beta': images of one class only (a)" in warnings
    assert "only 3 calibration images for adapter 'beta'" in warnings


def test_no_or_too_few_images_are_refused(bundle, pictures, tmp_path):
    with pytest.raises(DataError, match="at least 4 calibration images, found 3"):
        opened(bundle, pictures, images=3)
    with pytest.raises(DataError, match="found no folder"):
        opened(bundle, tmp_path)
    with pytest.raises(DataError, match="is not a directory"):
        opened(bundle, tmp_path / "nowhere")


# -- arrays -------------------------------------------------------------------------------------


def test_copies_are_one_image(bundle, copied):
    """Two pictures an adapter, under many names."""
    for folder in sorted(path for path in copied.glob("*/*") if path.is_dir()):
        first, *others = sorted(folder.iterdir())
        for path in others:
            path.write_bytes(first.read_bytes())
    warnings = " ".join(opened(bundle, copied).warnings)
    for name in ADAPTERS:
        assert f"only 2 (6 with copies) calibration images for adapter '{name}'" in warnings


def test_copies_of_one_picture_are_too_few(bundle):
    batch = {"images": np.repeat(noise(1), 40, axis=0), "adapters": ["alpha"] * 40}
    with pytest.raises(DataError, match=r"at least 4 .* images, found 1 \(40 with copies\)\."):
        opened(bundle, [batch], images=40)
    batch["images"] = np.repeat(noise(5), 8, axis=0)
    assert "only 5 (40 with copies) calibration images for adapter 'alpha'" in " ".join(
        opened(bundle, [batch], images=40).warnings
    )


def test_arrays_by_name_and_by_row_are_the_same(bundle, tmp_path):
    names = ["alpha", "beta", "backbone", "gamma", "alpha"]
    rows = [1, 3, 0, 4, 1]
    assert [bundle.manifest.adapter(n).row if n != "backbone" else 0 for n in names] == rows
    images = noise(5)
    np.savez(tmp_path / "data.npz", images=images, adapters=names)
    from_file = opened(bundle, tmp_path / "data.npz")
    batches = ({"images": images[i : i + 1], "adapter_ids": [rows[i]]} for i in range(5))
    from_python = opened(bundle, batches)  # a generator can be read only once
    assert from_file.digest == from_python.digest
    wide = opened(bundle, [{"images": images.astype(np.float64), "adapter_ids": rows}])
    assert next(iter(wide))["images"].dtype == np.float32
    assert wide.digest == from_file.digest
    order = [int(s.source.removeprefix("image ")) for s in from_python.samples]
    assert sorted(order) == list(range(5))
    for _ in range(2):
        assert_array_equal(np.concatenate([f["images"] for f in from_python]), images[order])
    bank = bundle.bank()[[rows[i] for i in order]]
    assert_array_equal(np.concatenate([f["adapter_bank"] for f in from_file]), bank)


def test_what_is_no_mapping_is_named(bundle):
    for given, found in (({"images": noise(5)}, "str"), (noise(5), "ndarray")):
        with pytest.raises(DataError, match=rf"expected mappings .* in a list, found {found}\."):
            opened(bundle, given)


def test_adapters_have_their_turn_in_arrays_too(bundle, tmp_path):
    """One behind another is how such a file is made: the first images are all of one adapter."""
    images, names = noise(30), ["alpha"] * 20 + ["gamma"] * 8 + ["beta"] * 2
    np.savez(tmp_path / "data.npz", images=images, adapters=names)
    data = opened(bundle, tmp_path / "data.npz", images=12)
    assert data.description["images_per_adapter"] == {"alpha": 5, "gamma": 5, "beta": 2}
    assert data.description["seed"] == 0
    assert [s.adapter for s in data.samples[:4]] == ["alpha", "gamma", "beta", "alpha"]
    for sample in data.samples:
        number = int(sample.source.removeprefix("image "))
        assert names[number] == sample.adapter
        assert_array_equal(sample.load(), images[number])
    batches = [{"images": images[i : i + 7], "adapters": names[i : i + 7]} for i in (0, 7, 14, 21)]
    batches.append({"images": images[28:], "adapters": names[28:]})
    assert opened(bundle, batches, images=12).digest == data.digest


def test_the_seed_chooses_among_arrays(bundle, tmp_path):
    np.savez(tmp_path / "data.npz", images=noise(40), adapters=["alpha", "gamma"] * 20)

    def chosen(seed):
        found = opened(bundle, tmp_path / "data.npz", images=10, seed=seed)
        return [s.source for s in found.samples]

    assert chosen(0) == chosen(0)
    assert set(chosen(0)) != set(chosen(1))


def test_arrays_of_a_folded_bundle_are_shuffled(folded):
    data = opened(Bundle.open(folded), [{"images": noise(40)}], images=10)
    numbers = [int(s.source.removeprefix("image ")) for s in data.samples]
    assert len(set(numbers)) == 10
    assert max(numbers) >= 10  # a file that is sorted by class has one class in front


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": noise(4)}, "either adapters .* or adapter_ids"),
        ({"pixels": noise(4)}, "expected the keys adapter_ids, adapters, images; found pixels"),
        (
            {"images": noise(4)[:, :, :31], "adapters": ["alpha"] * 4},
            r"found float32 \[4, 3, 31, 32\]",
        ),
        ({"images": noise(4).astype(np.uint8), "adapters": ["alpha"] * 4}, "found uint8"),
        ({"images": noise(4) * np.nan, "adapters": ["alpha"] * 4}, "NaN or infinity"),
        ({"images": noise(4), "adapters": ["alpha"] * 3}, "expected 4 adapters, found 3"),
        ({"images": noise(4), "adapters": ["alpha", "alpha", "x", "x"]}, "unknown adapter 'x'"),
        ({"images": noise(4), "adapter_ids": [1, 2, 3, 9]}, "unknown adapter 9"),
        (
            {"images": noise(4), "adapters": ["alpha"] * 4, "labels": [0] * 4},
            "found adapters, images, labels",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(bundle, batch, message):
    with pytest.raises(DataError, match=message):
        opened(bundle, [batch])


def test_a_file_that_is_no_npz_is_refused(bundle, tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(DataError, match="does not exist"):
        opened(bundle, path)
    np.savez(path, images=noise(4))
    whole = path.read_bytes()
    with path.open("wb") as stream:
        np.save(stream, noise(4))
    array = path.read_bytes()
    path.write_bytes(whole)
    flip_byte(path, len(whole) // 2)
    for content in (b"no arrays", b"", whole[:-30], array, path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as an \.npz file") as caught:
            opened(bundle, path)
        assert "pickle" not in str(caught.value)
