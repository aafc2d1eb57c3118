"""Random numbers by address: uniform, normal, independent, and the same however they are asked for."""

import itertools

import numpy as np
import pytest
from scipy import stats

from synthetic_generators import Streams

N, M = 1000, 40


def unlike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the numbers at equal places are different and, to five standard errors, uncorrelated."""
    first, second = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    return np.mean(first == second) < 1e-3 and abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(first.size)


def test_uniform_numbers_pass_a_ks_test_over_images_and_over_entries() -> None:
    uniform = Streams(0, range(N)).uniform("a", (M,))
    assert uniform.dtype == np.float32
    assert uniform.shape == (N, M)
    for sample in (uniform.ravel(), uniform[:, 0], uniform[:, 7], Streams(1, [3]).uniform("a", (20_000,))[0]):
        assert stats.kstest(sample, "uniform").pvalue > 0.01
        assert sample.min() >= 0
        assert sample.max() < 1


def test_uniform_numbers_keep_to_their_range() -> None:
    narrow = Streams(0, range(N)).uniform("a", (M,), 5, 5.0000005)  # one float32 step above 5
    assert np.all(narrow == 5)
    wide = Streams(0, range(N)).uniform("a", (M,), -3, 7)
    assert stats.kstest(wide.ravel(), stats.uniform(-3, 10).cdf).pvalue > 0.01


def test_normal_numbers_pass_a_ks_test() -> None:
    normal = Streams(0, range(N)).normal("a", (3, 7))
    assert normal.dtype == np.float32
    assert normal.shape == (N, 3, 7)
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    flat = normal.reshape(N, -1)
    assert all(unlike(flat[:, i], flat[:, j]) for i, j in itertools.combinations(range(flat.shape[1]), 2))


def test_integers_are_even() -> None:
    for high in (1, 3, 10):
        counts = np.bincount(Streams(0, range(N)).integers("a", high, (M,)).ravel(), minlength=high)
        assert len(counts) == high
        assert high == 1 or stats.chisquare(counts).pvalue > 0.01


def test_other_names_indices_and_seeds_give_independent_numbers() -> None:
    def draw(seed: int, first: int, name: str) -> np.ndarray:
        return Streams(seed, range(first, first + N)).uniform(name, (M,))

    named = {name: draw(0, 0, name) for name in ("a", "b", "c", "leaf", "leaf ", "")}
    named["child a, b"] = Streams(0, range(N)).child("a").uniform("b", (M,))
    named["child b, a"] = Streams(0, range(N)).child("b").uniform("a", (M,))
    named["child a, a"] = Streams(0, range(N)).child("a").uniform("a", (M,))
    named |= {f"from {first}": draw(0, first, "a") for first in (1, 2, N, 2**32, 2**62)}
    named |= {f"seed {seed}": draw(seed, 0, "a") for seed in (1, 2, 2**32, 2**64, 10**30)}
    named["next entry"] = np.roll(named["a"], 1, axis=1)
    assert all(unlike(named[x], named[y]) for x, y in itertools.combinations(named, 2))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 5.0)])
def test_single_entries_are_those_of_the_whole_array(low: float, high: float) -> None:
    streams, rng = Streams(4, range(50, 80)), np.random.default_rng(0)
    image, number = rng.integers(30, size=200), rng.integers(M, size=200)
    expected = streams.uniform("a", (M,), low, high)[image, number]
    assert np.array_equal(streams.uniform_at("a", image, number, low, high), expected)
    longer = streams.uniform("a", (M + 9,), low, high)[image, number]
    assert np.array_equal(longer, expected)
    table = streams.uniform_at("a", np.arange(30)[:, None], np.arange(M), low, high)
    assert np.array_equal(table, streams.uniform("a", (M,), low, high))


def test_a_draw_is_a_function_of_the_address_alone() -> None:
    streams = Streams(7, range(100))
    whole = streams.uniform("a", (2, 3))
    shuffled = np.random.default_rng(0).permutation(100)
    assert np.array_equal(Streams(7, shuffled).uniform("a", (2, 3)), whole[shuffled])
    assert np.array_equal(Streams(7, [31]).normal("b", (5,))[0], streams.normal("b", (5,))[31])
    for which in (slice(10, 20), np.array([5, 5, 0]), np.arange(100) % 3 == 1):
        taken = streams.take(which)
        assert len(taken) == len(whole[which])
        assert np.array_equal(taken.uniform("a", (2, 3)), whole[which])
        assert np.array_equal(taken.child("x").uniform("a"), streams.child("x").uniform("a")[which])
    assert Streams(7, []).uniform("a", (2, 3)).shape == (0, 2, 3)
    assert Streams(7, []).normal("a").shape == (0,)
