"""Programmatic images against closed forms and a brute-force painter."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from synthetic_generators import Streams, make_generator
from synthetic_generators.dead_leaves import DeadLeaves, Leaves, paint


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
    n, side, k = 3, 20, 90
    image = np.sort(rng.integers(n, size=k))
    centre, radius = rng.uniform(-2, side + 2, (2, k)).astype(np.float32), rng.uniform(0.3, 9, k).astype(np.float32)
    is_circle = rng.random(k) < 0.3
    angle = np.sort(rng.uniform(0, 2 * np.pi, (4, k)), axis=0)
    angle[3] = angle[2]  # triangles
    angle[2:, ::2] = angle[:2, ::2] + np.pi  # rectangles
    angle[:, :6] = np.pi / 4 * np.array([1, 3, 5, 7])[:, None]  # whose sides are level and upright
    corners = (radius * np.stack([np.cos(angle), np.sin(angle)])).astype(np.float32)

    expected = np.repeat(np.arange(n), side * side).reshape(n, side, side)
    y, x = np.mgrid[:side, :side] + 0.5
    for leaf in range(k):
        dx, dy = x - centre[0, leaf], y - centre[1, leaf]
        if is_circle[leaf]:
            inside = dx**2 + dy**2 <= radius[leaf] ** 2
        else:
            (cx, cy), (nx, ny) = corners[:, :, leaf], np.roll(corners[:, :, leaf], -1, axis=1)
            inside = np.all([(nx[i] - cx[i]) * (dy - cy[i]) >= (ny[i] - cy[i]) * (dx - cx[i]) for i in range(4)], axis=0)
        expected[image[leaf]][inside] = n + leaf
    leaves = Leaves(image, np.arange(k), centre, radius, is_circle, corners)
    assert np.array_equal(paint(leaves, np.arange(n, n + k), np.arange(n), side), expected)


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


@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("levels", [2, 3, 5, 256])
def test_grains_have_evenly_many_of_each_level(levels: int, grain: int) -> None:
    density = 0.4
    images = draw("salt_and_pepper", 3000, density=density, levels=levels, grain=grain)
    assert np.mean(images != 128) == pytest.approx(density, rel=0.05)
    counts = np.bincount(images[images != 128], minlength=256)
    expected = [255 * k // (levels - 1) for k in range(levels) if 255 * k // (levels - 1) != 128]
    assert counts.nonzero()[0].tolist() == expected
    assert counts[expected] / counts.sum() == pytest.approx(1 / len(expected), rel=0.05 if levels < 9 else 0.3)


def test_densities_of_the_images_spread_evenly_over_the_asked_range() -> None:
    images = draw("salt_and_pepper", 1000, density=0.1, density_max=0.7)
    density = (images != 128).mean(axis=(1, 2, 3))
    assert density.mean() == pytest.approx(0.4, rel=0.05)
    assert density.std() == pytest.approx(0.6 / math.sqrt(12), rel=0.05)
    assert 0.05 < density.min() < 0.15
    assert 0.65 < density.max() < 0.75


def test_grains_are_coloured_as_asked() -> None:
    density = 0.3
    coloured = draw("salt_and_pepper", 1000, 3, density=density, colour="grains")
    is_grain = coloured != 128
    assert np.array_equal(is_grain[:, 0], is_grain[:, 2])
    assert is_grain.mean() == pytest.approx(density, rel=0.05)
    assert np.mean(coloured[:, 0][is_grain[:, 0]] == coloured[:, 1][is_grain[:, 0]]) == pytest.approx(0.5, rel=0.05)
    apart = draw("salt_and_pepper", 1000, 3, density=density, colour="channels") != 128
    assert apart.mean() == pytest.approx(density, rel=0.05)
    assert np.mean(apart[:, 0] & apart[:, 1]) == pytest.approx(density**2, rel=0.05)


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


def one_textured_leaf(texture: str, **options: Any) -> np.ndarray:
    """float64 [200, 32, 32]: images that a single leaf covers, or nearly."""
    whole: dict[str, Any] = {"shape": "circle", "radius_min": 1.5, "radius_max": 1.6, "leaves": 1, "leaves_min": 1, "supersampling": 1}
    return draw("dead_leaves", 200, image_size=32, texture=texture, **whole | options)[:, 0].astype(float)


def test_stripes_are_waves_from_three_pixels_to_half_the_image() -> None:
    images = one_textured_leaf("stripes")
    images = images[np.ptp(images, axis=(1, 2)) > 60] - images[np.ptp(images, axis=(1, 2)) > 60].mean(axis=(1, 2), keepdims=True)
    spectrum = np.abs(np.fft.fft2(images * np.hanning(32)[:, None] * np.hanning(32))) ** 2
    peak = spectrum.reshape(len(images), -1).argmax(axis=1)
    fy, fx = (np.minimum(f, 32 - f) for f in (peak // 32, peak % 32))
    wavelength = 32 / np.hypot(fx, fy)
    assert np.mean((wavelength > 2.7) & (wavelength < 23)) > 0.95
    near = sum(np.roll(spectrum, (i, j), axis=(1, 2)) for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)).reshape(len(images), -1)
    assert np.median(2 * near.max(axis=1) / spectrum.sum(axis=(1, 2))) > 0.95  # a wave is a peak and its mirror image


def test_gradients_rise_once_and_noise_is_white() -> None:
    for image in one_textured_leaf("gradient"):
        for lines in (image, image.T):
            steps = np.diff(lines, axis=1)
            assert np.all(steps >= 0) or np.all(steps <= 0)
    noise = one_textured_leaf("noise")
    noise = noise[noise.std(axis=(1, 2)) > 20]
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1]) / np.mean(noise**2)) < 0.05
    assert abs(np.mean(noise[:, :, 1:] * noise[:, :, :-1]) / np.mean(noise**2)) < 0.05


@pytest.mark.parametrize("texture", ["stripes", "gradient", "noise", "mixed"])
def test_textures_have_the_asked_contrast(texture: str) -> None:
    plain = draw("dead_leaves", 60, 3)
    assert np.array_equal(draw("dead_leaves", 60, 3, texture=texture, contrast=0), plain)
    deviation = [np.abs(draw("dead_leaves", 60, 3, texture=texture, contrast=contrast).astype(float) - plain).mean() for contrast in (0.25, 1.0)]
    assert deviation[0] == pytest.approx(deviation[1] / 4, rel=0.1)  # up to rounding


def test_a_textured_silhouette_has_two_colours() -> None:
    images = draw("dead_leaves", 50, 3, ground="black", silhouettes=1, texture="mixed", supersampling=1, leaves_min=100).astype(float)
    for image in images:
        colours = image.reshape(3, -1).T
        colours = colours[colours.any(axis=1)]
        across = np.linalg.svd(colours - colours.mean(axis=0), compute_uv=False)[1]  # how far they are from one line
        assert across < 0.6 * len(colours) ** 0.5
