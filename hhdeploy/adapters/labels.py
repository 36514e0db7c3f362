"""Truths of images that no folder tells: a table of labels or values, and how answers are scored.

A table is a CSV file, a line an image: its path below the images' folder, then its classes with
``;`` between, or its values, a column each, or 0 and 1, a column for each of several classes. A
first line that begins with ``path`` names the columns.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES, ProblemType
from hhdeploy.errors import DataError
from hhdeploy.files.folders import check_words
from hhdeploy.files.plain import read_few
from hhdeploy.files.tensors import ByContent

# What `calibrate` looks for in a folder of images.
LABELS_FILE = "labels.csv"
# Of a table: millions of images.
_MOST_BYTES = 1 << 28
_SEPARATOR = ";"
_HEADER = "path"
_LARGEST = float(np.finfo(np.float32).max)
# What Python reads as a number and may be a code: 007, 1_1, a well's 1E2, digits of other scripts.
# Programs that write values put a point or a sign there: 1.0e2, 1e-07.
_CODE = re.compile(r"[+-]?0\d.*|\d+[eE]\d+|.*_.*|.*[^\x00-\x7f].*")
# A number as people write it, with a sign of its unit or thousands apart: 50%, $5, 1,000.5.
_WRITTEN = re.compile(
    r"[$€£¥]?\s*[+-]?(\d+([.,]\d+)?|\d{1,3}([., '’]\d{3})+([.,]\d+)?)\s*(%|‰|°[CF]?|[$€£¥])?"
)
# The part of what a column's values differ by that float32, which models compute in, may round.
_ROUNDED = 0.01


@dataclass(frozen=True, eq=False)
class LabelTable(ByContent):
    """Images and what is true of each.

    Attributes:
        problem_type: what the truths are.
        names: of the classes, labels or values.
        paths: the images, in the order of the file.
        truths: float32 [images, names]: 1 where a class or label is true, else 0; or the values.
    """

    problem_type: ProblemType
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    truths: NDArray[np.float32]


@dataclass(frozen=True)
class _Line:
    """One image's line: where it stands, for messages, and its cells."""

    where: str
    path: Path
    cells: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The first cell's classes, without empty ones."""
        return [name.strip() for name in self.cells[0].split(_SEPARATOR) if name.strip()]


def read_labels(
    file: Path,
    root: Path,
    problem_type: ProblemType | None = None,
    names: Sequence[str] | None = None,
) -> LabelTable:
    """Read a table of labels.

    Args:
        file: the CSV file.
        root: what its paths are relative to.
        problem_type: None: values where all cells are numbers, but for columns of 0 and 1;
            independent labels where an image has several, or no column of 0 and 1 is 1; else
            classes.
        names: what there is, in the order of the truths; None: the classes of the file, sorted,
            or the header's names of the values. Columns of values go by the header's names.

    Raises:
        DataError: naming the file and the line: no file, no line, an image that is not there or
            is there twice, no number, numbers in some lines and none in others, numbers that may
            be classes' or an image without a class where the kind is not told, columns that are
            not ``names``, a class that is none of them, several classes of one image where one is
            right, one word in two ways of Unicode, values that float32 does not tell apart.
    """
    header, lines = _read(file, root)
    if problem_type != VALUES and _are_marks(lines):
        marked = _marked_names(file, header or names or (), len(lines[0].cells))
        lines = [_named(line, marked) for line in lines]
        kind = problem_type or _kind_of_names(lines)
        # A label that is true of no image is one all the same.
        names = names or (marked if kind == LABELS else None)
    else:
        kind = problem_type or _kind(lines)
    if kind == VALUES:
        wide = np.asarray([_values(line, len(lines[0].cells)) for line in lines], np.float64)
        found, columns_of_values = _value_columns(file, header, wide.shape[1], names)
        truths = _in_float32(wide[:, columns_of_values], found, file)
    else:
        _check_columns(lines)
        written = {name for line in lines for name in line.labels}
        check_words((*(names or ()), *written), file)
        found = tuple(names or sorted(written))
        columns = {name: column for column, name in enumerate(found)}
        truths = np.zeros((len(lines), len(found)), np.float32)
        for row, line in zip(truths, lines, strict=True):
            row[_columns(line, columns, kind)] = 1.0
    return LabelTable(kind, found, tuple(line.path for line in lines), truths)


def mean_average_precision(scores: NDArray[Any], truths: NDArray[Any]) -> float | None:
    """mAP of independent labels: the mean of the average precision of each label that occurs.

    Args:
        scores: [images, labels], of which the order alone counts; equal ones count together.
        truths: [images, labels], 1 where the label is true.

    Returns:
        A share from 0 to 1; None if no label is true of any image.
    """
    found = [
        _average_precision(scores[:, label], truths[:, label])
        for label in range(truths.shape[1])
        if truths[:, label].any()
    ]
    return float(np.mean(found)) if found else None


def mean_absolute_error(values: NDArray[Any], truths: NDArray[Any]) -> float:
    """MAE over all images and values, in their own unit."""
    return float(np.mean(np.abs(values.astype(np.float64) - truths)))


def _average_precision(scores: NDArray[Any], truths: NDArray[Any]) -> float:
    """Sum over the thresholds of precision times what recall gains there."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each run of equal scores
    right = np.cumsum(truths[order])[last]
    taken = np.flatnonzero(last) + 1
    return float(np.sum(np.diff(right, prepend=0.0) * right / taken) / truths.sum())


def _read(file: Path, root: Path) -> tuple[tuple[str, ...], list[_Line]]:
    """Header cells behind ``path`` (empty without a header) and the images' lines."""
    try:
        content = io.BytesIO(read_few(file, _MOST_BYTES))
        with io.TextIOWrapper(content, newline="", encoding="utf-8-sig") as stream:
            # People write a blank after the comma, before the quotes too.
            reader = csv.reader(stream, skipinitialspace=True)
            rows = [(n, row) for n, row in enumerate(reader, 1) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a CSV file in UTF-8: {error}") from error
    header: tuple[str, ...] = ()
    if rows and rows[0][1][0].strip().lower() == _HEADER:
        header = tuple(cell.strip() for cell in rows.pop(0)[1][1:])
    lines: dict[Path, _Line] = {}
    for number, row in rows:
        where, path = f"{file}, line {number}", root / row[0].strip()
        if any("\0" in cell for cell in row):
            raise DataError(
                f"{where}: expected text, found a zero byte. Save the file as UTF-8, not UTF-16."
            )
        if lost := [cell for cell in row[1:] if "\n" in cell.strip()]:
            raise DataError(
                f"{where}: expected a path and its label or values in one line, found a cell of "
                f"several, {lost[0][:80]!r}. A quotation mark that is opened in it is closed in a "
                "later line, or never: close it, or leave it out."
            )
        if len(row) < 2:
            raise DataError(
                f"{where}: expected a path, a comma, and its label or values, found "
                f"{row[0][:80]!r}. Of a file with semicolons or tabs between make one with commas."
            )
        if not os.path.isfile(path):  # no error where a text is too long for a path
            if not lines:  # a header, or another format, of which nothing was read yet
                raise DataError(
                    f"{where}: expected the path of an image below {root}, or a header that begins "
                    f"with {_HEADER}; found {','.join(row)[:80]!r}, and no such image. The file is "
                    "CSV, with the paths in the first column (of pandas: to_csv(index=False))."
                )
            raise DataError(f"{where}: {path} does not exist. Paths are relative to {root}.")
        if path in lines:
            raise DataError(f"{where}: {row[0]} is there already: {lines[path].where}.")
        lines[path] = _Line(where, path, tuple(cell.strip() for cell in row[1:]))
    if not lines:
        raise DataError(f"{file} names no image. Expected lines such as: images/1.jpg,cat;dog")
    return header, list(lines.values())


def _kind(lines: Sequence[_Line]) -> ProblemType:
    numbers = [line for line in lines if all(map(_may_be_number, line.cells))]
    if len(numbers) == len(lines):
        _check_values(lines)
        return VALUES
    several = any(_SEPARATOR in cell for line in lines for cell in line.cells)
    if numbers and not several:  # one gap among ten thousand values makes no classes of them
        others = [line for line in lines if not all(map(_may_be_number, line.cells))]
        few, many = sorted((numbers, others), key=len)
        raise DataError(
            f"{few[0].where}: expected {'numbers' if many is numbers else 'no numbers'}, as in "
            f"{len(many)} of {len(lines)} lines, found {', '.join(map(repr, few[0].cells))}. Mend "
            f"or leave out such lines, or say what all of them are with `problem_type`: {VALUES}, "
            f"{CLASSES} or {LABELS}."
        )
    if not several:
        _check_gaps(lines)
    return _kind_of_names(lines)


def _kind_of_names(lines: Sequence[_Line]) -> ProblemType:
    return CLASSES if all(len(line.labels) == 1 for line in lines) else LABELS


def _check_gaps(lines: Sequence[_Line]) -> None:
    """Among single classes an empty cell may be a picture that nobody labelled, or one of none."""
    if gaps := [line for line in lines if not line.labels]:
        raise DataError(
            f"{gaps[0].where}: expected a class, as in {len(lines) - len(gaps)} of {len(lines)} "
            "lines, found none. Fill in or leave out such lines, or, where a picture may have no "
            f"label, say so with `problem_type`: {LABELS}."
        )


def _check_values(lines: Sequence[_Line]) -> None:
    """Codes of classes may be read as numbers. One column of whole numbers from 0 or 1 on, none
    left out, is what classes are given too."""
    for where, cell in ((line.where, cell) for line in lines for cell in line.cells):
        if not _is_number(cell) or _CODE.fullmatch(cell):
            read = _with_point(cell)
            value = f"the value {float(read):g}" if _is_number(read) else "a value with its unit"
            raise DataError(
                f"{where}: {cell!r} may be the code of a class or {value}. Say which with "
                f"`problem_type`: {CLASSES}, or, as numbers alone with a decimal point, {VALUES}."
            )
    found = {float(line.cells[0]) for line in lines}
    low, high = min(found), max(found)
    gapless = low in (0, 1) and all(map(float.is_integer, found)) and high - low == len(found) - 1
    if gapless and 1 < len(found) < len(lines) and all(len(line.cells) == 1 for line in lines):
        raise DataError(
            f"{lines[0].where} and the following: {low:.0f} to {high:.0f}, all of them whole, may "
            f"be the numbers of {len(found)} classes or values. Say which with `problem_type`: "
            f"{CLASSES} or {VALUES}."
        )


def _are_marks(lines: Sequence[_Line]) -> bool:
    """True of several columns of nothing but 0 and 1."""
    return all(
        len(line.cells) == len(lines[0].cells) > 1
        and all(_is_number(cell) and float(cell) in (0, 1) for cell in line.cells)
        for line in lines
    )


def _marked_names(file: Path, names: Sequence[str], count: int) -> tuple[str, ...]:
    """What columns of 0 and 1 stand for."""
    if len(set(filter(None, names))) != count or len(names) != count:
        raise DataError(
            f"{file}: {count} columns of 0 and 1: expected a first line that begins with {_HEADER} "
            f"and names each of them differently, found {', '.join(names) or 'none'}. Where "
            f"they are values, the problem type is {VALUES}."
        )
    return tuple(names)


def _named(line: _Line, names: Sequence[str]) -> _Line:
    """A line of 0 and 1 as one of the names that are true."""
    true = [name for name, cell in zip(names, line.cells, strict=True) if float(cell)]
    return replace(line, cells=(_SEPARATOR.join(true),))


def _is_number(text: str) -> bool:
    """One that float32 holds."""
    try:
        return abs(float(text)) <= _LARGEST
    except ValueError:
        return False


def _may_be_number(text: str) -> bool:
    """One, or one with a decimal comma, thousands apart or the sign of a unit."""
    return _is_number(_with_point(text)) or _WRITTEN.fullmatch(text) is not None


def _with_point(text: str) -> str:
    return text.replace(",", ".")


def _values(line: _Line, count: int) -> list[float]:
    if len(line.cells) != count or not all(map(_is_number, line.cells)):
        raise DataError(
            f"{line.where}: expected {count} number{'s' * (count > 1)}, as many as in the first "
            f"line, found {', '.join(map(repr, line.cells))}."
        )
    return [float(cell) for cell in line.cells]


def _in_float32(
    values: NDArray[np.float64], names: Sequence[str], file: Path
) -> NDArray[np.float32]:
    """The values as models compute them, where their differences are left.

    Raises:
        DataError: naming the column of which they are not.
    """
    narrow = values.astype(np.float32)
    low, high = values.min(axis=0), values.max(axis=0)
    lost = np.abs(narrow - values).max(axis=0)
    for name, least, most, step in zip(names, low, high, lost, strict=True):
        if least < most and step > _ROUNDED * (most - least):
            raise DataError(
                f"{file}: {name}: expected values that float32, which models compute in, tells "
                f"apart, found {least:.15g} to {most:.15g}, which it rounds by {step:.1g}. "
                "Subtract what they have in common; where they are codes of classes, the problem "
                f"type is {CLASSES}."
            )
    return narrow


def _value_columns(
    file: Path, header: Sequence[str], count: int, names: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """The values' names, and the column of each."""
    unnamed = ("value",) if count == 1 else tuple(f"value {i}" for i in range(1, count + 1))
    found = tuple(names or header or unnamed)
    if len(found) != count or (header and len(header) != count):
        raise DataError(
            f"{file}: expected a column for each of {', '.join(header or found)}, found {count} of "
            "values."
        )
    if len(set(header)) < len(header):
        raise DataError(f"{file}: the header names a column twice: {', '.join(header)}.")
    if not header or found == unnamed:  # one of both has no names: the order is all there is
        return found, list(range(count))
    check_words((*header, *found), file)
    if set(header) != set(found):
        raise DataError(
            f"{file}: expected the columns {', '.join(found)} in any order, found "
            f"{', '.join(header)}. Name them alike, or leave out the line that names them."
        )
    return found, [header.index(name) for name in found]


def _check_columns(lines: Sequence[_Line]) -> None:
    for line in lines:
        if len(line.cells) > 1:
            raise DataError(
                f"{line.where}: expected one column of labels, found {len(line.cells)}. Write "
                f"several labels of an image with {_SEPARATOR} between."
            )


def _columns(line: _Line, columns: Mapping[str, int], kind: ProblemType) -> list[int]:
    labels = line.labels
    if kind == CLASSES and len(labels) != 1:
        raise DataError(
            f"{line.where}: expected one class, found {_SEPARATOR.join(labels) or 'none'}. Where "
            f"several or none may be true, the problem type is {LABELS}."
        )
    if unknown := [name for name in labels if name not in columns]:
        raise DataError(
            f"{line.where}: expected labels among {', '.join(columns)}, found {unknown[0]}."
        )
    return [columns[name] for name in labels]
