"""The canonical form and the folds, against dense products written out here."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.algebra import (
    Scales,
    SiteDelta,
    constant_delta,
    effective_rank,
    fold_additive,
    fold_sequential,
    folded_bias,
    householder_delta,
    low_rank_delta,
    tau,
)
from tests.support import assert_caught, assert_parity

REFLECTIONS = ("unnormalized", "orthogonal")
# Unequal primes: a swapped axis cannot hide. Square, wide, tall.
SHAPES = ((13, 13), (7, 13), (13, 7))
RANKS = (0, 1, 2, 4)


def draw(out, into, r, seed=0):
    """u, v, d, lora_A, lora_B with entries of order one."""
    random = np.random.default_rng([seed, out, into, r])
    shapes = ((out,), (into,), (min(out, into),), (r, into), (out, r))
    return [random.standard_normal(shape) for shape in shapes]


def reflector(x, reflection):
    """H as the paper prints it (Eq. 3), or the true reflection."""
    if reflection == "unnormalized":
        return np.eye(x.size) - np.outer(x, x)
    return np.eye(x.size) - 2.0 * np.outer(x, x) / np.dot(x, x)


def dense(u, v, d, lora_a, lora_b, reflection):
    """H_u D H_v + lora_B lora_A with dense matrices."""
    diagonal = np.zeros((u.size, v.size))
    np.fill_diagonal(diagonal, d)
    return reflector(u, reflection) @ diagonal @ reflector(v, reflection) + lora_b @ lora_a


@pytest.mark.parametrize("reflection", REFLECTIONS)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_canonical_form_is_the_dense_product(shape, r, reflection):
    tensors = draw(*shape, r)
    delta = householder_delta(*tensors, reflection)
    assert delta.shape == shape
    assert delta.rank == 2 + r
    assert_parity(dense(*tensors, reflection), delta.dense(), "algebra", "float64")


@pytest.mark.parametrize("reflection", REFLECTIONS)
def test_swapped_u_and_v_are_caught(reflection):
    u, v, d, lora_a, lora_b = draw(13, 13, 2)
    mistaken = householder_delta(v, u, d, lora_a, lora_b, reflection).dense()
    assert_caught(dense(u, v, d, lora_a, lora_b, reflection), mistaken, "algebra", "float64")


def test_the_other_reflection_is_caught():
    tensors = draw(13, 7, 1)
    mistaken = householder_delta(*tensors, "orthogonal").dense()
    assert_caught(dense(*tensors, "unnormalized"), mistaken, "algebra", "float64")


def test_a_forgotten_cross_term_is_caught():
    u, v, d, lora_a, lora_b = draw(13, 7, 1)
    right = householder_delta(u, v, d, lora_a, lora_b, "unnormalized")
    without_s = right.right.copy()
    without_s[0, :7] = -(d * u[:7])
    mistaken = SiteDelta(right.diag, right.left, without_s).dense()
    assert_caught(right.dense(), mistaken, "algebra", "float64")


def test_tau_of_the_unnormalized_reflection_is_one_even_at_zero():
    assert tau(np.zeros(5), "unnormalized") == 1.0
    assert tau(np.arange(5.0), "unnormalized") == 1.0


def test_tau_of_the_orthogonal_reflection():
    assert tau(np.array([3.0, 4.0]), "orthogonal") == pytest.approx(2.0 / 25.0)
    assert tau(np.zeros(5), "orthogonal") == 0.0
    assert tau(np.zeros(0), "orthogonal") == 0.0


@pytest.mark.parametrize("largest", [1e-30, 1e-45, 1e30])
def test_tau_neither_underflows_nor_overflows(largest):
    x = np.array([1.0, -0.5, 0.25]) * largest
    matrix = np.eye(3) - tau(x, "orthogonal") * np.outer(x, x)
    assert_parity(reflector(x / largest, "orthogonal"), matrix, "algebra", "float64")


def test_tau_refuses_an_unknown_reflection():
    with pytest.raises(ValueError, match=r"one of .*unnormalized.*orthogonal.*'givens'"):
        tau(np.ones(3), "givens")


def test_zero_vectors_of_the_orthogonal_form_leave_the_diagonal():
    _, _, d, lora_a, lora_b = draw(7, 13, 0)
    delta = householder_delta(np.zeros(7), np.zeros(13), d, lora_a, lora_b, "orthogonal")
    expected = np.zeros((7, 13))
    np.fill_diagonal(expected, d)
    assert np.array_equal(delta.dense(), expected)


def test_tiny_vectors_still_reflect():
    u, v, d, lora_a, lora_b = draw(13, 7, 1)
    tiny = householder_delta(u * 1e-30, v * 1e-30, d, lora_a, lora_b, "orthogonal")
    expected = dense(u, v, d, lora_a, lora_b, "orthogonal")
    assert_parity(expected, tiny.dense(), "algebra", "float64")


@pytest.mark.parametrize("r", RANKS)
def test_low_rank_delta(r):
    _, _, _, lora_a, lora_b = draw(7, 13, r)
    delta = low_rank_delta(lora_a, lora_b)
    assert delta.rank == r
    assert not delta.diag.any()
    assert_parity(lora_b @ lora_a, delta.dense(), "algebra", "float64")


@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_is_the_transpose(shape):
    delta = householder_delta(*draw(*shape, 1), "unnormalized")
    assert_parity(delta.dense().T, delta.transposed.dense(), "algebra", "float64")


def test_minus_identity():
    delta = householder_delta(*draw(13, 13, 1), "orthogonal")
    expected = delta.dense() - np.eye(13)
    assert_parity(expected, delta.minus_identity().dense(), "algebra", "float64")
    with pytest.raises(ValueError, match=r"must be square, found \(13, 7\)"):
        householder_delta(*draw(13, 7, 1), "orthogonal").minus_identity()


def test_inconsistent_parts_are_refused():
    with pytest.raises(ValueError, match=r"diag \(5,\), left \(7, 2\), right \(3, 5\)"):
        SiteDelta(np.zeros(5), np.zeros((7, 2)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="inconsistent delta"):
        SiteDelta(np.zeros(7), np.zeros((7, 2)), np.zeros((2, 5)))


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
def test_fold_additive_into_rows_of_a_larger_array(layout):
    weight = weight_of(layout, 7, 13)
    delta = householder_delta(*draw(7, 13, 1), "unnormalized")
    fused = np.full((21, 13), np.float32(99.0))
    fold_additive(weight, delta, fused[7:14])
    assert np.array_equal(fused[7:14], fold_additive(weight, delta))
    assert (fused[:7] == 99.0).all()
    assert (fused[14:] == 99.0).all()


def test_fold_additive_over_several_blocks(monkeypatch):
    """A weight that needs several blocks, the last one short, wide and tall."""
    monkeypatch.setattr("hhdeploy.algebra._BLOCK_BYTES", 8 * 7 * 4)
    for shape in ((23, 7), (7, 23), (23, 23)):
        tensors = draw(*shape, 2)
        weight = weight_of("c_order", *shape)
        folded = fold_additive(weight, householder_delta(*tensors, "unnormalized"))
        expected = weight + dense(*tensors, "unnormalized")
        assert_parity(expected, folded, "algebra", "float32")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fold_sequential_over_several_blocks(monkeypatch, layout):
    """M mixes all rows of a weight, so those of all blocks: tall and wide, in either order."""
    monkeypatch.setattr("hhdeploy.algebra._BLOCK_BYTES", 8 * 7 * 4)
    for into in (7, 23):
        weight = weight_of(layout, 13, into)
        folded = fold_sequential(weight, householder_delta(*draw(13, 13, 2), "orthogonal"))
        expected = dense(*draw(13, 13, 2), "orthogonal") @ weight.astype(np.float64)
        assert_parity(expected, folded, "algebra", "float32")


def test_a_fold_leaves_numpy_as_it_was():
    usual = np.getbufsize()
    weight = np.full((3, 3), 3e38, np.float32)
    fold_additive(weight, constant_delta(1, 3, 3))
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        fold_additive(weight, constant_delta(3e38, 3, 3))
    assert np.getbufsize() == usual


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


def test_effective_rank():
    zero = SiteDelta(np.zeros(7), np.zeros((7, 1)), np.zeros((1, 13)))
    assert effective_rank(zero) == 0.0
    even = SiteDelta(np.full(7, 3.0), np.zeros((7, 1)), np.zeros((1, 13)))
    assert effective_rank(even) == pytest.approx(7.0)
    one = low_rank_delta(*(draw(7, 13, 1)[i] for i in (3, 4)))
    assert effective_rank(one) == pytest.approx(1.0)


@pytest.mark.parametrize("order", ["C", "F"])
def test_scales_and_db_are_folded_before_the_matrix(order):
    """Both memory orders, more rows than one block holds; M multiplies what was scaled."""
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
