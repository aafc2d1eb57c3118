"""Random fields and fractals against spectra, marginals and moments in closed form, and slow code that does the same."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from synthetic_generators import Streams, make_generator
from synthetic_generators.affine_systems import attractor_points, draw_maps, draw_words, fixed_point
from synthetic_generators.coloured_noise import ColouredNoise
from synthetic_generators.perlin import Perlin
from synthetic_generators.random_fields import RandomField
from synthetic_generators.wavelet_marginal import WaveletMarginal

FAMILIES = ["coloured_noise", "fractals", "perlin", "wavelet_marginal"]


def draw(name: str, n: int, channels: int = 1, image_size: int = 28, **options: Any) -> np.ndarray:
    return make_generator(name, channels, image_size, **options).generate(Streams(0, range(n)))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def amplitude_exponent(fields: np.ndarray) -> float:
    """The a of 1 / f^a that fits the power spectrum of fields [n, 1, S, S], averaged over images and over circles of equal frequency."""
    side = fields.shape[-1]
    power = (np.abs(np.fft.fft2(fields[:, 0])) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side, 1 / side)] * 2))
    radii = [f for f in np.unique(frequency) if 0 < f <= side / 2]
    return -slope(np.array(radii), np.array([power[frequency == f].mean() for f in radii])) / 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [28, 32])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_image_is_empty_or_saturated(name: str, image_size: int, channels: int) -> None:
    images = draw(name, 400, channels, image_size).reshape(400, -1).astype(float)
    assert images.std(axis=1).min() > 6
    assert np.median(images.std(axis=1)) > 35
    levels = np.array([[np.mean(image == 0), np.mean(image == 255)] for image in images])
    assert levels.max() < 0.97
    assert 80 < images.mean() < 175  # as many dark ones as bright ones


@pytest.mark.parametrize("kind", [ColouredNoise, Perlin, WaveletMarginal])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32), (3, 9), (1, 33)])
def test_a_field_is_the_same_in_any_batch_before_it_is_rounded(kind: type[RandomField], channels: int, image_size: int) -> None:
    family = kind(channels, image_size)
    whole = family.fields(Streams(0, range(64)))
    assert whole.dtype == np.float32
    for size in (1, 7, 30):
        parts = [family.fields(Streams(0, range(start, min(start + size, 64)))) for start in range(0, 64, size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_means_and_contrasts_are_those_configured() -> None:
    images = draw("coloured_noise", 1000, mean_min=0.4, mean_max=0.6, contrast_min=0.03, contrast_max=0.06).reshape(1000, -1) / 255
    mean, contrast = images.mean(axis=1), images.std(axis=1)
    assert [mean.min(), mean.max()] == pytest.approx([0.4, 0.6], abs=0.002)
    assert mean.mean() == pytest.approx(0.5, abs=0.005)
    assert [contrast.min(), contrast.max()] == pytest.approx([0.03, 0.06], abs=0.001)
    assert contrast.mean() == pytest.approx(0.045, abs=0.001)


def test_colours_are_correlated_as_configured() -> None:
    def deviations(colour: float) -> np.ndarray:
        """Along each image's principal axes of colour, largest first, relative to it: [n, 3]."""
        options = {"colour": colour, "mean_min": 0.5, "mean_max": 0.5, "contrast_min": 0.1, "contrast_max": 0.1, "exponent_max": 0.5}
        pixels = draw("coloured_noise", 300, 3, 32, **options).reshape(300, 3, -1) / 255
        covariance = np.stack([np.cov(image) for image in pixels])
        assert np.trace(covariance, axis1=1, axis2=2) / 3 == pytest.approx(0.1**2, rel=0.02)
        found = np.sqrt(np.linalg.eigvalsh(covariance)[:, ::-1])
        return found / found[:, :1]

    assert deviations(0)[:, 1:].max() < 0.02  # rounding alone
    second, third = deviations(0.8)[:, 1:].T
    assert third == pytest.approx(second**2, rel=0.25, abs=0.02)
    assert [second.min(), second.max()] == pytest.approx([0, 0.8], abs=0.06)
    pixels = draw("coloured_noise", 2000, 3, 4, colour=0, mean_min=0.5, mean_max=0.5)[:, :, 0, 0] - 127.5
    covariance = np.mean([np.outer(d, d) / (d @ d) for d in pixels], axis=0)
    assert covariance == pytest.approx(np.eye(3) / 3, abs=0.04)  # no axis of colour is preferred


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("image_size", [28, 31])
def test_the_spectrum_of_coloured_noise_falls_as_configured(image_size: int, exponent: float) -> None:
    """On the fields, since 256 levels hide the weakest frequencies of steep spectra."""
    family = ColouredNoise(1, image_size, exponent_min=exponent, exponent_max=exponent, stretch=1)
    assert amplitude_exponent(family.fields(Streams(0, range(400)))) == pytest.approx(exponent, rel=0.05, abs=0.02)


def test_exponents_are_drawn_for_each_image() -> None:
    fields = ColouredNoise(1, 64, exponent_min=1, exponent_max=2, stretch=1).fields(Streams(0, range(60)))
    fitted = [amplitude_exponent(fields[i : i + 1]) for i in range(60)]
    assert [min(fitted), max(fitted)] == pytest.approx([1, 2], abs=0.15)
    assert np.mean(fitted) == pytest.approx(1.5, abs=0.1)


def test_stretched_noise_keeps_its_exponent_and_is_longer_than_wide() -> None:
    family = ColouredNoise(1, 32, exponent_min=1.5, exponent_max=1.5, stretch=4)
    power = np.abs(np.fft.fft2(family.fields(Streams(0, range(3000)))[:, 0])) ** 2
    geometric_mean = np.exp(np.log(power[:, 1:16, 0]).mean(axis=0))  # of the frequencies 1 to 15 along one axis
    assert slope(np.arange(1, 16), geometric_mean) == pytest.approx(-3, rel=0.05)
    # Along the direction of stretch the squared frequency counts s times, across it 1 / s: the variance of log(power ratio) tells s.
    ratio = np.log(power[:, 1:16, 0]).mean(axis=1) - np.log(power[:, 0, 1:16]).mean(axis=1)
    s, angle = 4 ** np.linspace(0.001, 0.999, 400)[:, None], np.linspace(0, np.pi, 400)
    along, across = np.cos(angle) ** 2 * s + np.sin(angle) ** 2 / s, np.sin(angle) ** 2 * s + np.cos(angle) ** 2 / s
    expected = (1.5 * np.log(along / across)).var() + 2 * (np.pi**2 / 6) / 15  # the latter from the exponential law of each power
    assert ratio.var() == pytest.approx(expected, rel=0.08)


def perlin_by_hand(family: Perlin, index: int) -> np.ndarray:
    """The field of one gray image, pixel by pixel and corner by corner."""
    side, streams = family.image_size, Streams(0, [index])
    frequency = family.frequency_min * (family.frequency_max / family.frequency_min) ** float(streams.uniform("frequency")[0])
    frequency = min(frequency, side / 2)
    persistence = float(streams.uniform("persistence", (), family.persistence_min, family.persistence_max)[0])
    field = np.zeros((side, side))
    for octave in range(family.octaves):
        cells = frequency * 2**octave
        if cells > side / 2:
            break
        child = streams.child(f"octave {octave}")
        points = math.ceil(min(family.frequency_max * 2**octave, side / 2)) + 2
        angle = child.uniform("gradient", (1, points, points), 0, 2 * np.pi)[0, 0].astype(float)
        offset = child.uniform("offset", (2, 1))[0, :, 0].astype(float)
        for row in range(side):
            for column in range(side):
                y, x = ((place + 0.5) / side * cells + start for place, start in zip((row, column), offset, strict=True))
                value = 0.0
                for j in (math.floor(y), math.floor(y) + 1):
                    for i in (math.floor(x), math.floor(x) + 1):
                        ramp = math.cos(angle[j, i]) * (x - i) + math.sin(angle[j, i]) * (y - j)
                        value += ramp * math.prod(1 - (6 * t**5 - 15 * t**4 + 10 * t**3) for t in (abs(y - j), abs(x - i)))
                field[row, column] += persistence**octave * (abs(value) if family.turbulence else value)
    return field


@pytest.mark.parametrize("turbulence", [0.0, 1.0])
@pytest.mark.parametrize(("image_size", "frequency_max"), [(16, 3.0), (9, 40.0)])
def test_perlin_noise_agrees_with_the_textbook(image_size: int, frequency_max: float, turbulence: float) -> None:
    family = Perlin(1, image_size, frequency_max=frequency_max, turbulence=turbulence, threshold=0)
    fields = family.fields(Streams(0, range(6)))
    for index in range(6):
        assert fields[index, 0] == pytest.approx(perlin_by_hand(family, index), abs=2e-5)


def test_thresholded_noise_has_two_levels() -> None:
    images = draw("perlin", 200, threshold=1, octaves=1, contrast_max=0.1).reshape(200, -1)
    two = [np.sort(np.bincount(image))[-2:].sum() for image in images]
    assert np.median(two) > 0.75 * 28**2


@pytest.mark.parametrize("shape", [0.4, 0.7, 1.0, 2.0])
def test_wavelet_coefficients_have_the_configured_marginals(shape: float) -> None:
    values = WaveletMarginal(1, 32, shape_min=shape, shape_max=shape).coefficients(Streams(0, range(100))).ravel().astype(float)
    assert values.var() == pytest.approx(1, rel=0.05)
    assert values.mean() == pytest.approx(0, abs=0.015)

    def negative_log_likelihood(p: float) -> float:
        """Of p(c) ~ exp(-|c / s|^p) for each value on average, at the best s."""
        s = (p * np.mean(np.abs(values) ** p)) ** (1 / p)
        return math.log(2 * s / p) + math.lgamma(1 / p) + 1 / p

    fitted = minimize_scalar(negative_log_likelihood, bounds=(0.2, 4), method="bounded").x
    assert fitted == pytest.approx(shape, rel=0.05)
    if shape >= 1:  # below, 100,000 values don't determine a fourth moment to 5 %
        kurtosis = math.gamma(5 / shape) * math.gamma(1 / shape) / math.gamma(3 / shape) ** 2
        assert np.mean(values**4) == pytest.approx(kurtosis, rel=0.05)


def test_shapes_are_drawn_for_each_image() -> None:
    values = WaveletMarginal(1, 64, shape_min=0.5, shape_max=2).coefficients(Streams(0, range(300))).reshape(300, -1)
    peakedness = np.abs(values).mean(axis=1) / values.std(axis=1)  # Gamma(2/p) / sqrt(Gamma(1/p) Gamma(3/p))
    low, high = (math.gamma(2 / p) / math.sqrt(math.gamma(1 / p) * math.gamma(3 / p)) for p in (0.5, 2))
    assert [peakedness.min(), peakedness.max()] == pytest.approx([low, high], rel=0.1)


def test_the_wavelet_synthesis_is_orthogonal_and_falls_with_frequency_as_configured() -> None:
    for exponent in (0.0, 1.0, 2.0):
        family = WaveletMarginal(1, 32, exponent_min=exponent, exponent_max=exponent, shape_min=2, shape_max=2)
        streams = Streams(0, range(1000))
        fields = family.fields(streams)
        level = np.minimum(*np.meshgrid(*[np.repeat([4, 3, 2, 1, 0], [2, 2, 4, 8, 16])] * 2))  # 32 = 2^4 * 2
        expected = np.square(family.coefficients(streams) * 2.0 ** (exponent * level)).sum(axis=(2, 3))
        assert np.square(fields).sum(axis=(2, 3)) == pytest.approx(expected, rel=1e-4)
        assert amplitude_exponent(fields) == pytest.approx(exponent, rel=0.1, abs=0.02)


def test_the_wavelets_have_four_vanishing_moments() -> None:
    """A cubic has no detail, except where the circle closes: its synthesis from the coarse half alone is exact."""
    from synthetic_generators.wavelet_marginal import _basis

    basis = _basis(32)
    assert basis @ basis.T == pytest.approx(np.eye(32), abs=1e-6)
    cubic = np.linspace(-1, 1, 32) ** 3
    assert np.abs(basis[16:] @ cubic)[:-4].max() < 1e-6
    assert np.abs(basis[16:] @ cubic)[-4:].max() > 0.1


def test_systems_have_the_singular_values_of_anderson_and_farrell() -> None:
    n, most = 2000, 7
    count = 2 + Streams(0, range(n)).integers("count", most - 1)
    maps = draw_maps(Streams(0, range(n)), count, most).transpose(2, 3, 0, 1)
    values = np.linalg.svd(maps[..., :2], compute_uv=False)
    used = np.arange(most) < count[:, None]
    assert values[used].max() <= 1 + 1e-5
    total = ((values[..., 0] + 2 * values[..., 1]) * used).sum(axis=1)
    assert np.all((total > (5 + count) / 2 - 1e-4) & (total < (6 + count) / 2 + 1e-4))
    reflects = np.linalg.det(maps[..., :2])[used] < 0
    assert reflects.mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(maps[..., 2]).max() == pytest.approx(1, abs=0.01)


def test_points_have_the_moments_of_the_chaos_game() -> None:
    """Mean and second moments of the invariant measure solve linear equations: m = sum_k p_k E[(A_k x + b_k)]."""
    n, most, words = 300, 5, 120
    count = 2 + Streams(0, range(n)).integers("count", most - 1)
    maps = draw_maps(Streams(0, range(n)), count, most)
    word, first = draw_words(Streams(0, range(n)), maps, count, words)
    fixed = fixed_point(maps[..., 0])
    assert np.einsum("ijn,jn->in", maps[:, :2, :, 0], fixed) + maps[:, 2, :, 0] == pytest.approx(fixed, rel=1e-3, abs=1e-3)
    points = attractor_points(word, fixed).reshape(2, n, -1).astype(float)
    errors = []
    for i in range(n):
        A, b = maps[:, :2, i, : count[i]].transpose(2, 0, 1).astype(float), maps[:, 2, i, : count[i]].T.astype(float)
        p = np.abs(np.linalg.det(A)) + 0.02
        p /= p.sum()
        assert np.bincount(first[i], minlength=most)[: count[i]] / words == pytest.approx(p, abs=1.01 / words)
        mean = np.linalg.solve(np.eye(2) - np.einsum("k,kij->ij", p, A), p @ b)
        linear = np.einsum("k,kia,kjb->ijab", p, A, A).reshape(4, 4)
        shift = np.einsum("k,ki,kj->ij", p, A @ mean, b)
        second = np.linalg.solve(np.eye(4) - linear, (shift + shift.T + np.einsum("k,ki,kj->ij", p, b, b)).ravel()).reshape(2, 2)
        deviation = np.sqrt(np.diag(second) - mean**2)
        errors.append([*(points[:, i].mean(axis=1) - mean) / deviation, *points[:, i].std(axis=1) / deviation - 1])
    largest = np.abs(errors).max(axis=1)
    assert np.median(largest) < 0.04
    assert np.quantile(largest, 0.9) < 0.1  # in few systems a rare map hardly contracts, and few points tell of it
    assert np.median(errors, axis=0) == pytest.approx(np.zeros(4), abs=0.01)


def test_points_of_sierpinskis_triangle_lie_on_it() -> None:
    corners = np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32)
    maps = np.zeros((2, 3, 1, 3), dtype=np.float32)
    maps[0, 0], maps[1, 1], maps[:, 2, 0] = 0.5, 0.5, corners.T / 2
    word, first = draw_words(Streams(0, range(1)), maps, np.array([3]), 81)
    x, y = attractor_points(word, fixed_point(maps[..., 0]))[:, 0].reshape(2, -1)
    assert np.all((np.floor(x * 2**6).astype(int) & np.floor(y * 2**6).astype(int)) == 0)  # no binary digit of both is 1
    assert len({(a, b) for a, b in zip(np.floor(x * 16), np.floor(y * 16), strict=True)}) == 3**4
    assert np.bincount(first[0]).tolist() == [27, 27, 27]
    assert np.array_equal(np.repeat(first[0], 81), (x >= 0.5) + 2 * (y >= 0.5))  # the part that the outermost map makes


@pytest.mark.parametrize("fill", [0.5, 1.0])
def test_figures_fill_their_images(fill: float) -> None:
    images = draw("fractals", 300, ground="black", fill_min=fill, gamma=0, shades=0)[:, 0]
    extents = []
    for image in images:
        assert len(np.unique(image)) == 2
        assert image.max() >= 0.4 * 255 - 1
        extents += [np.flatnonzero(image.any(axis=axis)) for axis in (0, 1)]
    size = np.array([extent[-1] - extent[0] + 1 for extent in extents])
    assert fill * 28 - 1 <= size.min()
    assert size.max() == 28
    assert size.mean() == pytest.approx((fill + 1) / 2 * 28, abs=1)


def test_figures_stand_out_from_their_grounds() -> None:
    for ground, level in (("black", 0), ("white", 255)):
        images = draw("fractals", 200, 3, 32, ground=ground, gamma=0, shades=0).astype(int)
        assert np.all(np.median(images, axis=(2, 3)) == level)
        apart = np.abs(images - level).max(axis=(2, 3))
        assert apart.max(axis=1).min() >= 0.4 * 255 - 1
        assert apart.min(axis=1).min() < 30  # in one channel only


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coloured_noise", {"exponent_min": -1}, "option exponent_min: expected a number >= 0, got -1"),
        ("coloured_noise", {"exponent_min": 3, "exponent_max": 2}, "option exponent_max: expected a number from exponent_min = 3.0 to 10, got 2"),
        ("coloured_noise", {"stretch": 0.5}, "option stretch: expected a number >= 1"),
        ("coloured_noise", {"mean_min": -0.1}, r"option mean_min: expected a number in \[0, 1\]"),
        ("coloured_noise", {"mean_max": 0.1}, "option mean_max: expected a number from mean_min = 0.2 to 1"),
        ("perlin", {"contrast_min": 0}, "option contrast_min: expected a number > 0"),
        ("perlin", {"contrast_max": 0.01}, "option contrast_max: expected a number >= contrast_min = 0.08"),
        ("perlin", {"colour": 1.5}, r"option colour: expected a number in \[0, 1\]"),
        ("perlin", {"frequency_min": 0}, "option frequency_min: expected a number > 0"),
        ("perlin", {"frequency_max": 0.5}, "option frequency_max: expected a number >= frequency_min = 1.0"),
        ("perlin", {"octaves": 0}, "option octaves: expected an integer >= 1"),
        ("perlin", {"persistence_min": -1}, "option persistence_min: expected a number >= 0"),
        ("perlin", {"persistence_max": 0.1}, "option persistence_max: expected a number >= persistence_min = 0.3"),
        ("perlin", {"turbulence": 2}, "option turbulence: expected"),
        ("perlin", {"threshold": -1}, "option threshold: expected"),
        ("wavelet_marginal", {"shape_min": 0.1}, "option shape_min: expected a number >= 0.2"),
        ("wavelet_marginal", {"shape_max": 0.3}, "option shape_max: expected a number from shape_min = 0.4 to 10"),
        ("wavelet_marginal", {"exponent_min": -0.5}, "option exponent_min: expected a number >= 0"),
        ("wavelet_marginal", {"exponent_max": 11}, "option exponent_max: expected a number from exponent_min = 0.5 to 10"),
        ("fractals", {"maps_min": 1}, "option maps_min: expected an integer >= 2"),
        ("fractals", {"maps_min": 7}, "option maps_max: expected an integer >= maps_min = 7"),
        ("fractals", {"density": 0}, "option density: expected a number > 0"),
        ("fractals", {"fill_min": 0}, "option fill_min: expected"),
        ("fractals", {"gamma": -1}, "option gamma: expected a number >= 0"),
        ("fractals", {"shades": 2}, "option shades: expected"),
        ("fractals", {"contrast_min": 0.6}, r"option contrast_min: expected a number in \[0, 0.5\]"),
        ("fractals", {"ground": "blak"}, "did you mean 'black'"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_generator(name, 1, 28, **options)
    assert "\n" not in str(caught.value)
