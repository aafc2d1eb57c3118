"""Denoisers in closed form: the Bayes-optimal ones of Gaussians."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, S) over d pixels. S has variance `variances_j` along the orthonormal column `directions_j`, and `rest` across all of them."""

    mean: np.ndarray
    """float64 [d]."""
    variances: np.ndarray
    """float64 [r], r <= d."""
    directions: np.ndarray
    """float64 [d, r]."""
    rest: float = 0.0

    @classmethod
    def fit(cls, rows: np.ndarray) -> "Gaussian":
        """The mean and the full covariance of rows [n, d], divided by n; of rank n - 1 at most."""
        mean = rows.mean(axis=0, dtype=np.float64)
        centred = rows - mean
        n, d = rows.shape
        if d <= n:
            variances, directions = np.linalg.eigh(centred.T @ centred / n)
        else:  # the Gram matrix has the same spectrum, and is the smaller one
            variances, left = np.linalg.eigh(centred @ centred.T / n)
            kept = variances > 1e-10 * variances[-1]
            variances, directions = variances[kept], centred.T @ (left[:, kept] / np.sqrt(n * variances[kept]))
        return cls(mean, np.maximum(variances, 0.0), directions)

    @classmethod
    def fit_scalar(cls, rows: np.ndarray) -> "Gaussian":
        """The mean of rows [n, d], and in every direction the mean variance of a pixel."""
        return cls(rows.mean(axis=0, dtype=np.float64), np.zeros(0), np.zeros((rows.shape[1], 0)), float(rows.var(axis=0, dtype=np.float64).mean()))

    def denoise(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """E[x0 | x] = mean + S (S + sigma^2)^-1 (x - mean) for x [n, d] = x0 + sigma n, where x0 is from this Gaussian."""
        gains, gain = self._gains(sigma)
        along = (x - self.mean) @ self.directions
        return self.mean + along @ ((gains - gain)[:, None] * self.directions.T) + gain * (x - self.mean)

    def own_error(self, sigma: float) -> float:
        """The mean squared error per pixel on data with this mean and covariance, Gaussian or not: sigma^2 tr(S (S + sigma^2)^-1) / d."""
        gains, gain = self._gains(sigma)
        return float(sigma**2 * (gains.sum() + gain * (len(self.mean) - len(gains))) / len(self.mean))

    def errors_on(self, rows: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        """The mean squared error per pixel on images rows [n, d] at each sigma [m], in exact expectation over the noise; float64 [m].

        With A = S (S + sigma^2)^-1: |(1 - A)(x0 - mean)|^2 + sigma^2 tr(A^2), where the mean square along each direction is all that counts.
        """
        centred = rows - self.mean
        along = np.mean((centred @ self.directions) ** 2, axis=0)
        across = max(float(np.mean(np.sum(centred**2, axis=1)) - along.sum()), 0.0)
        others = len(self.mean) - len(along)

        def error(sigma: float) -> float:
            gains, gain = self._gains(sigma)
            bias = ((1 - gains) ** 2 * along).sum() + (1 - gain) ** 2 * across
            return float(bias + sigma**2 * ((gains**2).sum() + gain**2 * others)) / len(self.mean)

        return np.array([error(float(sigma)) for sigma in sigmas])

    def _gains(self, sigma: float) -> tuple[np.ndarray, float]:
        """The eigenvalues of S (S + sigma^2)^-1: along the directions, and across them."""
        return self.variances / (self.variances + sigma**2), self.rest / (self.rest + sigma**2)
