"""Strokes and smooth shapes against brute-force renderings and closed forms."""

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from synthetic_generators import make_generator
from synthetic_generators.smooth_shapes import locate, outline_tables
from synthetic_generators.streams import Streams
from synthetic_generators.strokes import bezier_chain, pen_depth

FAMILIES = ["strokes", "smooth_shapes"]


def draw(name: str, n: int, channels: int = 1, image_size: int = 28, seed: int = 0, **options: Any) -> np.ndarray:
    return make_generator(name, channels, image_size, **options).generate(Streams(seed, range(n)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32), (1, 9), (3, 1), (1, 70)])
def test_an_image_is_the_same_in_any_batch(name: str, channels: int, image_size: int) -> None:
    generator = make_generator(name, channels, image_size)
    together = generator.generate(Streams(5, range(300)))
    assert together.dtype == np.uint8
    assert together.shape == (300, channels, image_size, image_size)
    for batch in (range(0), range(11, 12), range(290, 297), range(230, 294), [3, 299, 4]):
        assert np.array_equal(generator.generate(Streams(5, batch)), together[list(batch)])
    assert image_size == 1 or len({image.tobytes() for image in together}) > 290
    assert not np.array_equal(generator.generate(Streams(6, range(300))), together)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("strokes", {"strokes": 0}, "option strokes: expected an integer >= 1, got 0"),
        ("strokes", {"curves": 0}, "option curves: expected"),
        ("strokes", {"turn": 301}, r"option turn: expected degrees in \[0, 300\]"),
        ("strokes", {"closed": 1.5}, "option closed: expected"),
        ("strokes", {"level_min": -0.1}, "option level_min: expected"),
        ("strokes", {"width_min": 0}, "option width_min: expected"),
        ("strokes", {"pen_min": 0}, "option pen_min: expected"),
        ("strokes", {"pen_max": 0.01}, "option pen_max: expected a number >= pen_min"),
        ("strokes", {"pressure": 1}, "option pressure: expected"),
        ("strokes", {"size_min": 0.17}, r"option size_min: expected a number > pen_max \(1 \+ pressure\) = 0.175"),
        ("strokes", {"size_max": 1.1}, "option size_max: expected a number from size_min = 0.55 to 1"),
        ("strokes", {"edge": 0}, "option edge: expected"),
        ("strokes", {"polarity": "light"}, "option polarity: unknown choice 'light'"),
        ("smooth_shapes", {"shapes": 0}, "option shapes: expected an integer >= 1, got 0"),
        ("smooth_shapes", {"lobes": 0}, "option lobes: expected"),
        ("smooth_shapes", {"lumps": 1}, r"option lumps: expected a number in \[0, 1\)"),
        ("smooth_shapes", {"decay": -1}, "option decay: expected"),
        ("smooth_shapes", {"stretch": 0.5}, "option stretch: expected"),
        ("smooth_shapes", {"symmetric": 2}, "option symmetric: expected"),
        ("smooth_shapes", {"size_min": 0}, "option size_min: expected"),
        ("smooth_shapes", {"size_max": 0.2}, "option size_max: expected a number from size_min = 0.3 to 1"),
        ("smooth_shapes", {"contrast": 0.6}, "option contrast: expected"),
        ("smooth_shapes", {"alike": 2}, "option alike: expected"),
        ("smooth_shapes", {"mirrored": -1}, "option mirrored: expected"),
        ("smooth_shapes", {"edge": 0}, "option edge: expected"),
        ("smooth_shapes", {"ground": "grey"}, "option ground: unknown choice 'grey'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_generator(name, 1, 28, **options)
    assert "\n" not in str(caught.value)


def distance_to_segment(side: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of every pixel's centre from the segment between two points (x, y); [side, side]."""
    y, x = np.mgrid[:side, :side] + 0.5
    along = end - start
    t = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(along @ along, 1e-12), 0, 1)
    return np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1])


def test_the_pen_agrees_with_the_distance_to_the_segments_of_its_paths() -> None:
    rng = np.random.default_rng(1)
    n, side, blur = 4, 30, 0.7
    image = np.sort(rng.integers(n, size=9))
    path = rng.uniform(2, side - 2, (2, 9, 2)).astype(np.float32)
    path[:, 5] = path[:, 5, :1]  # a dot
    radius = np.broadcast_to(rng.uniform(0.4, 3, (9, 1)), (9, 2)).astype(np.float32)
    expected = np.full((n, side, side), -blur)
    for stroke in range(9):
        depth = radius[stroke, 0] - distance_to_segment(side, *path[:, stroke].T.astype(float))
        expected[image[stroke]] = np.maximum(expected[image[stroke]], depth)
    found = pen_depth(image, path, radius, n, side, blur)
    assert np.abs(np.minimum(found, blur) - np.minimum(expected, blur)).max() < 0.14


def test_the_width_of_the_pen_changes_linearly_between_the_points_of_a_path() -> None:
    path, radius = np.array([[[4, 26]], [[15, 15]]], dtype=np.float32), np.array([[1, 3]], dtype=np.float32)
    depth = pen_depth(np.array([0]), path, radius, 1, 30, 0.5)[0]
    x = np.arange(30) + 0.5
    t = np.linspace(0, 1, 2000)[:, None, None]
    expected = (1 + 2 * t - np.hypot(x - 4 - 22 * t, x[:, None] - 15)).max(axis=0)
    assert np.abs(np.minimum(depth, 0.5) - np.clip(expected, -0.5, 0.5)).max() < 0.14


def test_a_straight_stroke_is_the_partial_coverage_of_its_segment() -> None:
    side, pen, size, n = 64, 0.1, 0.7, 40
    images = draw("strokes", n, image_size=side, strokes=1, curves=1, straight=1, closed=0, pressure=0, random_levels=0, level_min=1,
                  pen_min=pen, pen_max=pen, size_min=size, size_max=size, shift=0)[:, 0]  # fmt: skip
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    radius = side * pen / 2
    for image in images / 255:
        # Direction from second moments; length from the larger side of the box around the ink.
        angle = np.arctan2(2 * (image * x * y).sum(), (image * (x**2 - y**2)).sum()) / 2
        direction = np.array([np.cos(angle), np.sin(angle)])
        half = direction * (side * size / 2 - radius) / np.abs(direction).max()
        distance = distance_to_segment(side, side / 2 - half, side / 2 + half)
        expected = np.clip(radius - distance + 0.5, 0, 1)
        assert np.abs(image - expected).max() < 0.15
        assert image.sum() == pytest.approx(expected.sum(), rel=0.02)
        assert image.sum() == pytest.approx(4 * radius * np.hypot(*half) + np.pi * radius**2, rel=0.02)


@pytest.mark.parametrize("turn", [-4.0, -1.0, 0.0, 0.5, np.pi / 2])
def test_curves_are_close_to_arcs_of_their_turn_and_length_and_join(turn: float) -> None:
    angle = np.array([[[0.3, 0.3 + turn]]])
    turns, length, handles = np.full((1, 1, 2), turn), np.full((1, 1, 2), 2.0), np.ones((1, 2, 1, 2))
    path = bezier_chain(angle, turns, length, handles)[:, 0, 0].astype(float)
    steps = np.linspace(0, 2 * turn, 2000) + 0.3
    arc = np.cumsum([np.cos(steps), np.sin(steps)], axis=1) * 4 / 2000
    gap = np.hypot(*(path[:, :, None] - arc[:, None, :])).min(axis=1)
    assert gap.max() < (0.01 if abs(turn) < 2 else 0.25)
    assert np.allclose(path[:, -1], arc[:, -1], atol=0.01)


def test_closed_strokes_enclose_ground_and_straight_ones_do_not() -> None:
    options: dict[str, Any] = {"image_size": 64, "strokes": 1, "pen_max": 0.06, "random_levels": 0}

    def grounds(closed: float, straight: float) -> np.ndarray:
        images = draw("strokes", 100, closed=closed, straight=straight, curves=1, **options)[:, 0]
        return np.array([ndimage.label(image < 100)[1] for image in images])

    assert np.mean(grounds(closed=1, straight=0) == 2) > 0.95
    assert np.all(grounds(closed=0, straight=1) == 1)


def test_parts_of_a_figure_join_and_bend_as_asked() -> None:
    options: dict[str, Any] = {"image_size": 64, "pen_max": 0.07, "random_levels": 0, "pressure": 0}
    pieces = {n: [ndimage.label(image > 100)[1] for image in draw("strokes", 150, strokes=n, **options)[:, 0]] for n in (1, 3)}
    assert max(pieces[1]) == 1
    assert 1 < max(pieces[3]) <= 3

    def flatness(**bends: float) -> np.ndarray:
        """The smaller over the larger standard deviation of the ink along its principal axes; near 0 for a straight line."""
        images = draw("strokes", 100, strokes=1, closed=0, width_min=1, **options, **bends)[:, 0]
        moments = [np.linalg.eigvalsh(np.cov(np.argwhere(image > 100).T)) for image in images]
        return np.array([np.sqrt(low / high) for low, high in moments])

    assert flatness(turn=0, corners=0).max() < 0.15
    assert np.mean(flatness(turn=0, corners=1) > 0.15) > 0.4
    assert np.mean(flatness(turn=240, straight=0, corners=0) > 0.15) > 0.7
    bare = draw("strokes", 20, strokes=1, closed=0, **options, turn=0)
    assert np.array_equal(bare, draw("strokes", 20, strokes=1, closed=0, **options, straight=1))
    narrow, wide = (np.mean([np.ptp(np.nonzero(i > 100)[1]) for i in draw("strokes", 200, width_min=w, **options)[:, 0]]) for w in (0.3, 1))
    assert narrow < 0.9 * wide


def test_edges_are_as_soft_as_asked() -> None:
    between = [np.mean((image > 20) & (image < 170)) for image in (draw("strokes", 100, edge=e, random_levels=0) for e in (0.2, 1, 3))]
    assert 1.5 * between[0] < between[1] < between[2] / 1.5


def test_figures_have_the_asked_size_and_place() -> None:
    def boxes(shift: float) -> tuple[np.ndarray, np.ndarray]:
        images = draw("strokes", 300, image_size=40, size_min=0.5, size_max=0.5, shift=shift, random_levels=0, level_min=1, pressure=0)[:, 0]
        found = [np.nonzero(image > 100) for image in images]
        low, high = (np.array([[f(rows), f(columns)] for rows, columns in found]) for f in (np.min, np.max))
        return high - low + 1, (high + low + 1) / 2

    for shift, spread in ((0, 0), (1, 1)):
        size, centre = boxes(shift)
        assert np.abs(size.max(axis=1) - 20).max() <= 1.5
        reach = np.abs(centre - 20) - spread * (40 - size) / 2  # beyond where the figure would touch the border
        assert reach.max() <= 1
        assert centre.mean() == pytest.approx(20, abs=0.8)
    assert np.abs(centre - 20).max() > 9


def test_levels_are_what_the_polarity_says() -> None:
    def ends(polarity: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images = draw("strokes", 200, 3, 32, polarity=polarity, random_levels=0, pen_min=0.1)
        flat = images.reshape(200, 3, -1)
        return images[:, :, 0, 0], flat.min(axis=2), flat.max(axis=2)

    ground, _, high = ends("bright")
    assert np.all(ground == 0) and np.all((high >= 191) & (high == high[:, :1]))
    ground, low, high = ends("dark")
    assert np.all(low == 0) and np.all(ground >= 191) and np.all(ground == high)
    assert np.mean(ends("mixed")[0] == 0) == pytest.approx(0.5, abs=0.12)
    ground, low, high = (levels.astype(int) for levels in ends("random"))
    assert ground.mean() == pytest.approx(127.5, abs=15)
    assert np.all(np.maximum(high - ground, ground - low) >= 50)
    share = np.mean(draw("strokes", 1000, random_levels=0.3)[:, 0, 0, 0] > 0)
    assert share == pytest.approx(0.3, abs=0.05)


def outlines(n: int, lobes: int, lumps: float) -> tuple[np.ndarray, ...]:
    """Half axes, turn and coefficients of n outlines, float32, and the amplitudes' sum of each is lumps."""
    rng = np.random.default_rng(2)
    amplitude = rng.random((n, lobes)) / np.arange(1, lobes + 1)
    amplitude *= lumps / amplitude.sum(axis=1, keepdims=True)
    phase = rng.uniform(0, 2 * np.pi, (n, lobes))
    parts = rng.uniform(9, 16, (n, 2)), rng.uniform(0, 2 * np.pi, n), amplitude * np.cos(phase), amplitude * np.sin(phase)
    return tuple(part.astype(np.float32) for part in parts)


def depth_of(centre: np.ndarray, axes: np.ndarray, turn: np.ndarray, cosine: np.ndarray, sine: np.ndarray, side: int) -> np.ndarray:
    share, reach, _ = locate(centre, axes, turn, *outline_tables(axes, cosine, sine), side)
    return (1 - share) * reach


def test_the_area_of_a_smooth_shape_matches_its_closed_form() -> None:
    side = 64
    for lumps in (0.0, 0.3, 0.8):
        axes, turn, cosine, sine = outlines(30, 6, lumps)
        depth = depth_of(np.full((30, 2), side / 2, dtype=np.float32), axes, turn, cosine, sine, side)
        area = np.pi * axes.prod(axis=1) * (1 + (cosine**2 + sine**2).sum(axis=1) / 2)
        assert np.clip(depth + 0.5, 0, 1).sum(axis=(1, 2)) == pytest.approx(area, rel=0.01)


def test_depth_is_the_distance_from_the_outline_near_it() -> None:
    side, n = 56, 20
    centre = np.random.default_rng(3).uniform(25, 31, (n, 2)).astype(np.float32)
    axes, turn, cosine, sine = outlines(n, 4, 0.3)
    depth = depth_of(centre, axes, turn, cosine, sine, side)
    theta, k = np.linspace(0, 2 * np.pi, 4000), np.arange(1, 5)[:, None]
    y, x = np.mgrid[:side, :side] + 0.5
    for i in range(n):
        radius = 1 + cosine[i] @ np.cos(k * theta) + sine[i] @ np.sin(k * theta)
        u, v = axes[i, 0] * radius * np.cos(theta), axes[i, 1] * radius * np.sin(theta)
        px = centre[i, 0] + u * np.cos(turn[i]) - v * np.sin(turn[i])
        py = centre[i, 1] + u * np.sin(turn[i]) + v * np.cos(turn[i])
        near = np.abs(depth[i]) < 1
        distance = np.hypot(x[near][:, None] - px, y[near][:, None] - py).min(axis=1)
        assert np.abs(np.abs(depth[i][near]) - distance).max() < 0.12


SIMPLE: dict[str, Any] = {"shapes": 1, "lumps": 0, "stretch": 1, "shift": 0, "shading": 0, "hollow": 0, "rims": 0}


def test_a_shape_without_lumps_is_a_disc_of_the_asked_size_and_contrast() -> None:
    side = 40
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    coverage = np.clip(side * 0.3 - np.hypot(x, y) + 0.5, 0, 1)
    images = draw("smooth_shapes", 200, 3, side, size_min=0.6, size_max=0.6, contrast=0.3, ground="plain", **SIMPLE).astype(float)
    ground, middle = images[:, :, :1, :1], images[:, :, 20:21, 20:21]
    assert np.abs(images - (ground + coverage * (middle - ground))).max() < 4
    assert np.abs(middle - ground).min() >= 0.3 * 255 - 1
    assert ground.std() > 60
    assert middle.std() > 60


def test_symmetric_shapes_are_mirror_images_about_the_upright_axis() -> None:
    def asymmetry(symmetric: float) -> np.ndarray:
        images = draw("smooth_shapes", 100, image_size=32, symmetric=symmetric, ground="black", **(SIMPLE | {"lumps": 0.8})).astype(int)
        return np.abs(images - images[..., ::-1]).max(axis=(1, 2, 3))

    assert asymmetry(1).max() <= 8  # of 255: directions come from a table
    assert np.mean(asymmetry(0) > 20) > 0.9


def test_rims_hollows_and_grounds_are_what_they_say() -> None:
    options: dict[str, Any] = SIMPLE | {"size_min": 0.8, "size_max": 0.8, "contrast": 0.3}
    for ground, level in (("black", 0), ("white", 255)):
        hollow = draw("smooth_shapes", 100, image_size=40, ground=ground, **(options | {"hollow": 1}))[:, 0]
        assert np.all(hollow[:, [0, 20], [0, 20]] == level)
        assert np.all(np.abs(hollow[:, 20, 5].astype(int) - level) > 70)
    rimmed = draw("smooth_shapes", 100, image_size=40, ground="black", **(options | {"rims": 1}))[:, 0].astype(int)
    assert np.all(rimmed[:, 20, 20] > 70) and np.all(rimmed[:, 20, 5] > 70)
    assert np.mean(np.abs(rimmed[:, 20, 20] - rimmed[:, 20, 5]) > 10) > 0.6
    corners = draw("smooth_shapes", 100, image_size=40, ground="gradient", **options)[:, 0, ::39, ::39].astype(int)
    assert np.mean(np.ptp(corners, axis=(1, 2)) > 20) > 0.8
    kinds = draw("smooth_shapes", 1000, **SIMPLE)[:, 0, 0, :].astype(int)
    assert np.mean(np.all(kinds == 0, axis=1)) == pytest.approx(0.25, abs=0.06)
    assert np.mean(np.all(kinds == 255, axis=1)) == pytest.approx(0.25, abs=0.06)


def test_shading_changes_the_level_within_a_shape_and_shapes_are_up_to_the_asked_number() -> None:
    options: dict[str, Any] = {"ground": "black", "contrast": 0.5, "size_min": 0.4, "size_max": 0.4, "image_size": 40}
    flat, shaded = (draw("smooth_shapes", 100, **(SIMPLE | options | {"shading": s}))[:, 0, 15:25, 15:25] for s in (0, 1))
    assert np.all(np.ptp(flat, axis=(1, 2)) == 0)
    assert np.mean(np.ptp(shaded, axis=(1, 2)) > 30) > 0.8
    many = draw("smooth_shapes", 400, **(SIMPLE | options | {"shapes": 3, "shift": 1, "size_min": 0.1, "size_max": 0.15}))[:, 0]
    found = np.bincount([ndimage.label(image > 60)[1] for image in many], minlength=5)
    assert found[0] == found[4] == 0
    assert found[1] / 400 == pytest.approx(np.log(2) / np.log(4), abs=0.1)
    assert found[3] > 40


@pytest.mark.parametrize("image_size", [32, 27])
def test_mirrored_images_are_mirror_images_of_themselves_and_keep_all_their_shapes(image_size: int) -> None:
    options: dict[str, Any] = SIMPLE | {"ground": "black", "contrast": 0.4, "shift": 1, "size_min": 0.2, "size_max": 0.3, "image_size": image_size}
    images = draw("smooth_shapes", 200, mirrored=1, **options)
    assert np.array_equal(images, images[..., ::-1])
    assert np.all(images.max(axis=(1, 2, 3)) > 60)
    pairs = np.mean([ndimage.label(image > 60)[1] == 2 for image in images[:, 0]])
    assert pairs > 0.4  # a shape away from the middle becomes two
    half = draw("smooth_shapes", 400, mirrored=0.5, **options)
    assert np.mean(np.all(half == half[..., ::-1], axis=(1, 2, 3))) == pytest.approx(0.5, abs=0.1)


def test_alike_shapes_have_the_colour_of_the_first_one() -> None:
    options: dict[str, Any] = SIMPLE | {"ground": "black", "shift": 1, "size_min": 0.2, "size_max": 0.3, "image_size": 40, "shapes": 3}

    def colours(alike: float) -> list[int]:
        images = draw("smooth_shapes", 200, alike=alike, **options)[:, 0]
        flat = [(image > 0) & (ndimage.maximum_filter(image, 3) == ndimage.minimum_filter(image, 3)) for image in images]
        return [len(np.unique(image[where])) for image, where in zip(images, flat, strict=True)]

    assert set(colours(1)) == {1}
    assert np.mean(np.array(colours(0)) > 1) == pytest.approx(0.5, abs=0.1)  # as many have more than one shape
