"""Programmatic images against closed forms and a brute-force painter."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from synthetic_generators import Streams, make_generator
from synthetic_generators.dead_leaves import DeadLeaves, paint


def draw(name: str, n: int, channels: int = 1, image_size: int = 28, seed: int = 0, **options: Any) -> np.ndarray:
    return make_generator(name, channels, image_size, **options).generate(Streams(seed, range(n)))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, 4.5])
def test_the_radius_exponent_is_the_maximum_likelihood_fit(exponent: float) -> None:
    """Fitted on the radii that the leaves of 300 images have."""
    low, high = 0.03, 1.0
    image, number = np.repeat(np.arange(300), 70), np.tile(np.arange(70), 300)
    radii = DeadLeaves(1, 28, exponent=exponent, radius_min=low, radius_max=high).draw_radii(Streams(0, range(300)), image, number)
    assert low * (1 - 1e-9) <= radii.min()
    assert radii.max() <= high * (1 + 1e-9)

    def negative_log_likelihood(a: float) -> float:
        normaliser = math.log(high / low) if a == 1 else (high ** (1 - a) - low ** (1 - a)) / (1 - a)
        return float(a * np.log(radii).mean() + math.log(normaliser))

    fitted = minimize_scalar(negative_log_likelihood, bounds=(-2, 8), method="bounded").x
    assert fitted == pytest.approx(exponent, rel=0.05, abs=0.05)


@pytest.mark.parametrize(
    ("shape", "area_per_squared_radius"),
    [("circle", math.pi), ("square", 2), ("rectangle", 4 / math.pi), ("triangle", 3 / (2 * math.pi)),
     ("mixed", (math.pi + 2 + 4 / math.pi + 3 / (2 * math.pi)) / 4)],
)  # fmt: skip
def test_the_uncovered_ground_matches_its_closed_form(shape: str, area_per_squared_radius: float) -> None:
    low, high, leaves, margin, side = 0.04, 0.12, 60, 5, 32
    images = draw("dead_leaves", 1000, image_size=side, shape=shape, radius_min=low, radius_max=high, leaves=leaves, leaves_min=leaves,
                  ground="black", silhouettes=0, supersampling=1)  # fmt: skip
    inner = images[:, :, margin:-margin, margin:-margin]  # far enough from the border that no leaf centre is missing
    mean_squared_radius = 2 * math.log(high / low) / (low**-2 - high**-2)  # under p(r) ~ r^-3
    ground = (1 - area_per_squared_radius * mean_squared_radius) ** leaves
    black = ground + (1 - ground) / 256  # a leaf is black with probability 1/256
    assert np.mean(inner == 0) == pytest.approx(black, rel=0.05)


def test_painting_agrees_with_a_point_in_shape_test_for_every_pixel() -> None:
    rng = np.random.default_rng(3)
    n, side, k = 3, 20, 60
    image = np.sort(rng.integers(n, size=k))
    centre, radius = rng.uniform(-2, side + 2, (2, k)), rng.uniform(0.3, 9, k)
    is_circle = rng.random(k) < 0.4
    angle = np.sort(rng.uniform(0, 2 * np.pi, (k, 4)), axis=1)
    angle[::3, 3] = angle[::3, 2]  # triangles
    corners = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)])

    expected = np.repeat(np.arange(n), side * side).reshape(n, side, side)
    y, x = np.mgrid[:side, :side] + 0.5
    for leaf in range(k):
        dx, dy = x - centre[0, leaf], y - centre[1, leaf]
        if is_circle[leaf]:
            inside = dx**2 + dy**2 <= radius[leaf] ** 2
        else:
            (cx, cy), (nx, ny) = corners[:, leaf], np.roll(corners[:, leaf], -1, axis=1)
            inside = np.all([(nx[i] - cx[i]) * (dy - cy[i]) >= (ny[i] - cy[i]) * (dx - cx[i]) for i in range(4)], axis=0)
        expected[image[leaf]][inside] = n + leaf
    assert np.array_equal(paint(image, centre, radius, is_circle, corners, n, side), expected)


def test_supersampling_gives_the_partial_coverage_of_the_edges() -> None:
    options: dict[str, Any] = {"shape": "circle", "radius_min": 0.3, "radius_max": 0.4, "leaves": 1, "leaves_min": 1, "ground": "black"}
    hard, soft = (draw("dead_leaves", 300, supersampling=s, **options) for s in (1, 4))
    assert max(len(np.unique(image)) for image in hard) == 2
    assert np.median([len(np.unique(image)) for image in soft]) > 4
    assert soft.mean() == pytest.approx(hard.mean(), rel=0.1)


def test_grounds_and_silhouettes_mean_what_they_say() -> None:
    for ground, level in (("black", 0), ("gray", 128), ("white", 255)):
        bare = draw("dead_leaves", 100, 3, ground=ground, leaves_min=1, leaves=1, radius_max=0.031, supersampling=1)
        assert np.all(np.median(bare, axis=(2, 3)) == level)
    plain = draw("dead_leaves", 50, silhouettes=1, supersampling=1)
    assert all(len(np.unique(image)) <= 2 for image in plain)
    classical = draw("dead_leaves", 50, silhouettes=0, leaves_min=100, supersampling=1)
    assert np.mean([len(np.unique(image)) > 20 for image in classical]) > 0.9  # a late large leaf may hide most of the others


def test_default_dead_leaves_range_from_bright_shapes_on_black_to_full_cover() -> None:
    images = draw("dead_leaves", 1000)[:, 0]
    black, white = (images == 0).mean(axis=(1, 2)), (images == 255).mean(axis=(1, 2))
    assert 0.05 < np.mean((black > 0.5) & (images.max(axis=(1, 2)) > 150)) < 0.5
    assert 0.05 < np.mean(white > 0.5) < 0.5
    values = np.array([len(np.unique(image)) for image in images])
    assert np.mean(values > 100) > 0.2


@pytest.mark.parametrize("grain", [1, 3, 5])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_salt_and_pepper_covers_the_asked_density_half_with_each(density: float, grain: int) -> None:
    images = draw("salt_and_pepper", 2000, 3, density=density, grain=grain)
    assert np.mean(images != 128) == pytest.approx(density, rel=0.05)
    assert np.mean(images == 255) == pytest.approx(density / 2, rel=0.05)
    assert np.mean(images == 0) == pytest.approx(density / 2, rel=0.05)
    assert np.array_equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("grain", [1, 2, 7])
def test_binary_grains_have_the_asked_side(grain: int) -> None:
    density = 0.3
    images = draw("salt_and_pepper", 1500, density=density, grain=grain, binary=True)
    assert set(np.unique(images)) == {0, 255}
    assert np.mean(images == 255) == pytest.approx(density, rel=0.05)
    # Neighbours lie in different cells with probability 1/grain, anywhere in the image.
    for axis in (2, 3):
        changes = np.diff(images.astype(int), axis=axis) != 0
        assert changes.mean() == pytest.approx(2 * density * (1 - density) / grain, rel=0.05)
        profile = changes.mean(axis=tuple(a for a in range(4) if a != axis))
        assert profile.max() < 1.6 * profile.min()
