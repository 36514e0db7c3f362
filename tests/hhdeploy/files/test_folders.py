"""Folders of images: what is data, what is not, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from hhdeploy.errors import DataError
from hhdeploy.files.folders import (
    find_splits,
    in_words,
    list_classes,
    list_images,
    name_bytes,
    part_of,
    place_of,
    spread,
)
from hhdeploy.preprocess import open_image


def write(root, *names):
    """Empty files below ``root``."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names(paths, root):
    return [p.relative_to(root).as_posix() for p in paths]


def test_what_is_expected_is_said(tmp_path):
    with pytest.raises(DataError, match="is not a directory"):
        list_images(tmp_path / "none")
    with pytest.raises(DataError, match="is not a directory"):
        list_classes(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no image.*\.jpeg"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="no class folders"):
        list_classes(tmp_path)
    write(tmp_path, "a/x.heic", "a/y.heic", "a/z")
    with pytest.raises(DataError, match=r"a holds no image.*It holds 2 \.heic, 1 without a suffix"):
        list_classes(tmp_path)


def test_images_are_sorted_by_class_and_the_rest_is_counted(tmp_path):
    write(tmp_path, "b/2.PNG", "b/1.png", "a/x.jpg", "a/more/y.jpg")
    write(tmp_path, "a/notes.txt", "a/z.HEIC", "b/v.heic", "loose.png", "README")
    found = list_images(tmp_path)
    expected = ["a/more/y.jpg", "a/x.jpg", "b/1.png", "b/2.PNG"]
    assert names(found.paths, tmp_path) == [*expected, "loose.png"]
    assert found.skipped == {".txt": 1, ".heic": 2, "without a suffix": 1}
    classes = list_classes(tmp_path)
    assert {k: names(v, tmp_path) for k, v in classes.paths.items()} == {
        "a": expected[:2],
        "b": expected[2:],
    }
    outside = {"pictures outside of a class folder": 1}
    assert classes.skipped == {**found.skipped, **outside}
    assert in_words(found.skipped) == "2 .heic, 1 .txt, 1 without a suffix"


def test_every_ending_of_a_format_is_an_image(tmp_path):
    """As browsers save JPEGs, and cameras and tools of science write plain pixels."""
    endings = ("jpe", "JFIF", "pgm", "pnm", "ppm")
    for number, ending in enumerate(endings):
        form = "JPEG" if ending.lower() in ("jpe", "jfif") else "PPM"
        Image.new("L", (3, 2), 40 * number).save(tmp_path / f"{number}.{ending}", form)
    found = list_images(tmp_path)
    assert names(found.paths, tmp_path) == [f"{i}.{ending}" for i, ending in enumerate(endings)]
    assert [open_image(path).getpixel((0, 0)) for path in found.paths] == [0, 40, 80, 120, 160]


def test_what_is_hidden_or_left_behind_is_no_class_and_no_image(tmp_path):
    write(tmp_path, "a/1.png", "a/._1.png", "a/.cache/2.png", ".ipynb_checkpoints/1.png")
    write(tmp_path, "__MACOSX/a/._1.png", "a/@eaDir/1.png/thumb.jpg", "lost+found/x.png")
    write(tmp_path, *(f"{name}/a.png" for name in (
        "#recycle", "#snapshot", "@Recycle", "$RECYCLE.BIN", "$Recycle.Bin", "__pycache__",
        "System Volume Information", "@Recently-Snapshot", "~snapshot",
    )))  # fmt: skip
    classes = list_classes(tmp_path)
    assert {k: names(v, tmp_path) for k, v in classes.paths.items()} == {"a": ["a/1.png"]}
    assert not classes.skipped


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write(tmp_path, "a/1.png")
    (tmp_path / "a" / "2.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"a/2\.png is a link to gone\.png, which does not exist"):
        list_images(tmp_path)
    (tmp_path / "a" / "2.png").unlink()
    (tmp_path / "a" / "part2").symlink_to("/mnt/gone")  # a folder, once
    with pytest.raises(DataError, match=r"a/part2 is a link to /mnt/gone, which does not exist"):
        list_classes(tmp_path)
    (tmp_path / "a" / "part2").unlink()
    (tmp_path / "b").symlink_to("elsewhere")
    with pytest.raises(DataError, match=r"b is a link to elsewhere"):
        list_classes(tmp_path)
    (tmp_path / "b").unlink()
    (tmp_path / "b").symlink_to("b")  # to itself
    with pytest.raises(DataError, match=r"b is a link to b"):
        list_classes(tmp_path)


def test_a_pipe_among_the_pictures_is_named(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    os.mkfifo(tmp_path / "a" / "control")  # no image: left out
    assert list_classes(tmp_path).skipped == {"without a suffix": 1}
    os.mkfifo(tmp_path / "b" / "3.png")
    for reader in (list_classes, list_images):
        with pytest.raises(DataError, match=r"b/3\.png is a pipe, a socket or a device; an"):
            reader(tmp_path)


def test_links_are_followed_and_circles_end(tmp_path):
    write(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "d/a/3.png")
    (tmp_path / "d" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    classes = list_classes(tmp_path / "d").paths
    assert {k: [p.name for p in v] for k, v in classes.items()} == {
        "a": ["3.png", "1.png", "2.png"],
        "b": ["1.png", "2.png"],
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(DataError, match="b cannot be read: Permission denied"):
        list_classes(tmp_path)
    (tmp_path / "b").chmod(0o700)


def test_names_that_are_not_utf8(tmp_path):
    """Of pictures any will do, also as bytes; a class is called by its name, in text."""
    picture = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d/dark/caf\xe9.png"))
    write(tmp_path, "d/dark/1.png", "d/light/2.png")
    picture.write_bytes(b"")
    assert list_classes(tmp_path / "d").paths["dark"] == (
        tmp_path / "d" / "dark" / "1.png",
        picture,
    )
    assert name_bytes(f"{picture.name}\0é") == b"caf\xe9.png\0\xc3\xa9"
    (tmp_path / "d" / "dark").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/d/d\xe9")))
    with pytest.raises(DataError, match=r"d/d\\udce9': expected .* in UTF-8, .* Rename the folder"):
        list_classes(tmp_path / "d")


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (("train/a/1.png", "val/a/2.png"), "train", "val"),
        (("Train/a/1.png", "Validation/a/2.png", "test/a/3.png"), "Train", "Validation"),
        (("train/a/1.png", "test/a/2.png"), "train", None),
        (("train/a/1.png", ".git/x", "readme.txt"), "train", None),
        (("train/1.png", "val/2.png"), ".", None),  # two classes of these names
        (("train/a/1.png", "bus/2.png"), ".", None),  # vehicles
        (("train/a/1.png", "train/loose.png", "val/2.png", "test/3.png"), "train", "val"),
        (("a/1.png", "b/1.png"), ".", None),
    ],
)
def test_splits(tmp_path, files, train, val):
    found = find_splits(write(tmp_path, *files))
    assert found.train == tmp_path / train
    assert found.val == (tmp_path / val if val else None)
    there = train != "." and (tmp_path / "test").is_dir()
    assert found.test == ((tmp_path / "test",) if there else ())


@pytest.mark.parametrize(
    ("files", "both"),
    [
        (("train/a/1.png", "Train/b/2.png"), "Train and .*/train"),
        (("train/a/1.png", "training/2.png"), "train and .*/training"),
        (("train/a/1.png", "dev/a/1.png", "valid/a/1.png"), "dev and .*/valid"),
    ],
)
def test_two_folders_for_one_part_of_a_split(tmp_path, files, both):
    with pytest.raises(DataError, match=f"/{both}: expected one folder for this part"):
        find_splits(write(tmp_path, *files))


@pytest.mark.parametrize("part", ["val", "train"])
def test_a_part_of_a_split_that_is_not_mounted(tmp_path, part):
    write(tmp_path, "train/a/1.png", "test/a/1.png")
    (tmp_path / "train").rename(tmp_path / ("train" if part == "val" else "training"))
    (tmp_path / part).symlink_to("/mnt/gone")
    with pytest.raises(DataError, match=f"{part} is a link to /mnt/gone"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train2017", "val2017"),
        ("eval", "train"),
        ("seg_test/seg_test", "seg_train/seg_train"),
        ("fold1", "fold2"),
        ("Images_Train", "Images_Val"),
        ("test", "val"),
        ("TestSet", "TrainSet"),
        ("holdout", "split-1"),
    ],
)
def test_a_split_by_other_names_is_no_classes(tmp_path, one, other):
    write(tmp_path, f"{one}/a/1.png", f"{other}/a/2.png", f"{other}/b/3.png", "masks/a/1.png")
    assert find_splits(tmp_path).train == tmp_path
    names = f"{one.split('/')[0]} and {other.split('/')[0]}, which both hold a: parts of a split"
    with pytest.raises(DataError, match=f"{names}.*`data`.*`val_data`"):
        list_classes(tmp_path)


@pytest.mark.parametrize("deeper", ["", "good/"])
def test_a_split_within_the_classes_is_not_one_pile(tmp_path, deeper):
    write(tmp_path, f"a/train/{deeper}1.png", f"a/test/{deeper}2.png", "b/train/3.png")
    with pytest.raises(DataError, match="a holds train and test: expected images of one class"):
        list_classes(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("images/1.png", "masks/1.png"), "holds images and masks"),
        (("a/Images/1.png", "a/Masks/1.png", "b/2.png"), "a holds Images and Masks"),
        (("a/img/1.png", "a/ground truth/1.png"), "a holds img and ground truth"),
    ],
)
def test_masks_are_no_class_and_no_images_of_one(tmp_path, files, said):
    with pytest.raises(DataError, match=f"{said}: expected images alone, found masks"):
        list_classes(write(tmp_path, *files))


@pytest.mark.parametrize(
    "files",
    [
        ("train/night/1.png", "bus/night/2.png"),  # vehicles
        ("mask/1.png", "no mask/images/2.png"),  # faces
        ("indoor/a/1.png", "outdoor/a/2.png"),
        ("test tube/1.png", "fold/2.png", "train/3.png"),
        ("valley/a/1.png", "tests/b/2.png", "contest/a/3.png"),
        ("a/train/1.png", "b/test/2.png"),
        ("a/fold1/1.png", "a/fold2/2.png"),  # of one class, for any use
    ],
)
def test_classes_whose_names_are_words_of_splits_too(tmp_path, files):
    assert [*list_classes(write(tmp_path, *files)).paths] == sorted(
        {f.split("/")[0] for f in files}
    )


def test_spread_meets_every_part(tmp_path):
    paths = [tmp_path / str(i) for i in range(13)]
    assert spread(paths, 13) == spread(paths, 20) == paths
    assert [int(p.name) for p in spread(paths, 5)] == [0, 2, 5, 7, 10]


def test_a_list_of_paths_and_labels_stands_for_a_folder(tmp_path):
    """Of VTAB: numbers in their order, paths that begin at the list's folder."""
    write(tmp_path, "images/b c.png", "images/a.png", "images/d.png", "train/e.png")
    file = tmp_path / "train800val200.txt"
    file.write_text("images/d.png 10\nimages/a.png 2\n\ntrain/e.png\t2\nimages/b c.png 10\n")
    found = list_classes(file)
    assert list(found.paths) == ["2", "10"]
    assert names(found.paths["2"], tmp_path) == ["images/a.png", "train/e.png"]
    assert names(found.paths["10"], tmp_path) == ["images/b c.png", "images/d.png"]
    assert found.skipped == {}
    assert len(list_images(file).paths) == 4
    assert place_of(file) == place_of(tmp_path) == tmp_path
    assert find_splits(file).train == file
    file.write_text("images/a.png cat\nimages/d.png 10\n")
    assert list(list_classes(file).paths) == ["10", "cat"]
    file.write_bytes(b"\xef\xbb\xbfimages/a.png cat\r\nimages/d.png 10\r\n")  # of Notepad
    assert names(list_classes(file).paths["cat"], tmp_path) == ["images/a.png"]
    assert names(list_images(file).paths, tmp_path) == ["images/a.png", "images/d.png"]
    assert part_of(tmp_path, "train800val200") == file
    assert part_of(tmp_path, "images") == tmp_path / "images"
    assert part_of(tmp_path, "other") == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image"),
        ("a.png 1\na.png\n", r"line 2: expected the path .* found 'a\.png'\."),
        (
            "a.png 1\na.png 1\nin/../a.png 2\n",
            r"line 3: expected the label of in/\.\./a\.png to be '1', as in line 1, found '2'",
        ),
        ("a.png 1\n" + "x" * 5000 + " 2\n", r"line 2: .*, and no such image"),
        ("a.png 1\ngone.png 2\n", r"line 2: .* found 'gone\.png 2', and no such image"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, message):
    write(tmp_path, "a.png", "in/b.png")
    (tmp_path / "l.txt").write_text(text)
    for reader in (list_classes, list_images):
        with pytest.raises(DataError, match=message):
            reader(tmp_path / "l.txt")


def test_one_word_in_two_ways_of_unicode_is_refused(tmp_path):
    write(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "tea/3.png")
    said = r"expected cafe. to be written in one way, found .* 'cafe\\u0301' and 'caf\\xe9'"
    with pytest.raises(DataError, match=said):
        list_classes(tmp_path)
    lines = "caf\u00e9/1.png caf\u00e9\ncafe\u0301/2.png cafe\u0301\ntea/3.png tea\n"
    (tmp_path / "list.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        list_classes(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("labels", "fraction"), [("20.37 21", r"20\.37"), ("3 -0,5", "-0,5"), ("1.0 nan", "nan")]
)
def test_values_in_a_list_are_no_classes(tmp_path, labels, fraction):
    lines = zip(("a.png", "b.png"), labels.split(), strict=True)
    file = write(tmp_path, "a.png", "b.png") / "ages.txt"
    file.write_text("".join(f"{name} {label}\n" for name, label in lines))
    with pytest.raises(DataError, match=rf"ages\.txt: .* {fraction} among them.*`labels`"):
        list_classes(file)
    assert len(list_images(file).paths) == 2  # pictures whose labels nobody asks for


@pytest.mark.parametrize("labels", ["10 2", "-30 15", "1.0 2.0", "1.5 old"])
def test_other_labels_of_a_list_are_classes(tmp_path, labels):
    lines = zip(("a.png", "b.png"), labels.split(), strict=True)
    file = write(tmp_path, "a.png", "b.png") / "l.txt"
    file.write_text("".join(f"{name} {label}\n" for name, label in lines))
    assert sorted(list_classes(file).paths) == sorted(labels.split())


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a list of images"):
        list_images(tmp_path / "l.txt")
