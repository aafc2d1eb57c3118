"""Scattering features of images: moduli of wavelet coefficients, twice over, blurred and sampled. Nothing in them is learnt.

Bruna and Mallat, "Invariant Scattering Convolution Networks" (arXiv 1203.1513). Linear classifiers on them are the strongest known under
differential privacy without public images (Tramer and Boneh, "Differentially Private Learning Needs Better Features", arXiv 2011.11660).
Wavelets and scales are those of Kymatio with J = 2 scales and L = 8 angles.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ANGLES = 8
COEFFICIENTS = 1 + 2 * ANGLES + ANGLES**2
"""Numbers for each place of each channel: the blurred image, both scales at every angle, and the coarse scale of the fine one's moduli."""
_SCALES, _LARGEST_GRID = 2, 8
_SMALLEST_SQUARE = 1e-12  # of a modulus, whose slope is infinite at 0
_PERIODS = range(-2, 3)


def num_features(image_shape: tuple[int, int, int]) -> int:
    """How many features `scattering` gives for images of shape (C, H, W), H = W."""
    channels, size, _ = image_shape
    return channels * COEFFICIENTS * min(_LARGEST_GRID, _padded(size) // 2**_SCALES) ** 2


def scattering(images: Tensor) -> Tensor:
    """Features float32 [N, F] of norm 1 of images float32 [N, C, H, W] in [-1, 1], H = W, each a function of its image alone.

    Coefficients that one wavelet's moduli gave have mean 0 and variance 1 over the image, so that its contrast hardly counts.
    """
    count, channels, size, _ = images.shape
    if count == 0:
        return torch.zeros(0, num_features((channels, size, size)), device=images.device)  # which an FFT refuses
    side = _padded(size)
    before = (side - size) // 2
    padded = functional.pad((images.float() + 1) / 2, (before, side - size - before) * 2, mode="reflect").flatten(end_dim=1)[:, None]
    fine, coarse, blur, blur_of_half = (filters.to(images.device) for filters in _filters(side))
    spectrum = torch.fft.fft2(padded)
    first = _moduli(spectrum, fine, 1)
    found = [
        _blurred(padded, blur),
        _blurred(first, blur),
        _blurred(_moduli(spectrum, coarse, 2), blur_of_half),
        *(_blurred(_moduli(torch.fft.fft2(of_angle[:, None]), coarse, 2), blur_of_half) for of_angle in first.unbind(dim=1)),
    ]
    return functional.normalize(torch.cat([_standardised(part) for part in found], dim=1).reshape(count, -1), dim=1)


def _padded(size: int) -> int:
    """The side of images that are mirrored at their borders by two pixels at least, a multiple of 8."""
    return 8 * math.ceil((size + 4) / 8)


def _standardised(part: Tensor) -> Tensor:
    """Coefficients [N, c, g, g] of one kind on a grid of at most 8 x 8 places, with mean 0 and variance 1 over each image's."""
    part = functional.adaptive_avg_pool2d(part, _LARGEST_GRID) if part.shape[-1] > _LARGEST_GRID else part
    return functional.layer_norm(part, part.shape[1:])


def _moduli(spectra: Tensor, wavelets: Tensor, every: int) -> Tensor:
    """The moduli of each `every`-th wavelet coefficient of images with spectra complex64 [N, 1, n, n]: [N, 8, n / every, n / every]."""
    spectra = torch.view_as_real(spectra)  # a product of real with complex numbers would take the real ones for complex
    kept = wavelets.shape[-2] // every
    total = torch.zeros(len(spectra), len(wavelets), kept, kept, 2, device=spectra.device)
    for rows in range(every):
        for columns in range(every):  # sampling lays these parts of a spectrum on top of one another
            part = (..., slice(rows * kept, (rows + 1) * kept), slice(columns * kept, (columns + 1) * kept), slice(None))
            total.addcmul_(spectra[part], wavelets[part])
    squares = torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(total))).square()
    return (squares[..., 0] + squares[..., 1]).add_(_SMALLEST_SQUARE).sqrt_()  # a fifth of the time of abs, which guards against overflow


def _blurred(images: Tensor, blur: Tensor) -> Tensor:
    """Images float32 [..., n, n] under a Gaussian that is `blur` float32 [g, n] along either axis: [..., g, g]."""
    return blur @ images @ blur.T


@functools.lru_cache(maxsize=8)
def _filters(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For images of `side` pixels: spectra of fine and coarse wavelets, real, each value twice, float32 [8, n, n, 2], those of the coarse ones a
    quarter of what they are, as sampling has it; the blur that leaves every fourth pixel [n / 4, n], and that for every second of half as many."""
    fine, coarse = (torch.from_numpy(np.stack([_morlet(side, scale, angle) for angle in range(ANGLES)])) for scale in range(_SCALES))
    along = _gabor(side, 0.8 * 2 ** (_SCALES - 1), 0.0, 0.0, 1.0).real.sum(axis=0)  # a Gaussian in the plane is the product of two along its axes
    distances = np.arange(side)[None, :] - np.arange(0, side, 2**_SCALES)[:, None]
    blur = torch.from_numpy(along[distances % side] / along.sum()).float()
    return _twice(fine), _twice(coarse / 4), blur, 2 * blur[:, ::2]


def _twice(spectra: Tensor) -> Tensor:
    """Each value for a real and an imaginary part."""
    return spectra[..., None].expand(*spectra.shape, 2).contiguous()


def _morlet(side: int, scale: int, angle: int) -> np.ndarray:
    """The spectrum of a Morlet wavelet: a plane wave in a Gaussian window, less as much of the window as makes its mean 0."""
    direction, frequency, slant = (ANGLES // 2 - 1 - angle) * math.pi / ANGLES, 0.75 * math.pi / 2**scale, 4 / ANGLES
    wave, window = (_gabor(side, 0.8 * 2**scale, direction, xi, slant) for xi in (frequency, 0.0))
    return _spectrum(wave - wave.sum() / window.sum() * window)


def _gabor(side: int, deviation: float, direction: float, frequency: float, slant: float) -> np.ndarray:
    """A Gaussian window times a plane wave, complex [n, n], periodic: `deviation` along the wave, divided by `slant` across it."""
    cos, sin = math.cos(direction), math.sin(direction)
    total = np.zeros((side, side), dtype=complex)
    for row in _PERIODS:
        for column in _PERIODS:
            y, x = np.mgrid[row * side : (row + 1) * side, column * side : (column + 1) * side]
            along, across = cos * y + sin * x, (cos * x - sin * y) * slant
            total += np.exp(-(along**2 + across**2) / (2 * deviation**2) + 1j * frequency * along)
    return total * slant / (2 * math.pi * deviation**2)


def _spectrum(image: np.ndarray) -> np.ndarray:
    return np.fft.fft2(image).real.astype(np.float32)
