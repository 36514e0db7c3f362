"""The canonical form and the folds, against dense products written out here."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.algebra import (
    SiteDelta,
    effective_rank,
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


def test_effective_rank():
    zero = SiteDelta(np.zeros(7), np.zeros((7, 1)), np.zeros((1, 13)))
    assert effective_rank(zero) == 0.0
    even = SiteDelta(np.full(7, 3.0), np.zeros((7, 1)), np.zeros((1, 13)))
    assert effective_rank(even) == pytest.approx(7.0)
    one = low_rank_delta(*(draw(7, 13, 1)[i] for i in (3, 4)))
    assert effective_rank(one) == pytest.approx(1.0)
