"""Preconditioning, hints, routing, against the formulas and the closed-form denoiser."""

import math

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, RunConfig, StagesConfig
from dpsyngen.denoiser import Denoiser, RoutedDenoiser, build_denoiser
from dpsyngen.loss import Draws, denoising_loss
from dpsyngen.networks import LeanNet

SHAPE = (1, 8, 8)


class Recorder(nn.Module):
    """A backbone that returns zeros and keeps what it was given."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        self.x, self.c_noise, self.labels = x, c_noise, labels
        return torch.zeros(len(x), *SHAPE)


def denoiser(backbone: nn.Module, parameterisation: str = "edm", hinted: bool = False) -> Denoiser:
    return Denoiser(backbone, SHAPE, 10, parameterisation=parameterisation, sigma_data=0.5, hinted=hinted)  # type: ignore[arg-type]


@pytest.mark.parametrize("parameterisation", ["edm", "v"])
def test_input_and_target_have_unit_variance(parameterisation: str) -> None:
    """What EDM's coefficients are for (Karras et al., appendix B.6), for data of deviation sigma_data (1 for v)."""
    torch.manual_seed(0)
    data = 0.5 if parameterisation == "edm" else 1.0
    x0, noise = data * torch.randn(200_000), torch.randn(200_000)
    net = denoiser(Recorder(), parameterisation)
    for sigma in (0.01, 0.5, 20.0):
        c_skip, c_out, c_in = (c.item() for c in net.coefficients(torch.tensor(sigma)))
        x = x0 + sigma * noise
        assert (c_in * x).std().item() == pytest.approx(1, rel=0.01)
        assert ((x0 - c_skip * x) / c_out).std().item() == pytest.approx(1, rel=0.01)


def test_v_prediction_is_salimans_and_ho() -> None:
    """In variance-preserving terms x0 = alpha z - s v with z = alpha x; the network's output stands for -v."""
    sigma = torch.tensor(0.7)
    c_skip, c_out, c_in = denoiser(Recorder(), "v").coefficients(sigma)
    alpha, s = 1 / math.sqrt(1 + 0.49), 0.7 / math.sqrt(1 + 0.49)
    x0, noise = torch.randn(5), torch.randn(5)
    x = x0 + sigma * noise
    v = alpha * noise - s * x0
    torch.testing.assert_close(c_skip * x - c_out * v, x0)
    assert c_in == pytest.approx(alpha)


def test_hint_is_the_centre_and_an_input_channel() -> None:
    backbone = Recorder()
    net = denoiser(backbone, hinted=True)
    means = torch.rand(10, *SHAPE) * 2 - 1
    net.set_class_means(means)
    x, sigma, labels = torch.randn(3, *SHAPE), torch.tensor([0.1, 1.0, 1e4]), torch.tensor([0, 4, 10])
    out = net(x, sigma, labels)
    m = torch.stack([means[0], means[4], means.mean(dim=0)])
    c_skip, _, c_in = net.coefficients(sigma[:, None, None, None])
    torch.testing.assert_close(backbone.x, torch.cat([c_in * (x - m), m], dim=1))
    torch.testing.assert_close(out, m + c_skip * (x - m))
    torch.testing.assert_close(out[2], means.mean(dim=0), atol=1e-5, rtol=0)  # pure noise: the hint is the best guess


def test_loss_of_the_trivial_denoiser_is_one_per_image() -> None:
    """With F = 0 on Gaussian data of deviation sigma_data the weighted loss is 1 at every sigma, and each row has its own."""
    torch.manual_seed(0)
    net, n = denoiser(Recorder()), 2000
    for sigma in (0.05, 1.0, 30.0):
        x = 0.5 * torch.randn(n, *SHAPE)
        losses = denoising_loss(net, x, Draws(torch.full((n,), sigma), torch.randn(n, *SHAPE), torch.zeros(n, dtype=torch.int64)))
        assert losses.shape == (n,)
        assert losses.mean().item() == pytest.approx(1, rel=0.03)


def routed_config() -> RunConfig:
    return RunConfig(data=DataConfig(image_size=8), network=NetworkConfig(width=8), hints=HintsConfig(kind="none"),
                     stages=StagesConfig(variant="coarse_cleaning", holder="routed"))


def test_routing_switches_by_sigma() -> None:
    net = build_denoiser(routed_config()).eval()
    assert isinstance(net, RoutedDenoiser)
    for expert in net.experts.values():
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.1)
    x, labels = torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.int64)
    sigma = torch.exp(torch.tensor([-4.0, -2.9, 1.9, 2.1]))
    by_name = {stage.name: net.expert(stage.name) for stage in routed_config().stages.stages}
    out = net(x, sigma, labels)
    for row, name in enumerate(["cleaning", "context", "context", "coarse"]):
        torch.testing.assert_close(out[row], by_name[name](x, sigma, labels)[row])


def test_same_seed_same_weights() -> None:
    first, second = build_denoiser(routed_config()), build_denoiser(routed_config())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("width", range(8, 105, 8))
@pytest.mark.parametrize("image_size", [8, 28])
def test_lean_network_of_every_legal_width(width: int, image_size: int) -> None:
    net = LeanNet(in_channels=2, out_channels=1, image_size=image_size, num_labels=3, width=width, depth=1)
    assert net(torch.zeros(2, 2, image_size, image_size), torch.zeros(2), torch.zeros(2, dtype=torch.int64)).shape == (2, 1, image_size, image_size)
