"""Versions of figures: their deformations leave what they should, their tones and patterns are what they say."""

from typing import Any

import numpy as np
import pytest

from synthetic_generators import make_generator
from synthetic_generators.streams import Streams

STILL: dict[str, Any] = {"affine": 0.0, "slant": 0.0, "shift": 0.0, "bend": 0.0, "thickness": 0.0}


def draw(n: int, channels: int = 1, **options: Any) -> np.ndarray:
    return make_generator("variations", channels, 28, **options).generate(Streams(3, range(n)))


def test_versions_that_differ_in_nothing_are_their_figure() -> None:
    versions = draw(64, copies=16, **STILL).reshape(4, 16, 28, 28)
    assert np.all(versions == versions[:, :1])
    assert len(np.unique(versions[:, 0], axis=0)) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tone_is_one_power_of_all_levels_of_a_version(channels: int) -> None:
    options: dict[str, Any] = STILL | {"family": "smooth_shapes", "copies": 200, "smooth_shapes.ground": "gradient", "smooth_shapes.shapes": 3}
    figure = draw(1, channels, **options)[0] / 255
    versions = draw(200, channels, tone=0.4, **options) / 255
    middle = (figure > 0.2) & (figure < 0.8)
    gamma = np.median(np.log(versions[:, middle]) / np.log(figure[middle]), axis=1)
    assert np.abs(versions - figure ** gamma[:, None, None, None]).max() < 2 / 255
    log_gamma = np.log(gamma)
    assert log_gamma.std() == pytest.approx(0.4, rel=0.2)
    assert log_gamma.mean() == pytest.approx(0, abs=0.1)
    assert np.all(draw(200, channels, tone=1, **(options | {"smooth_shapes.ground": "black"}))[:, :, 0, 0] == 0)


def test_patterns_darken_half_of_the_versions_by_at_most_what_they_may() -> None:
    options: dict[str, Any] = STILL | {"family": "smooth_shapes", "copies": 400, "smooth_shapes.ground": "white", "smooth_shapes.shapes": 1}
    figure = draw(1, **options)[0].astype(float)
    versions = draw(400, pattern=0.6, **options).astype(float)
    share = versions / figure.clip(1)
    assert np.mean(np.all(versions == figure, axis=(1, 2, 3))) == pytest.approx(0.5, abs=0.08)
    assert share[:, figure > 100].min() == pytest.approx(0.4, abs=0.03)
    assert np.all(versions <= figure)
    patterned = share[:, 0, :4].std(axis=(1, 2)) > 0.01  # of the ground, which has no structure of its own
    spectra = np.abs(np.fft.fft2(share[patterned, 0] - share[patterned, 0].mean(axis=(1, 2), keepdims=True))) ** 2
    strongest = np.sort(spectra.reshape(len(spectra), -1), axis=1)[:, -16:].sum(axis=1) / spectra.sum(axis=(1, 2))
    assert np.mean(strongest > 0.5) == pytest.approx(2 / 3, abs=0.15)  # stripes and checks are few waves, grains are all of them


@pytest.mark.parametrize(("options", "message"), [
    ({"tone": -1}, r"option tone: expected a number in \[0, 2\], got -1"),
    ({"pattern": 1.5}, r"option pattern: expected a number in \[0, 1\], got 1.5"),
])  # fmt: skip
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator("variations", 1, 28, **options)
