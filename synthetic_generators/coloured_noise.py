"""Coloured noise: Gaussian random fields whose amplitude spectrum falls as 1 / f^a.

Natural images have such spectra with a near 1 (Field, "Relations between the statistics of natural images and the response properties of
cortical cells", 1987). Baradad et al., "Learning to See by Looking at Noise" (arXiv 2106.05963, section 3.1, the spectrum model), train
on them with a drawn from [0.5, 3.5] for each image and random phases. Here Fourier coefficients are complex normal: phases are random
too, and so are the amplitudes about the spectrum; and the spectrum may be stretched, where theirs is nearly round.
"""

from dataclasses import dataclass

import numpy as np

from synthetic_generators.random_fields import RandomField
from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams


@register("coloured_noise")
@dataclass(frozen=True)
class ColouredNoise(RandomField):
    """Gaussian noise with a power-law spectrum; it continues over the borders of the image, as on a torus."""

    exponent_min: float = 0.5
    """The smallest a of the amplitude spectrum 1 / f^a; drawn evenly for each image up to `exponent_max`. The power falls as 1 / f^2a."""
    exponent_max: float = 3.5
    """The largest a."""
    stretch: float = 3.0
    """Structures are up to this many times longer than wide, in a random direction: log-uniform in [1, stretch] for each image. The
    spectrum keeps its exponent in every direction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.exponent_min >= 0, "exponent_min", "a number >= 0", self.exponent_min)
        require(
            self.exponent_min <= self.exponent_max <= 10,
            "exponent_max",
            f"a number from exponent_min = {self.exponent_min} to 10",
            self.exponent_max,
        )
        require(self.stretch >= 1, "stretch", "a number >= 1", self.stretch)

    def fields(self, streams: Streams) -> np.ndarray:
        """float32 [n, C, H, W], of mean 0."""
        side = self.image_size
        coefficients = streams.normal("coefficients", (self.channels, side, side // 2 + 1, 2)).view(np.complex64)[..., 0]
        return np.fft.irfft2(coefficients * self._amplitudes(streams)[:, None], s=(side, side))

    def _amplitudes(self, streams: Streams) -> np.ndarray:
        """The factor of each Fourier coefficient: float32 [n, H, W // 2 + 1], 0 at frequency 0."""
        side = self.image_size
        fy = np.fft.fftfreq(side, 1 / side).astype(np.float32)[:, None]  # in cycles per image
        fx = np.fft.rfftfreq(side, 1 / side).astype(np.float32)
        exponent = streams.uniform("exponent", (1, 1), self.exponent_min, self.exponent_max)
        stretch = np.float32(self.stretch) ** streams.uniform("stretch", (1, 1))
        angle = streams.uniform("direction", (1, 1), 0, np.pi)
        along, across = np.cos(angle) * fx + np.sin(angle) * fy, np.cos(angle) * fy - np.sin(angle) * fx
        squared = along**2 * stretch + across**2 / stretch
        squared[:, 0, 0] = 1
        amplitude = np.exp(np.log(squared) * (-exponent / 2))
        # Of columns that are their own conjugates the transform takes the real part alone, half of their power.
        amplitude[:, :, [0, side // 2] if side % 2 == 0 else [0]] *= np.float32(np.sqrt(2))
        amplitude[:, 0, 0] = 0
        return amplitude
