"""Noise that floating point can't betray: a Gaussian from a cryptographic stream, rounded exactly to a public grid.

Attacks on floating-point noise use that a sum plus a rounded Gaussian can't take the same values for two datasets (Mironov, CCS 2012), or
that a floating-point sum moves by more than its sensitivity (Casacuberta et al., CCS 2022). Here contributions are integers, so
their sum is exact, and the noise is Z = floor(2^e N + 1/2) with N ~ N(0, 1). For an integer S, S + Z = floor((S + 2^e N) + 1/2): a function
of the output of the ideal Gaussian mechanism, which therefore has the same privacy. docs/privacy.md, "Secure noise", has the whole proof.
"""

import math
from dataclasses import dataclass

import mpmath
import torch
from scipy.special import ndtri_exp
from torch import Tensor

from dpsyngen.errors import InputError
from dpsyngen.privacy.randomness import SecureStream

# No coordinate of a contribution exceeds 2^20 grid units, so float32 adds up to EXACT_ROWS of them exactly.
_EXPONENT = 20
EXACT_ROWS = 2 ** (24 - _EXPONENT)

# The fast path errs by less than SLACK in N wherever |N| <= _TAIL. There ndtri in float64 is wrong by less than 2^-48, the rounding of U
# adds 2^-53 U / phi(N) < 2^-52, and the interval of width 2^-64 in which U is known adds 2^-64 / phi(5) < 2^-44.5.
SLACK = 2.0**-40
_TAIL = 5.0
_BLOCK = 2**17


@dataclass(frozen=True)
class Grid:
    """What sums are counted in: `step` is one unit in the contributions' own units, the noise's deviation is 2^exponent units.

    A contribution that is at most the sensitivity is at most 2^20 units long. A public function of public numbers.
    """

    step: float
    exponent: int

    @classmethod
    def of(cls, noise_multiplier: float, sensitivity: float) -> "Grid":
        """The grid of a Gaussian mechanism with deviation noise_multiplier * sensitivity, which must be positive."""
        exponent = _EXPONENT + min(0, math.frexp(noise_multiplier)[1] - 1)  # 2^exponent / noise_multiplier <= 2^20
        return cls(noise_multiplier * sensitivity * 2.0**-exponent, exponent)


def refuse_inexact_sums(population: int) -> None:
    """Raise InputError if the sum over `population` contributions could reach 2^53 units, where float64 stops being exact."""
    limit = 2 ** (53 - _EXPONENT)
    if population >= limit:
        raise InputError(f"privacy.secure_noise: expected fewer than {limit:,} images, beyond which sums aren't exact, got {population:,}")


def rounded_gaussian(stream: SecureStream, count: int, exponent: int, slack: float = SLACK) -> Tensor:
    """`count` exact draws of floor(2^exponent N + 1/2), N ~ N(0, 1): integers in float64 [count], given random bits.

    Inverse CDF, rounded correctly by Ziv's strategy (ACM TOMS 17(3), 1991): a draw whose neighbourhood of `slack` holds a boundary between
    integers, or that lies in the tails, is decided in multiple precision. So the result doesn't depend on how well ndtri is computed.
    """
    drawn = torch.empty(count, dtype=torch.float64)
    for block in drawn.split(_BLOCK):
        bits = torch.from_numpy(stream.uint64(len(block)).view("<i8"))
        block.copy_(_round_block(bits, stream, exponent, slack))
    return drawn


def _round_block(bits: Tensor, stream: SecureStream, exponent: int, slack: float) -> Tensor:
    """int64 [n] -> float64 [n]. The top bit is the sign; the others are U in (0, 1/2), known up to 2^-64, with Phi(-|N|) = U."""
    tail = bits & (2**63 - 1)
    magnitude = torch.special.ndtri(tail.double() * 2.0**-64).neg_()
    units = magnitude * 2.0**exponent
    rounded = torch.floor(units + 0.5)
    certain = ((units - rounded).abs() <= 0.5 - slack * 2.0**exponent) & (magnitude <= _TAIL)
    for index in torch.nonzero(~certain).flatten().tolist():
        rounded[index] = exact_magnitude(int(tail[index]), stream, exponent)
    return torch.where(bits < 0, -rounded, rounded)


def exact_magnitude(tail: int, stream: SecureStream, exponent: int) -> int:
    """floor(2^exponent |N| + 1/2) where Phi(-|N|) = U and the first 64 bits of U are `tail`; further bits come from the stream as needed."""
    width = 64
    while True:
        largest = None if tail == 0 else _magnitude_at(tail, width, exponent)
        if largest is not None and largest == _magnitude_at(tail + 1, width, exponent):
            return largest
        tail, width = (tail << 64) | stream.more(), width + 64


def _magnitude_at(numerator: int, width: int, exponent: int) -> int:
    """floor(2^exponent x + 1/2) where Phi(-x) = numerator / 2^width, by Newton's method on log Phi in multiple precision."""
    precision = width + 128
    while True:
        with mpmath.workprec(precision):
            log_target = mpmath.log(numerator) - width * mpmath.ln2
            x = mpmath.mpf(-float(ndtri_exp(float(log_target))))
            for _ in range(precision.bit_length() - 3):  # from 2^-40 on each step doubles the correct bits
                below = mpmath.ncdf(-x)
                x += (mpmath.log(below) - log_target) * below / mpmath.npdf(x)
            units = mpmath.ldexp(x, exponent) + mpmath.mpf(0.5)
            if abs(units - mpmath.nint(units)) > mpmath.ldexp(1, -precision // 3):
                return int(mpmath.floor(units))
        precision *= 2  # too close to tell; never equal, since Phi at a boundary is irrational
