"""Families made of others: mixtures and degraded images."""

from typing import Any

import numpy as np
import pytest

from synthetic_generators import Streams, make_generator

N = 4000


def draw(name: str, n: int = 200, channels: int = 1, image_size: int = 12, **options: Any) -> np.ndarray:
    return make_generator(name, channels, image_size, **options).generate(Streams(0, range(n)))


def is_binary(images: np.ndarray) -> np.ndarray:
    return np.all((images == 0) | (images == 255), axis=(1, 2, 3))


def test_a_mixture_has_its_families_by_weight() -> None:
    parts = {"salt_and_pepper/black": {"weight": 1, "density": 0}, "salt_and_pepper": {"weight": 3, "density": 1, "binary": True},
             "dead_leaves": {"weight": 0}, "salt_and_pepper/salt": {"density": 1}}  # fmt: skip
    images = draw("mixture", N, **parts)
    gray, white = (images == 128).all(axis=(1, 2, 3)), (images == 255).all(axis=(1, 2, 3))
    assert (gray.mean(), white.mean()) == pytest.approx((1 / 5, 3 / 5), rel=0.1)
    assert np.all(is_binary(images[~gray]))
    assert np.mean(is_binary(images) & ~white) == pytest.approx(1 / 5, rel=0.1)


def test_options_of_a_mixture_may_be_flat_and_in_any_order() -> None:
    nested = draw("mixture", dead_leaves={"weight": 0.5, "exponent": 2}, salt_and_pepper={"weight": 1, "grain": 3})
    flat = {"salt_and_pepper.grain": 3, "dead_leaves.exponent": 2, "salt_and_pepper.weight": 1, "dead_leaves.weight": 0.5}
    assert np.array_equal(draw("mixture", **flat), nested)
    within = draw("mixture", **{f"mixture.{name}": value for name, value in flat.items()})
    assert len({image.tobytes() for image in within}) > 190
    assert np.array_equal(draw("mixture"), draw("mixture", dead_leaves={"weight": 7}, salt_and_pepper={"weight": 7}))


def test_an_image_of_a_mixture_is_its_familys() -> None:
    mixed = draw("mixture")
    leaves = make_generator("dead_leaves", 1, 12).generate(Streams(0, range(200)).child("image"))
    salt = make_generator("salt_and_pepper", 1, 12).generate(Streams(0, range(200)).child("image"))
    from_leaves, from_salt = ((mixed == images).all(axis=(1, 2, 3)) for images in (leaves, salt))
    assert np.all(from_leaves | from_salt)
    assert 70 < from_leaves.sum() < 130


@pytest.mark.parametrize("distinct", [1, 7])
def test_few_distinct_images_come_again_and_again(distinct: int) -> None:
    images = draw("degraded", 100, distinct=distinct, artefact="salt", strength=0.1)
    assert np.array_equal(images[distinct:], images[:-distinct])
    assert len({image.tobytes() for image in images}) == distinct


@pytest.mark.parametrize("artefact", ["border", "grid", "blocks", "quantise", "salt"])
def test_an_artefact_has_the_asked_strength(artefact: str) -> None:
    original = draw("degraded", 100, 3, 15)
    assert np.array_equal(draw("degraded", 100, 3, 15, artefact=artefact, strength=0), original)
    whole, half = (draw("degraded", 100, 3, 15, artefact=artefact, strength=strength).astype(float) for strength in (1, 0.5))
    if artefact == "salt":
        assert is_binary(whole).all()
        assert np.mean(np.all(half == original, axis=1)) == pytest.approx(0.5, abs=0.1)
    else:
        assert np.abs(half - (whole + original) / 2).max() <= 1


def test_artefacts_are_what_they_are_called() -> None:
    original = draw("degraded", 20, 1, 14)
    border, grid, blocks, quantised = (draw("degraded", 20, 1, 14, artefact=a, strength=1)[:, 0] for a in ("border", "grid", "blocks", "quantise"))
    original = original[:, 0]
    assert np.all(border[:, [0, 1, -2, -1]] == 255)
    assert np.array_equal(border[:, 2:-2, 2:-2], original[:, 2:-2, 2:-2])
    assert np.all(grid[:, ::4] == 255)
    assert np.array_equal(grid[:, 1:4, 5:8], original[:, 1:4, 5:8])
    assert np.array_equal(blocks[:, 4:8, 8:12], np.broadcast_to(np.floor(original[:, 4:8, 8:12].mean(axis=(1, 2)) + 0.5)[:, None, None], (20, 4, 4)))
    assert np.array_equal(blocks[:, 12:, 12:], np.broadcast_to(np.floor(original[:, 12:, 12:].mean(axis=(1, 2)) + 0.5)[:, None, None], (20, 2, 2)))
    assert np.array_equal(quantised, np.where(original < 128, 0, 255))


def test_degraded_passes_the_options_of_its_family_on() -> None:
    images = draw("degraded", family="salt_and_pepper", salt_and_pepper={"density": 1})
    assert is_binary(images).all()
    assert np.array_equal(draw("degraded", family="salt_and_pepper", **{"salt_and_pepper.density": 1}), images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixture", {"dead_leafs": {"weight": 1}}, "dead_leafs: unknown generator 'dead_leafs': did you mean 'dead_leaves'"),
        ("mixture", {"dead_leaves": {"exponnt": 1}}, "dead_leaves: unknown option 'exponnt' of dead_leaves: did you mean 'exponent'"),
        ("mixture", {"dead_leaves": {"weight": -1}}, "option dead_leaves.weight: expected a finite number >= 0, got -1"),
        ("mixture", {"dead_leaves.weight": "much"}, "option dead_leaves.weight: expected a finite number >= 0, got 'much'"),
        ("mixture", {"dead_leaves.weight": 0}, "option weight: expected one above 0"),
        ("mixture", {"dead_leaves": 0.5}, "option dead_leaves: expected options of its own, such as dead_leaves.weight, got 0.5"),
        ("mixture", {"leaves": 5}, "unknown option 'leaves' of mixture: it has none"),
        ("mixture", {"mixture": {"salt_and_pepper.density": 3}}, "mixture: salt_and_pepper: option density: expected a number in"),
        ("dead_leaves", {"salt_and_pepper": {"density": 1}}, "unknown option 'salt_and_pepper.density' of dead_leaves"),
        ("degraded", {"salt_and_pepper": {"density": 1}}, "option family: expected the one whose options are given, salt_and_pepper"),
        ("degraded", {"family": "leaves"}, "unknown generator 'leaves'"),
        ("degraded", {"dead_leaves.exponnt": 2}, "unknown option 'exponnt' of dead_leaves"),
        ("degraded", {"strength": 2}, "option strength: expected a number in"),
        ("degraded", {"distinct": -2}, "option distinct: expected an integer >= 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_generator(name, 1, 28, **options)
    assert "\n" not in str(caught.value)
