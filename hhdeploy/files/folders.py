"""Folders of images: DIR/CLASS/image and DIR/train with DIR/val, as lists of files.

Where such a folder is wanted, a list does as well, as VTAB's train800val200.txt: a text file of
lines "path label", the paths beginning at the list's own folder.

What is no part of the data never becomes one: hidden folders and files, and those that systems
leave beside pictures. What else is left out is counted and named, and a link that leads nowhere
is an error. So is what looks like the parts of a split and is not in the places of one.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hhdeploy.errors import DataError, abbreviate
from hhdeploy.files.writing import is_folder

# Every build of Pillow reads these; of others a folder says how many it leaves out.
IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .ppm .pgm .pnm".split()
)
# Left by archives, file servers and file systems, which spell them in several ways.
_LEFT_BEHIND = frozenset(
    "__macosx,__pycache__,@eadir,#recycle,@recycle,$recycle.bin,#snapshot,~snapshot,"
    "@recently-snapshot,lost+found,system volume information".split(",")
)
_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "dev")
_SPLITS = frozenset({*_TRAIN, *_VAL, "test", "testing"})
# A word by which a folder tells that it is a part of a split: train2017, seg_test, fold1.
_PART = re.compile(
    r"(?<![a-z])(?:(?P<train>train|training)|(?P<judging>val|valid|validation|dev|test|testing|eval"
    r"|evaluation|holdout)|fold|split)(?:set|data|images?)?(?![a-z])"
)

# Folders of pictures, and of what was drawn for each of them: a mask is an image, and no example.
_SHOWN = re.compile("images?|imgs?|pictures|photos")
_DRAWN = re.compile("masks?|labels?|annotations?|segmentations?|ground[ _-]?truths?|gt")


@dataclass(frozen=True)
class FoundImages:
    """Image files below a directory.

    Attributes:
        paths: sorted.
        skipped: how many files were left out, by what they are (a suffix, mostly).
    """

    paths: tuple[Path, ...]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class Classes:
    """Image files by class.

    Attributes:
        paths: class name -> its files, both sorted.
        skipped: as of `FoundImages`, over all classes.
    """

    paths: Mapping[str, tuple[Path, ...]]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class Splits:
    """The parts of DIR/train/CLASS/image and DIR/val/CLASS/image.

    Attributes:
        train: the folder to train on; DIR itself if it is not split.
        val: the folder that judges; None if there is none.
        test: the parts that are neither, DIR/test.
    """

    train: Path
    val: Path | None
    test: tuple[Path, ...] = ()


def is_list(path: Path) -> bool:
    """Whether a path is a list of images and labels rather than a folder."""
    return path.suffix.lower() == ".txt" and path.is_file()


def place_of(source: Path) -> Path:
    """The folder that a folder's or a list's paths begin at."""
    return source.parent if is_list(source) else source


def part_of(source: Path, name: str) -> Path:
    """The folder or the list of that name in a folder; the source itself where there is none."""
    places = (source / name, source / f"{name}.txt")
    return next((p for p in places if p.is_dir() or is_list(p)), source)


def list_images(directory: Path) -> FoundImages:
    """All image files below ``directory``, links followed; or those of a list.

    Raises:
        DataError: not a directory, no image in it, a directory that cannot be read, a link that
            leads nowhere, or a pipe by an image's name.
    """
    if is_list(directory):
        return FoundImages(tuple(sorted(path for path, _ in _listed(directory))), {})
    if not is_folder(directory, DataError):
        raise DataError(f"{directory} is not a directory. A folder of images was expected.")
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for file in _files(directory):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            if not file.is_file():  # reading it might never end
                raise DataError(
                    f"{file} is a pipe, a socket or a device; an image file was expected. Remove "
                    "it, or its link."
                )
            found.append(file)
        else:
            skipped[file.suffix.lower() or "without a suffix"] += 1
    if not found:
        others = f" It holds {in_words(skipped)}." if skipped else ""
        raise DataError(
            f"{directory} holds no image. Expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}.{others}"
        )
    return FoundImages(tuple(sorted(found)), dict(skipped))


def list_classes(directory: Path) -> Classes:
    """Image files of a DIR/CLASS/image folder by class; of a list by label, numbers in order.

    Raises:
        DataError: no class folders, one of them without an image, or whose name is not UTF-8;
            parts of a split among or in them; a list of values; or see `list_images`.
    """
    if is_list(directory):
        listed = _listed(directory)
        _check_classes(directory, [label for _, label in listed])
        check_words({label for _, label in listed}, directory)
        return Classes(_by_label(listed), {})
    if not is_folder(directory, DataError):
        raise DataError(f"{directory} is not a directory. Expected DIR/CLASS/image.")
    classes: dict[str, tuple[Path, ...]] = {}
    skipped: Counter[str] = Counter()
    for child in visible(directory):
        if child.is_dir():
            _check_class_name(child)
            images = list_images(child)
            classes[child.name] = images.paths
            skipped.update(images.skipped)
        elif child.suffix.lower() in IMAGE_SUFFIXES:
            skipped["pictures outside of a class folder"] += 1
        else:
            skipped[child.suffix.lower() or "without a suffix"] += 1
    if not classes:
        raise DataError(f"{directory} has no class folders. Expected DIR/CLASS/image.")
    _check_no_parts(directory, classes)
    check_words(classes, directory)
    return Classes(classes, dict(skipped))


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of some names that are one word: the same, or the same but for how Unicode writes it."""
    seen: dict[str, str] = {}
    for name in names:
        word = unicodedata.normalize("NFC", name)
        if word in seen:
            return seen[word], name
        seen[word] = name
    return None


def check_words(names: Iterable[str], where: Path) -> None:
    """Raise `DataError` where two different names are written as one word: file systems and
    editors write é as one character or as two."""
    if (same := alike(sorted(set(names)))) is not None:
        one, other = map(ascii, same)
        raise DataError(
            f"{where}: expected {same[0]} to be written in one way, found two ways of Unicode, "
            f"{one} and {other}. Write it alike everywhere (in Python "
            "unicodedata.normalize('NFC', name))."
        )


def find_splits(directory: Path) -> Splits:
    """The parts of a folder whose only folders are called train, val and the like.

    They are classes where train has no folders in it, or where there are others beside it: a train
    is also a vehicle.

    Raises:
        DataError: two folders for one part, or a link that leads nowhere.
    """
    whole = Splits(directory, None)
    if not os.path.isdir(directory):
        return whole
    parts = [d for d in visible(directory) if d.is_dir()]
    trains = [d for d in parts if d.name.lower() in _TRAIN]
    if not trains or not {d.name.lower() for d in parts} <= _SPLITS:
        return whole
    if not any(child.is_dir() for train in trains for child in visible(train)):
        return whole
    vals = [d for d in parts if d.name.lower() in _VAL]
    for same in (trains, vals):
        if len(same) > 1:
            raise DataError(
                f"{same[0]} and {same[1]}: expected one folder for this part of a split, found "
                f"{len(same)}. Put their pictures together, or move what is not to be used "
                "elsewhere."
            )
    tests = tuple(d for d in parts if d not in (*trains, *vals))
    return Splits(trains[0], vals[0] if vals else None, tests)


def visible(directory: Path) -> list[Path]:
    """What a directory holds, sorted, but for what is hidden or was left behind by a system.

    Raises:
        DataError: a link that leads nowhere: what it led to may have been a part of the data.
    """
    found = sorted(p for p in directory.iterdir() if is_visible(p.name))
    for path in found:
        _check_link(path)
    return found


def in_words(skipped: Mapping[str, int]) -> str:
    """``3 .heic, 1 .txt``: what was left out, the most frequent first."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def name_bytes(text: str) -> bytes:
    """Text that has names of files in it, as bytes: UTF-8, but for names that are none."""
    return text.encode("utf-8", "surrogateescape")


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """``count`` of ``paths``, evenly spaced, so that every class of a sorted list is met."""
    if len(paths) <= count:
        return list(paths)
    return [paths[(i * len(paths)) // count] for i in range(count)]


def _listed(file: Path) -> list[tuple[Path, str]]:
    """Every image of a list, with its label.

    Raises:
        DataError: naming file and line, of one that is no path and label, whose image is not
            there, or has another label in a line above; or an empty list.
    """
    found = []
    # By the file's own number: links, and a path written otherwise, are the same image.
    known: dict[tuple[int, int], tuple[int, str]] = {}
    try:
        # Editors of Windows put a mark before the first line.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a list of images: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        path = file.parent / name.strip()
        if not name.strip() or not os.path.isfile(path):  # no error where it is too long for a path
            raise DataError(
                f"{file}, line {number}: expected the path of an image below {file.parent} and its "
                f"label, as in images/0.png 3; found {line.strip()!r}"
                f"{', and no such image' if name.strip() else ''}."
            )
        stat = path.stat()
        first, before = known.setdefault((stat.st_dev, stat.st_ino), (number, label))
        if label != before:
            raise DataError(
                f"{file}, line {number}: expected the label of {name.strip()} to be {before!r}, as "
                f"in line {first}, found {label!r}. An image has one class: mend one of them."
            )
        found.append((path, label))
    if not found:
        raise DataError(f"{file} names no image. Expected lines of a path and a label.")
    return found


def _check_class_name(folder: Path) -> None:
    """A class's name goes into files that are text; that of a picture may be any."""
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{str(folder)!r}: expected the name of a class in UTF-8, found bytes that are none. "
            "Rename the folder."
        ) from error


def _check_classes(file: Path, labels: Sequence[str]) -> None:
    """Numbers with fractions are values, of which each would be a class of its own."""
    try:
        numbers = [float(label.replace(",", ".")) for label in labels]
    except ValueError:
        return
    if fractions := [x for x, n in zip(labels, numbers, strict=True) if not n.is_integer()]:
        raise DataError(
            f"{file}: expected a class for each image, found numbers alone, {fractions[0]} among "
            "them, which are values. They are trained from a CSV file of lines 'path,value', "
            "`labels`."
        )


def _check_no_parts(directory: Path, classes: Mapping[str, Sequence[Path]]) -> None:
    """A split by other names, or within the classes, is neither classes nor one pile; nor are
    pictures and their masks.

    Raises:
        DataError: two folders of names of parts hold folders of one name, a class has a folder to
            train on and one to judge on, or there are masks beside images.
    """
    below: dict[str, set[str]] = {}
    for name, paths in classes.items():
        folders = {path.parent.relative_to(directory / name) for path in paths}
        below[name] = {part for folder in folders for part in folder.parts}
        said = {m.lastgroup: part for part in below[name] if (m := _PART.search(part.lower()))}
        if {"train", "judging"} <= said.keys():
            raise DataError(
                f"{directory / name} holds {said['train']} and {said['judging']}: expected images "
                "of one class, found parts of a split. Move them to DIR/train/CLASS and "
                "DIR/val/CLASS, or name the images that are to be used in a list, a text file of "
                "lines of a path and a label."
            )
    for place, names in {
        directory: classes,
        **{directory / n: p for n, p in below.items()},
    }.items():
        shown, drawn = ([n for n in names if p.fullmatch(n.lower())] for p in (_SHOWN, _DRAWN))
        if shown and drawn:
            raise DataError(
                f"{place} holds {shown[0]} and {drawn[0]}: expected images alone, found masks "
                "beside them. Move them elsewhere, or name the images that are to be used in a "
                "list, a text file of lines of a path and a label."
            )
    parts = [name for name in classes if _PART.search(name.lower())]
    for one, other in itertools.combinations(parts, 2):
        if same := sorted(below[one] & below[other]):
            raise DataError(
                f"{directory}: expected DIR/CLASS/image, found {one} and {other}, which both hold "
                f"{abbreviate(same, 3)}: parts of a split. In training, pass one of them as `data` "
                "and what judges as `val_data`; in calibration, as `data` and `eval_data`; or call "
                "them DIR/train and DIR/val, with nothing but DIR/test beside them."
            )


def _by_label(listed: Sequence[tuple[Path, str]]) -> dict[str, tuple[Path, ...]]:
    labels = {label for _, label in listed}
    numbers = all(label.isdecimal() for label in labels)
    ordered = sorted(labels, key=int) if numbers else sorted(labels)
    return {
        wanted: tuple(sorted(path for path, label in listed if label == wanted))
        for wanted in ordered
    }


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor called as what systems and archives leave."""
    return not name.startswith(".") and name.lower() not in _LEFT_BEHIND


def _files(directory: Path) -> list[Path]:
    """Visible files below a directory; one that links lead to twice is walked once."""

    def refused(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    found, walked = [], set()
    for root, folders, files in os.walk(directory, onerror=refused, followlinks=True):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in walked:
            folders.clear()
            continue
        walked.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if is_visible(name))
        own = [Path(root, name) for name in files if is_visible(name)]
        for path in own:
            _check_link(path)
        found += own
    return found


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist. Restore what it leads "
            "to, or remove the link."
        )
