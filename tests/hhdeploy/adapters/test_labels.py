"""Tables of labels and values, and the scores of answers to them."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.adapters.labels import (
    mean_absolute_error,
    mean_average_precision,
    read_labels,
)
from hhdeploy.errors import DataError


@pytest.fixture
def root(tmp_path):
    """A folder of four files."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "c.png", "sub/d.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def table(root, text, *options):
    (root / "labels.csv").write_text(text, encoding="utf-8")
    return read_labels(root / "labels.csv", root, *options)


def test_classes(root):
    found = table(root, "path,label\nb.png,dog\na.png, cat \n\nsub/d.png,dog\n")
    assert (found.problem_type, found.names) == (CLASSES, ("cat", "dog"))
    assert [p.relative_to(root).as_posix() for p in found.paths] == ["b.png", "a.png", "sub/d.png"]
    assert found.truths.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_labels_of_which_several_or_none_are_true(root):
    found = table(root, '\ufeffa.png,night;cat\nb.png,\n"c.png","cat; indoor"\n')
    assert (found.problem_type, found.names) == (LABELS, ("cat", "indoor", "night"))
    assert found.truths.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    one_each = table(root, "a.png,x\nb.png,y\n", LABELS)
    assert one_each.problem_type == LABELS


def test_values(root):
    found = table(root, "Path,age,height\na.png,41.5,1.8\nb.png,-3e1,0\n")
    assert (found.problem_type, found.names) == (VALUES, ("age", "height"))
    assert found.truths.tolist() == [[41.5, np.float32(1.8)], [-30, 0]]
    assert table(root, "a.png,1\n").names == ("value",)
    assert table(root, "a.png,1,2\n").names == ("value 1", "value 2")


def test_numbers_are_classes_where_it_is_said(root):
    found = table(root, "a.png,7\nb.png,10\n", CLASSES)
    assert (found.problem_type, found.names) == (CLASSES, ("10", "7"))


def test_names_that_are_known_give_the_columns(root):
    assert table(root, "a.png,y\n", CLASSES, ("z", "y")).truths.tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"line 1: expected labels among z, y, found x\."):
        table(root, "a.png,x\n", CLASSES, ("z", "y"))
    with pytest.raises(DataError, match="a column for each of age, height, found 1"):
        table(root, "a.png,1\n", VALUES, ("age", "height"))


def test_columns_of_values_go_by_their_names(root):
    names = ("age", "height")
    found = table(root, "path,height,age\na.png,1.5,40\nb.png,2,50\n", VALUES, names)
    assert found.names == names
    assert found.truths.tolist() == [[40, 1.5], [50, 2]]
    # Where one of both has no names, their order is all there is.
    assert table(root, "a.png,40,1.5\n", VALUES, names).truths.tolist() == [[40, 1.5]]
    unnamed = table(root, "path,b,a\na.png,1,2\n", VALUES, ("value 1", "value 2"))
    assert unnamed.truths.tolist() == [[1, 2]]
    for header in ("age,weight", "height,height"):
        with pytest.raises(DataError, match=f"{header.replace(',', ', ')}"):
            table(root, f"path,{header}\na.png,1,2\n", VALUES, names)
    with pytest.raises(DataError, match="names a column twice: age, age"):
        table(root, "path,age,age\na.png,1,2\n")
    with pytest.raises(DataError, match="a column for each of age, found 2"):
        table(root, "path,age\na.png,1,2\n", VALUES, names)


def test_columns_of_0_and_1_are_labels(root):
    text = "path,dog,cat,owl\na.png,1,0,0\nb.png,1,1,0\nc.png,0.0,0,0\n"
    found = table(root, text)
    assert (found.problem_type, found.names) == (LABELS, ("dog", "cat", "owl"))
    assert found.truths.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    known = table(root, text, LABELS, ("owl", "cat", "dog"))
    assert known.truths.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 0]]
    assert table(root, "a.png,1,0\n", LABELS, ("cat", "dog")).truths.tolist() == [[1, 0]]
    assert table(root, text, VALUES).names == ("dog", "cat", "owl")
    with pytest.raises(DataError, match=r"line 3: expected one class, found dog;cat"):
        table(root, text, CLASSES)
    with pytest.raises(DataError, match=r"expected labels among cat, dog, found owl"):
        table(root, "path,dog,owl\na.png,0,1\n", LABELS, ("cat", "dog"))


def test_columns_of_0_and_1_of_which_one_is_1_are_classes(root):
    found = table(root, "path,dog,cat\na.png,1,0\nb.png,0,1\nc.png,1,0\n")
    assert (found.problem_type, found.names) == (CLASSES, ("cat", "dog"))
    assert found.truths.tolist() == [[0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize("header", ["", "path,a\n", "path,a,a\n", "path,a,\n"])
def test_columns_of_0_and_1_without_a_name_each_are_asked_about(root, header):
    with pytest.raises(
        DataError, match=r"labels\.csv: 2 columns of 0 and 1: expected a first line.*regression"
    ):
        table(root, f"{header}a.png,1,0\nb.png,1,1\n")


@pytest.mark.parametrize("numbers", ["0101", "2131", "1.0 0 0 1"])
def test_numbers_that_may_be_classes_are_asked_about(root, numbers):
    paths = ("a.png", "b.png", "c.png", "sub/d.png")
    numbers = numbers.split() if " " in numbers else numbers
    text = "path,label\n" + "\n".join(f"{p},{n}" for p, n in zip(paths, numbers, strict=True))
    with pytest.raises(DataError, match=r"line 2 and the following: [01] to [13], all of them"):
        table(root, text)
    assert table(root, text, VALUES).names == ("label",)
    assert table(root, text, CLASSES).problem_type == CLASSES


@pytest.mark.parametrize(
    ("codes", "first", "value"),
    [
        ("1_1 1_2 2_1 2_2", "1_1", "11"),
        ("1E2 3E4 2E1 1E2", "1E2", "100"),
        ("1 2 3 04", "04", "4"),
        ("001 008 015 008", "001", "1"),
        ("7.5 -07.5 1 1", "-07.5", "-7.5"),
        ("1 7 ٣ ٧", "٣", "3"),
        ("20 1,5 2,5 3", "1,5", "1.5"),
    ],
)
def test_codes_that_may_be_values_are_asked_about(root, codes, first, value):
    lines = zip(("a.png", "b.png", "c.png", "sub/d.png"), codes.split(), strict=True)
    text = "".join(f'{path},"{code}"\n' for path, code in lines)
    line = codes.split().index(first) + 1
    with pytest.raises(
        DataError,
        match=rf"line {line}: '{first}' may be the code of a class or the value {value}\.",
    ):
        table(root, text)
    assert table(root, text, CLASSES).names == tuple(sorted(set(codes.split())))
    if "," not in codes:
        assert table(root, text, VALUES).problem_type == VALUES
    # A gap among them makes no classes of them either.
    with pytest.raises(DataError, match="expected numbers, as in 3 of 4 lines"):
        table(root, text.replace(text.splitlines()[-1], "sub/d.png,NA"))


@pytest.mark.parametrize(
    "cells",
    ["50% 12.5%", "50 % 7", "$5 1.50€", "1,000.5 20", "1.234.567,8 3", "1 000 2", "20°C -3°C"],
)
def test_numbers_with_signs_are_asked_about(root, cells):
    cells = cells.split(" ") if cells.count(" ") == 1 else cells.rsplit(" ", 1)
    text = f'a.png,"{cells[0]}"\nb.png,"{cells[1]}"\n'
    with pytest.raises(
        DataError,
        match=rf"line 1: '{re.escape(cells[0])}' may be .*a value with its unit\. Say which",
    ):
        table(root, text)
    assert table(root, text, CLASSES).names == tuple(sorted(cells))
    with pytest.raises(DataError, match=r"line 1: expected 1 number"):
        table(root, text, VALUES)


@pytest.mark.parametrize("cells", ["0-10 10-20", "65+ <65", "1.2.3 1.2.4", "2D 3D", "1st 2nd"])
def test_names_that_begin_with_numbers_are_classes(root, cells):
    one, other = cells.split()
    assert table(root, f"a.png,{one}\nb.png,{other}\n").problem_type == CLASSES


@pytest.mark.parametrize("numbers", ["0.1234567891 0.1234567892", "16777216 16777217 16777218"])
def test_values_that_float32_does_not_tell_apart_are_refused(root, numbers):
    lines = zip(("a.png", "b.png", "c.png"), numbers.split(), strict=False)
    text = "path,size,age\n" + "".join(f"{path},{number},1.5\n" for path, number in lines)
    low, high = numbers.split()[0], numbers.split()[-1]
    with pytest.raises(DataError, match=rf"csv: size: .*apart, found {low} to {high}, which"):
        table(root, text)
    assert table(root, text.replace(f",{low},", ",-5000000,").replace(f",{high},", ",3.0e7,"))
    assert table(root, "a.png,0.1234567891\nb.png,0.1234567891\n").problem_type == VALUES


CAFE = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")


def test_one_word_in_two_ways_of_unicode_is_refused(root):
    text = f"a.png,{CAFE[0]}\nb.png,{CAFE[1]}\nc.png,tea\n"
    said = r"labels\.csv: expected caf.*found two ways of Unicode, 'cafe\\u0301' and 'caf\\xe9'"
    for kind in (None, CLASSES, LABELS):
        with pytest.raises(DataError, match=said):
            table(root, text, kind)
    with pytest.raises(DataError, match=said):
        table(root, f"a.png,{CAFE[1]}\nb.png,tea\n", CLASSES, (CAFE[0], "tea"))
    with pytest.raises(DataError, match=said):
        table(root, f"path,{CAFE[1]}\na.png,1.5\n", VALUES, (CAFE[0],))
    with pytest.raises(DataError, match=said):
        table(root, f"path,{CAFE[0]},{CAFE[1]}\na.png,1,0\nb.png,0,1\n")


@pytest.mark.parametrize("number", ["1e-07", "1.5E3", "-3e1", "0.5", "+7", "1e+16", "-0", ".5"])
def test_what_programs_write_for_values_is_not_asked_about(root, number):
    assert table(root, f"a.png,{number}\nb.png,10\n").problem_type == VALUES


@pytest.mark.parametrize("numbers", ["3 3 4 4", "0 1 2 3", "1 1 1 1", "0 0 2 2", "0 0.5 1 1"])
def test_other_numbers_are_values(root, numbers):
    paths = ("a.png", "b.png", "c.png", "sub/d.png")
    text = "\n".join(f"{p},{n}" for p, n in zip(paths, numbers.split(), strict=True))
    assert table(root, text).problem_type == VALUES


@pytest.mark.parametrize("gap", ["nan", "", "NA", "-", "inf", "1e39", "12 years"])
def test_a_gap_among_values_makes_no_classes_of_them(root, gap):
    text = f"path,age\na.png,41\nb.png,42.5\nc.png,{gap}\nsub/d.png,7\n"
    with pytest.raises(
        DataError, match=r"line 4: expected numbers, as in 3 of 4 lines.*regression"
    ):
        table(root, text)
    assert len(table(root, text, LABELS).names) == (4 if gap else 3)  # where it is said


@pytest.mark.parametrize("gap", ["", " ", '""'])
def test_a_gap_among_classes_makes_no_labels_of_them(root, gap):
    text = f"path,label\na.png,cat\nb.png,{gap}\nc.png,dog\nsub/d.png,{gap}\n"
    with pytest.raises(
        DataError,
        match=rf"line 3: expected a class, as in 2 of 4 lines, found none.*_type`: {LABELS}",
    ):
        table(root, text)
    assert table(root, text, LABELS).truths.tolist() == [[1, 0], [0, 0], [0, 1], [0, 0]]
    # An image of several says what all of them are; so do columns of 0 and 1.
    assert table(root, text.replace("dog", "dog;cat")).problem_type == LABELS
    assert table(root, "path,cat,dog\na.png,1,0\nb.png,0,0\n").problem_type == LABELS


def test_a_number_among_classes_is_asked_about(root):
    text = "a.png,cat\nb.png,dog\nc.png,7\n"
    with pytest.raises(
        DataError, match="line 3: expected no numbers, as in 2 of 3 lines, found '7'"
    ):
        table(root, text)
    assert table(root, text, CLASSES).names == ("7", "cat", "dog")
    # Several labels of one image tell what all of them are.
    assert table(root, "a.png,1;3\nb.png,3\nc.png,\n").problem_type == LABELS


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", None, "names no image"),
        ("path,label\n", None, "names no image"),
        ("a.png\n", None, r"line 1: expected a path, a comma, and its label"),
        (
            "path;label\na.png;x\n",
            None,
            r"line 1: .*found 'path;label'\. Of a file with semicolons",
        ),
        ("a.png,x\n\ngone.png,x\n", None, r"line 3: .*gone\.png does not exist"),
        (",path,label\n0,a.png,x\n", None, r"line 1: .* found ',path,label', .*pandas"),
        ("file_name,label\na.png,x\n", None, r"line 1: .*begins with path; found 'file_name,"),
        ('{"file_name": "a.png", "label": 3}\n', None, r"line 1: .*{\"file_name\": .*is CSV"),
        ("gone.png,x\n", None, r"line 1: expected the path of .*'gone\.png,x', and no"),
        pytest.param("x" * 5000 + ",x\n", None, r"line 1: .* found 'x{80}', and no", id="long"),
        ("a.png,x\nb.png,y\na.png,y\n", None, r"line 3: a\.png is there already: .*line 1"),
        ("a.png,1\nb.png,old\n", VALUES, r"line 2: expected 1 number, .*found 'old'"),
        ("a.png,1,2\nb.png,3\n", None, r"line 2: expected 2 numbers, .*found '3'"),
        ("a.png,1\nb.png,nan\n", VALUES, "line 2: expected 1 number"),
        ("a.png,cat\nb.png,cat;dog\n", CLASSES, "line 2: expected one class, found cat;dog"),
        ("a.png,cat\nb.png,\n", CLASSES, "line 2: expected one class, found none"),
        ("a.png,cat,dog\n", None, "line 1: expected one column of labels, found 2"),
        ('a.png,cat\nb.png,"dog\nc.png,cat\n', None, r"line 2: .* in one line, found .*closed in"),
        ('a.png,cat\nb.png,"dog\nc.png,"cat"\nd.png,x\n', None, "line 2: expected .* in one line"),
    ],
)
def test_lines_that_are_wrong_are_named(root, text, kind, words):
    with pytest.raises(DataError, match=rf"labels\.csv.*{words}"):
        table(root, text, kind)


def test_quotes_behind_a_blank_are_quotes(root):
    found = table(root, 'a.png, "cat;dog"\nb.png, "dog;cat"\nc.png, cat\n')
    assert found.names == ("cat", "dog")
    assert found.truths.tolist() == [[1, 1], [1, 1], [1, 0]]


def test_a_table_that_is_none(root):
    with pytest.raises(DataError, match=r"none\.csv cannot be read as a CSV file"):
        read_labels(root / "none.csv", root)
    (root / "labels.csv").write_bytes(b"a.png,\xff\xfe\n")
    with pytest.raises(DataError, match="in UTF-8"):
        read_labels(root / "labels.csv", root)
    (root / "labels.csv").write_bytes(b"a.png,ca\0t\n")
    with pytest.raises(DataError, match="line 1: expected text, found a zero byte"):
        read_labels(root / "labels.csv", root)


def test_mean_average_precision_by_hand():
    scores = np.array([[0.9, 1.0], [0.8, 3.0], [0.7, 2.0], [0.1, 0.0]])
    truths = np.array([[1, 0], [0, 1], [1, 0], [0, 0]])
    assert mean_average_precision(scores[:, :1], truths[:, :1]) == pytest.approx((1 + 2 / 3) / 2)
    assert mean_average_precision(scores, truths) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert mean_average_precision(-scores, truths) == pytest.approx(
        ((1 / 2 + 2 / 4) / 2 + 1 / 4) / 2
    )
    # Equal scores are one threshold: 2 of 4 are right, whatever their order.
    assert mean_average_precision(np.zeros((4, 1)), truths[:, :1]) == 0.5
    # A label that is true of no image says nothing.
    assert mean_average_precision(scores, truths * [0, 1]) == 1.0
    assert mean_average_precision(scores, truths * 0) is None


def test_mean_absolute_error_by_hand():
    found, true = np.array([[1.0, 10.0], [3.0, 20.0]]), np.array([[2.0, 10.0], [0.0, 22.0]])
    assert mean_absolute_error(found, true) == (1 + 0 + 3 + 2) / 4
