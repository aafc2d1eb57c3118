"""Distances between sets of features: Fréchet distance, precision and recall."""

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features [N, F] and [M, F], N and M at least 2.

    |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)) (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500,
    equation 6), with unbiased covariances, all in float64. The last trace is the sum of the singular values of
    C_a^(1/2) C_b^(1/2), which, unlike a matrix square root of C_a C_b, is real and accurate for singular covariances, too.
    It is biased upwards for few images: compare only values of equally many.
    """
    mean_a, root_a, trace_a = _moments(features_a)
    mean_b, root_b, trace_b = _moments(features_b)
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + trace_a + trace_b - 2 * overlap).item())


def _moments(features: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [F], the symmetric square root [F, F] of the covariance, and the covariance's trace."""
    x = torch.from_numpy(features.astype(np.float64))
    covariance = x.T.cov().reshape(x.shape[1], x.shape[1])
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    return x.mean(0), root, covariance.trace()


def precision_recall(real: np.ndarray, synthetic: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equation 1 and algorithm 1).

    Precision is the fraction of synthetic features that lie in the real manifold, recall the fraction of real features that lie
    in the synthetic one. A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest
    neighbour in the set.

    Args:
        real: [N, F], N > neighbours.
        synthetic: [M, F], M > neighbours; take as many as there are real ones.
        neighbours: k.
    """
    points = [torch.from_numpy(features.astype(np.float64)) for features in (real, synthetic)]
    # The nearest point of a set to a point of the set is the point itself, hence k + 1.
    radii = [torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values for x in points]
    across = torch.cdist(points[0], points[1])
    precision = (across <= radii[0][:, None]).any(dim=0)
    recall = (across <= radii[1][None, :]).any(dim=1)
    return precision.double().mean().item(), recall.double().mean().item()
