"""How far apart two data distributions are once both are noised: bounds from a coupling, and from below.

Let p and q be distributions of images, p_s = p * N(0, s^2) and q_s likewise, and (x, y) any coupling of p and q. Then p_s and q_s are mixtures of
N(x, s^2) and N(y, s^2) with the same weights, and as KL and TV are jointly convex,

    KL(p_s || q_s) <= E KL(N(x, s^2) || N(y, s^2)) = E |x - y|^2 / (2 s^2),  the least for an optimal coupling: W2(p, q)^2 / (2 s^2);
    TV(p_s, q_s)   <= E TV(N(x, s^2), N(y, s^2))   = E [2 Phi(|x - y| / (2 s)) - 1].

Both vanish as s grows, whatever p and q are, which is what Theorem 1 of Choi et al. (arXiv 2412.09842) says, here with a rate. Couplings are of two
sets of n images, so the bounds hold for the sets; and, by the same convexity, in expectation over the sets for the distributions they come from.
"""

import numpy as np
from scipy.linalg import svdvals
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import erf, ndtr

from dpsyngen.stages.gaussian import Gaussian

_HALF_SPACES = 512


def coupled_distances(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """|x - y| of the pairs of an optimal assignment (for the squared distance) of rows [n, d] to rows [n, d]; float64 [n].

    The root of their mean square is W2 of the two sets, and in expectation at least W2 of what they were drawn from.
    """
    squares = cdist(p, q, "sqeuclidean")
    return np.sqrt(squares[linear_sum_assignment(squares)])


def wasserstein(distances: np.ndarray) -> float:
    """W2 from the distances of an optimal coupling [n]."""
    return float(np.sqrt(np.mean(distances**2)))


def gelbrich(p: Gaussian, q: Gaussian) -> float:
    """W2 of two Gaussians without `rest`, which no two distributions with these means and covariances fall below (Gelbrich 1990).

    |m_p - m_q|^2 + tr(S_p + S_q - 2 (S_p^1/2 S_q S_p^1/2)^1/2), where the last trace is the sum of the singular values of S_p^1/2 S_q^1/2.
    """
    roots = np.sqrt(p.variances)[:, None] * (p.directions.T @ q.directions) * np.sqrt(q.variances)
    overlap = float(svdvals(roots).sum()) if roots.size else 0.0
    square = float(np.sum((p.mean - q.mean) ** 2)) + float(p.variances.sum() + q.variances.sum()) - 2 * overlap
    return float(np.sqrt(max(square, 0.0)))


def kl_upper(distances: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The bound on KL(p_s || q_s), in nats, for each sigma [m], from the distances of a coupling [n]; float64 [m]."""
    return np.mean(distances**2) / (2 * sigmas**2)


def tv_upper(distances: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The bound on TV(p_s, q_s) for each sigma [m], from the distances of a coupling [n]; float64 [m]. 2 Phi(z) - 1 = erf(z / sqrt 2)."""
    return erf(distances[None, :] / (2 * np.sqrt(2) * sigmas[:, None])).mean(axis=1)


def tv_lower(p: np.ndarray, q: np.ndarray, direction: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """From below: the largest difference of p_s and q_s over half-spaces across `direction` [d], for rows [n, d] each and sigma [m]; float64 [m].

    TV is the largest difference over all events, so some of them give a lower bound. It is that of the two sets of images, whatever the direction.
    """
    norm = np.linalg.norm(direction)
    if norm == 0:
        return np.zeros(len(sigmas))
    a, b = p @ (direction / norm), q @ (direction / norm)
    low, high = min(a.min(), b.min()), max(a.max(), b.max())

    def difference(sigma: float) -> float:
        borders = np.linspace(low - 2 * sigma, high + 2 * sigma, _HALF_SPACES)[:, None]
        return float(np.abs(ndtr((borders - a) / sigma).mean(axis=1) - ndtr((borders - b) / sigma).mean(axis=1)).max())

    return np.array([difference(float(sigma)) for sigma in sigmas])
