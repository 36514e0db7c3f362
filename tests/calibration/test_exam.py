"""Images to judge on: labelled, and never those that were calibrated on."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.judging.exam import make_exam
from hhdeploy.calibration.judging.guard import check_bound
from hhdeploy.errors import DataError, PlanError
from hhdeploy.preprocess import open_image
from tests.calibration.conftest import write_pictures
from tests.workshop import AGE, PROBE, TAGS


@pytest.fixture
def bundle(small) -> Bundle:
    """Alpha (seven classes) and gamma (three), without class names."""
    return named(Bundle.open(small), alpha=None, gamma=None)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for seed, place in enumerate(("alpha/0", "alpha/6", "gamma/1", "gamma/2")):
        write_pictures(root / place, 5, seed)
    return root


def named(bundle, **names):
    """The bundle with class names."""
    adapters = tuple(
        replace(a, class_names=names.get(a.name, a.class_names)) for a in bundle.manifest.adapters
    )
    return Bundle(bundle.path, replace(bundle.manifest, adapters=adapters))


def exam_of(bundle, source, images=8, eval_data=None):
    used = CalibrationData.open(bundle, source, images=images, seed=0)
    return used, make_exam(eval_data or source, used, seed=0)


def test_what_was_calibrated_on_is_not_judged_on(bundle, folder):
    used, exam = exam_of(bundle, folder)
    assert exam.held_out
    assert len(exam.questions) == 20 - 8
    calibrated = [sample.load().tobytes() for sample in used.samples]
    judged = [question.load().tobytes() for question in exam.questions]
    assert not set(calibrated) & set(judged)


def test_copies_judge_as_one_image(bundle, folder, tmp_path):
    other = tmp_path / "other"
    for place in ("alpha/0", "gamma/1"):
        write_pictures(other / place, 1, 9)
        for number in range(30):
            shutil.copy(next((other / place).iterdir()), other / place / f"copy-{number}.png")
    _, exam = exam_of(bundle, folder, eval_data=other)
    for name in ("alpha", "gamma"):
        expected = f"adapter '{name}': judged on 1 (31 with copies) images only: one image is 100.0"
        assert expected in " ".join(exam.warnings)


def test_copies_under_other_names_are_found_out(bundle, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    for path in sorted(copied.rglob("*.png")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    _, exam = exam_of(bundle, folder, eval_data=copied)
    assert len(exam.questions) == 20 - 8
    assert exam.source == "copy"


def test_truths_are_the_columns_of_the_class_folders(bundle, folder):
    _, exam = exam_of(bundle, folder)
    assert {(q.adapter, q.truth) for q in exam.questions} == {
        ("alpha", 0), ("alpha", 6), ("gamma", 1), ("gamma", 2),
    }  # fmt: skip
    assert len({q.adapter for q in exam.questions[:2]}) == 2, "tasks in turn"


def test_who_is_not_judged_is_named(bundle, folder, tmp_path):
    """Calibrated for two adapters, judged on the images of one."""
    assert exam_of(bundle, folder)[1].unjudged == ()
    shutil.copytree(folder / "alpha", tmp_path / "judge" / "alpha")
    _, exam = exam_of(bundle, folder, eval_data=tmp_path / "judge")
    assert exam.unjudged == ("gamma",)
    assert "adapter 'gamma': no image to judge on" in exam.warnings


def test_who_has_no_image_left_is_named(bundle, folder):
    """Calibrated on all of one adapter's images, and on some of another's."""
    for place in (folder / "gamma").iterdir():
        for file in sorted(place.iterdir())[1:]:
            file.unlink()
    _, exam = exam_of(bundle, folder)
    assert exam.unjudged == ("gamma",)
    assert "adapter 'gamma': no image is left to judge on" in exam.warnings
    with pytest.raises(PlanError, match=r"true classes of gamma, .* no image is left to judge on"):
        check_bound(1.0, exam)


def test_class_names_decide_where_there_are_any(bundle, folder):
    ours = named(bundle, gamma=("2", "zero", "1"))
    _, exam = exam_of(ours, folder)
    by_file = {(folder / "gamma" / c, t) for c, t in (("2", 0), ("1", 2))}
    truths = {q.truth for q in exam.questions if q.adapter == "gamma"}
    assert truths == {t for _, t in by_file}
    transform = ours.manifest.adapter("gamma").preprocess
    for question in (q for q in exam.questions if q.adapter == "gamma"):
        file = folder / "gamma" / ("2" if question.truth == 0 else "1") / question.source
        assert np.array_equal(question.load(), transform(open_image(file)))


def test_folders_that_are_no_class(bundle, folder):
    _, exam = exam_of(named(bundle, gamma=("1", "x", "y")), folder)
    assert {q.truth for q in exam.questions if q.adapter == "gamma"} == {0}
    assert exam.untold == ()
    assert any("none of the adapter's classes" in w for w in exam.warnings)
    _, exam = exam_of(named(bundle, gamma=("x", "y", "z")), folder)
    assert {q.truth for q in exam.questions if q.adapter == "gamma"} == {None}
    assert any("(1, 2) is one of its classes (x, y, z)" in w for w in exam.warnings)
    assert exam.untold == ("gamma",)
    with pytest.raises(
        PlanError, match=r"classes of gamma, .*\(1, 2\) is one of its classes \(x, y"
    ):
        check_bound(1.0, exam)  # alpha's top-1 alone says nothing of gamma's


def test_a_name_of_several_classes_tells_none_of_them(bundle, folder):
    """ImageNet has two classes called crane: all of their images were taken for the first one's."""
    _, exam = exam_of(named(bundle, gamma=("2", "1", "2")), folder)
    assert {q.truth for q in exam.questions if q.adapter == "gamma"} == {1}
    assert "adapter 'gamma': several of its classes are called 2: which one a" in exam.warnings[0]


def test_folders_that_tell_no_column(bundle, folder):
    (folder / "gamma" / "1").rename(folder / "gamma" / "cat")
    _, exam = exam_of(bundle, folder)
    assert {q.truth for q in exam.questions if q.adapter == "gamma"} == {None}
    assert any("only agreement is reported" in w for w in exam.warnings)
    write_pictures(folder / "gamma" / "dog", 2, 9)
    _, exam = exam_of(bundle, folder)
    assert {q.truth for q in exam.questions if q.adapter == "gamma"} == {0, 1, 2}
    assert any("alphabetical order" in w for w in exam.warnings)


@pytest.mark.parametrize(
    ("names", "count", "columns"),
    [
        (
            ("0", "2", "10"),
            12,
            {"0": (0, 0), "2": (2, 4), "10": (10, 2)},
        ),  # of 0, 1, 10, 11, 2, ...
        (("00", "02", "10"), 12, {"00": (0, None), "02": (2, None), "10": (10, None)}),
        (("5", "7", "40"), 3, {"5": (0, 1), "7": (1, 2), "40": (2, 0)}),
        (("5", "6", "7"), 3, {"5": (0, None), "6": (1, None), "7": (2, None)}),
        (("0", "2", "6"), 7, {"0": (0, 0), "2": (2, 2), "6": (6, 6)}),
        (("0", "2", "7"), 7, dict.fromkeys("027", (None, None))),  # there is no column 7
        (("5", "7", "40"), 12, dict.fromkeys(("5", "7", "40"), (None, None))),  # of any 12
    ],
)
def test_folders_of_numbers_have_two_orders(bundle, tmp_path, names, count, columns):
    """By their value, or sorted as text; past ten they differ."""
    adapters = tuple(
        replace(a, classes=count) if a.name == "gamma" else a for a in bundle.manifest.adapters
    )
    ours = Bundle(bundle.path, replace(bundle.manifest, adapters=adapters))
    for seed, name in enumerate(names):
        write_pictures(tmp_path / "gamma" / name, 3, seed)
        for file in (tmp_path / "gamma" / name).iterdir():
            file.rename(file.with_name(f"{name}-{file.name}"))
    _, exam = exam_of(ours, tmp_path, images=4)
    found = {q.source.split("-")[0]: (q.truth, q.as_text) for q in exam.questions}
    assert found == {name: columns[name] for name in found}
    assert len(found) == 3
    guessed = any("alphabetical order" in w for w in exam.warnings)
    assert guessed is (names == ("5", "6", "7"))


def test_too_few_left_is_said(bundle, folder):
    _, exam = exam_of(bundle, folder, images=16)
    assert any("judged on 2 images only: one image is 50.0 points" in w for w in exam.warnings)
    _, exam = exam_of(bundle, folder, images=20)
    assert not exam.held_out
    assert len(exam.questions) == 20
    assert any("`eval_data`" in w for w in exam.warnings)
    for path in (folder / "gamma").rglob("[1-9].png"):
        path.unlink()
    _, exam = exam_of(bundle, folder, images=4)
    assert any(w == "adapter 'gamma': no image is left to judge on" for w in exam.warnings)


def test_a_folded_bundle_takes_its_own_folder_or_a_flat_one(folded, folder):
    bundle = named(Bundle.open(folded), alpha=None)
    for source in (folder, folder / "alpha"):
        _, exam = exam_of(bundle, source, images=4)
        assert [q.adapter for q in exam.questions] == [None] * 6
        assert {q.truth for q in exam.questions} == {0, 6}


def test_a_split_folder_is_calibrated_on_train_and_judged_on_val(bundle, folder, tmp_path):
    other = tmp_path / "split"
    shutil.copytree(folder, other / "train")
    for seed, place in enumerate(("alpha/0", "gamma/2"), start=9):
        write_pictures(other / "val" / place, 3, seed)
    (other / "val" / "gamma" / "2" / "x.heic").write_bytes(b"")
    used, exam = exam_of(bundle, other, images=20)
    assert len(used.samples) == 20
    assert [(q.adapter, q.truth) for q in exam.questions] == [("alpha", 0), ("gamma", 2)] * 3
    assert "adapter 'gamma': left out of gamma: 1 .heic" in exam.warnings
    # The same with the split below each adapter.
    for name in ("alpha", "gamma"):
        (tmp_path / "below" / name).mkdir(parents=True)
        for part in ("train", "val"):
            shutil.copytree(other / part / name, tmp_path / "below" / name / part)
    again, exam_again = exam_of(bundle, tmp_path / "below", images=20)
    assert again.digest == used.digest
    assert [q.source for q in exam_again.questions] == [q.source for q in exam.questions]


def test_arrays_are_held_out_too(bundle, tmp_path):
    images = np.random.default_rng(3).standard_normal((11, 3, 32, 32)).astype(np.float32)
    file = tmp_path / "data.npz"
    np.savez(file, images=images, adapters=["alpha", "gamma"] * 5 + ["alpha"])
    used, exam = exam_of(bundle, file, images=8)
    left = {f"image {i}" for i in range(11)} - {s.source for s in used.samples}
    assert {q.source for q in exam.questions} == left
    assert len(left) == 3
    assert exam.untold
    for question in exam.questions:
        assert np.array_equal(question.load(), images[int(question.source.split()[1])])


def test_arrays_are_judged_on_by_tasks_in_turn(bundle, tmp_path):
    images = np.random.default_rng(3).standard_normal((40, 3, 32, 32)).astype(np.float32)
    file = tmp_path / "data.npz"
    np.savez(file, images=images, adapters=["alpha"] * 20 + ["gamma"] * 20)
    used, exam = exam_of(bundle, file, images=20)
    assert [q.adapter for q in exam.questions] == ["alpha", "gamma"] * 10
    assert not [w for w in used.warnings if "no calibration images" in w and "gamma" in w]
    assert not [w for w in exam.warnings if "no image" in w]
    judged = {"images": images[:39] + 1, "adapters": ["alpha"] * 20 + ["gamma"] * 19}
    said = "adapter 'gamma': judged on 19 images only: one image is 5.3 points"
    assert make_exam([judged], used, seed=0).warnings == (said,), "20 are enough"


@pytest.fixture
def tables(tmp_path):
    """Classes in folders, labels and values in tables, and a head whose images are just any."""
    root = tmp_path / "tables"
    write_pictures(root / "alpha" / "class 3", 6, 1)
    write_pictures(root / TAGS, 5, 2)
    write_pictures(root / AGE / "deep", 5, 3)
    write_pictures(root / PROBE / "class 0", 4, 4)
    tags = [f"{i}.png,class {i % 3}" + ";class 0" * (i == 1) for i in range(5)]
    (root / TAGS / "labels.csv").write_text("\n".join(tags))
    (root / AGE / "labels.csv").write_text("\n".join(f"deep/{i}.png,{i * 10}" for i in range(5)))
    return root


def test_tables_tell_labels_and_values(heads, tables):
    bundle = Bundle.open(heads)
    used, exam = exam_of(bundle, tables, images=8)
    assert {s.adapter for s in used.samples} == {"alpha", TAGS, AGE, PROBE}
    known = {(q.adapter, q.source): q for q in exam.questions}
    assert {q.truth for q in exam.questions if q.adapter == "alpha"} == {3}
    for (adapter, source), found in known.items():
        number = int(source.split(".")[0])
        assert found.problem_type == bundle.manifest.problem_type(adapter)
        if adapter == AGE:
            assert found.truths == (10.0 * number,)
        elif adapter == TAGS:
            expected = {number % 3} | ({0} if number == 1 else set())
            assert found.truths == tuple(float(i in expected) for i in range(3))
        else:
            assert found.truths is None
    assert exam_of(bundle, tables, images=8)[0].digest == used.digest
    assert exam.has_classes, "some of them"
    assert not exam.reasons, "labels and values are no folders of classes"


def test_without_a_table_labels_and_values_are_unknown(heads, tables):
    (tables / AGE / "labels.csv").unlink()
    _, exam = exam_of(Bundle.open(heads), tables, images=8)
    ages = [q for q in exam.questions if q.adapter == AGE]
    assert ages
    assert {q.truths for q in ages} == {None}


def test_a_table_that_does_not_fit_the_adapter(heads, tables):
    (tables / TAGS / "labels.csv").write_text("0.png,blue\n")
    with pytest.raises(DataError, match=r"line 1: expected labels among class 0, .* found blue"):
        exam_of(Bundle.open(heads), tables)
    (tables / TAGS / "labels.csv").unlink()
    (tables / AGE / "labels.csv").write_text("deep/0.png,1,2\n")
    with pytest.raises(DataError, match="a column for each of class 0, found 2 of values"):
        exam_of(Bundle.open(heads), tables)
    nameless = named(Bundle.open(heads), age=None)
    with pytest.raises(DataError, match=r"expected 1 labels or values, .* found value 1, value 2"):
        exam_of(nameless, tables)


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (("2", "10", "1"), (1, 2, 0)),  # as text 10 comes before 2
        (("2", "0", "2"), (2, 0, 2)),  # 1 is true of no image
        (("03", "02", "01"), (2, 1, 0)),
    ],
)
def test_labels_without_names_are_columns_by_their_numbers(heads, tables, labels, columns):
    lines = [f"{i}.png,{label}" for i, label in enumerate(labels)]
    (tables / TAGS / "labels.csv").write_text("\n".join(lines))
    used, exam = exam_of(named(Bundle.open(heads), tags=None), tables, eval_data=tables)
    found = {q.source: q.truths for q in exam.questions if q.adapter == TAGS}
    assert found
    for source, truths in found.items():
        wanted = columns[int(source.split(".")[0])]
        assert truths == tuple(float(i == wanted) for i in range(3))
    assert not [w for w in used.warnings if "no names" in w]


def test_words_for_labels_without_names_are_taken_with_a_warning(heads, tables):
    (tables / TAGS / "labels.csv").write_text("0.png,dog\n1.png,cat;owl\n")
    used, _ = exam_of(named(Bundle.open(heads), tags=None), tables)
    assert [w for w in used.warnings if "no names of its labels" in w and "cat, dog, owl" in w]
