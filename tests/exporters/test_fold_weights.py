"""Weights and biases folded, against dense products written out in test_algebra."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.algebra import Scales, SiteDelta, constant_delta, householder_delta
from hhdeploy.exporters.fold import Scratch, fold_additive, fold_sequential, folded_bias
from tests.hhdeploy.test_algebra import REFLECTIONS, SHAPES, dense, draw
from tests.support import assert_caught, assert_parity


def weight_of(layout, out, into, dtype=np.float32):
    """The same kind of values as a C-order array, a transposed view or rows of a fused qkv."""
    random = np.random.default_rng([3, out, into])
    if layout == "c_order":
        return random.standard_normal((out, into)).astype(dtype)
    if layout == "transposed":
        return random.standard_normal((into, out)).astype(dtype).T
    if layout == "transposed_rows":
        return random.standard_normal((into, 3 * out)).astype(dtype).T[out : 2 * out]
    return random.standard_normal((3 * out, into)).astype(dtype)[out : 2 * out]


LAYOUTS = ("c_order", "transposed", "qkv_rows", "transposed_rows")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [0, 2])
def test_fold_additive(shape, layout, r):
    weight = weight_of(layout, *shape)
    before = weight.copy()
    delta = householder_delta(*draw(*shape, r), "unnormalized")
    folded = fold_additive(weight, delta)
    expected = weight.astype(np.float64) + dense(*draw(*shape, r), "unnormalized")
    assert folded.dtype == np.float32
    assert_parity(expected, folded, "algebra", "float32")
    assert np.array_equal(weight, before), "the weight itself was changed"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fold_additive_casts_once(layout):
    """The result is the float64 sum rounded to the nearest float32, to the last bit or so."""
    weight = weight_of(layout, 13, 7)
    delta = householder_delta(*draw(13, 7, 1), "orthogonal")
    exact = weight.astype(np.float64) + delta.dense()
    assert np.array_equal(fold_additive(weight, delta), exact.astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_scratch_for_weights_of_every_size(layout):
    scratch, kept = Scratch(), []
    for seed, (rows, columns) in enumerate([(7, 13), (21, 13), (5, 3), (13, 7)]):
        weight, delta = weight_of(layout, rows, columns), constant_delta(seed, rows, columns)
        square = constant_delta(2, rows, rows)
        for fold, change in ((fold_additive, delta), (fold_sequential, square)):
            kept.append((fold(weight, change, scratch=scratch), fold(weight, change)))
        assert scratch.like(weight).numpy().strides == np.empty_like(weight, np.float64).strides
    for found, expected in kept:  # after the scratch was used for others
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fold_additive_into_rows_of_a_larger_array(layout):
    weight = weight_of(layout, 7, 13)
    delta = householder_delta(*draw(7, 13, 1), "unnormalized")
    fused = np.full((21, 13), np.float32(99.0))
    fold_additive(weight, delta, fused[7:14])
    assert np.array_equal(fused[7:14], fold_additive(weight, delta))
    assert (fused[:7] == 99.0).all()
    assert (fused[14:] == 99.0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fold", [fold_additive, fold_sequential])
def test_a_weight_that_may_not_be_written_is_folded(fold, layout):
    """PyTorch has no tensors for such memory, and warns of it once in a process."""
    weight = weight_of(layout, 13, 13)
    delta = householder_delta(*draw(13, 13, 2), "orthogonal")
    expected = fold(weight, delta)
    for array in (weight, delta.diag, delta.left, delta.right):
        array.flags.writeable = False
    assert np.array_equal(fold(weight, delta), expected)


def test_what_float32_does_not_reach_is_infinite():
    """`exporters.fold` refuses it with the site's name."""
    largest = np.full((3, 3), 3e38, np.float32)
    folded = fold_additive(largest, constant_delta(3e38, 3, 3))
    assert np.array_equal(np.isinf(folded), np.eye(3, dtype=bool))
    assert np.array_equal(fold_sequential(largest, constant_delta(-2, 3, 3)), -np.inf * largest)


def test_fold_of_another_shape_is_refused():
    delta = householder_delta(*draw(7, 13, 1), "unnormalized")
    with pytest.raises(ValueError, match=r"\(13, 7\) and delta \(7, 13\)"):
        fold_additive(np.zeros((13, 7), np.float32), delta)


def test_fold_with_swapped_sides_is_caught():
    u, v, d, lora_a, lora_b = draw(13, 13, 1)
    weight = weight_of("c_order", 13, 13)
    expected = weight + dense(u, v, d, lora_a, lora_b, "orthogonal")
    mistaken = fold_additive(weight, householder_delta(v, u, d, lora_a, lora_b, "orthogonal"))
    assert_caught(expected, mistaken, "algebra", "float32")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("into", [7, 13, 29])
@pytest.mark.parametrize("reflection", REFLECTIONS)
def test_fold_sequential(into, layout, reflection):
    tensors = draw(13, 13, 2)
    weight, bias = weight_of(layout, 13, into), weight_of("c_order", 1, 13)[0]
    weight_before, bias_before = weight.copy(), bias.copy()
    matrix = dense(*tensors, reflection)
    transform = householder_delta(*tensors, reflection)
    folded, new_bias = fold_sequential(weight, transform), folded_bias(bias, transform)
    assert folded.dtype == new_bias.dtype == np.float32
    assert_parity(matrix @ weight.astype(np.float64), folded, "algebra", "float32")
    assert_parity(matrix @ bias.astype(np.float64), new_bias, "algebra", "float32")
    assert np.array_equal(weight, weight_before)
    assert np.array_equal(bias, bias_before)
    assert_caught(new_bias.astype(np.float64), bias, "algebra", "float32")


def test_fold_sequential_keeps_the_memory_order_and_a_missing_bias():
    transform = householder_delta(*draw(13, 13, 1), "unnormalized")
    for layout in ("c_order", "transposed"):
        weight = weight_of(layout, 13, 7)
        folded = fold_sequential(weight, transform)
        assert folded_bias(None, transform) is None
        assert folded.flags.c_contiguous == weight.flags.c_contiguous
        assert folded.flags.f_contiguous == weight.flags.f_contiguous


def test_fold_sequential_by_the_identity_changes_nothing():
    identity = SiteDelta(np.ones(13), np.zeros((13, 3)), np.zeros((3, 13)))
    weight, bias = weight_of("c_order", 13, 7), weight_of("c_order", 1, 13)[0]
    folded, new_bias = fold_sequential(weight, identity), folded_bias(bias, identity)
    assert np.array_equal(folded, weight)
    assert np.array_equal(new_bias, bias)


@pytest.mark.parametrize("order", ["C", "F"])
def test_scales_and_db_are_folded_before_the_matrix(order):
    """Both memory orders; M multiplies what was scaled."""
    random = np.random.default_rng(3)
    weight = np.asarray(random.standard_normal((131, 97)), np.float32, order=order)
    bias = random.standard_normal(131).astype(np.float32)
    s_in, s_out = random.uniform(0.2, 3, 97), random.uniform(0.2, 3, 131)
    db = random.standard_normal(131)
    scaled = np.diag(s_out) @ weight @ np.diag(s_in)
    scales = Scales(s_in, s_out)
    delta = householder_delta(*draw(131, 97, 2), "orthogonal")
    found = fold_additive(weight, delta, None, scales)
    assert_parity(scaled + delta.dense(), found, "algebra", "float32")
    matrix = householder_delta(*draw(131, 131, 2), "orthogonal")
    found = fold_sequential(weight, matrix, scales=scales)
    moved = folded_bias(bias, matrix, db)
    assert_parity(matrix.dense() @ scaled, found, "algebra", "float32")
    assert_parity(matrix.dense() @ (bias + db), moved, "algebra", "float32")
    moved = folded_bias(None, matrix, db)
    assert_parity(matrix.dense() @ db, moved, "algebra", "float32")
    assert folded_bias(None, matrix) is None
    for forgotten in (Scales(s_in), Scales(None, s_out)):
        mistaken = fold_additive(weight, delta, None, forgotten)
        assert_caught(scaled + delta.dense(), mistaken, "algebra", "float32")
