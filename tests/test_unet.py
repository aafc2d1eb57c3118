"""The U-Net backbone: size, shapes, what per-example gradients need of it."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.networks.unet import UNet

SUPPORTED = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_unet(image_size: int = 12, **changes: int) -> UNet:
    """A tiny network with random weights everywhere, since fresh ones end in zeros."""
    torch.manual_seed(0)
    net = UNet(**{"in_channels": 2, "out_channels": 1, "image_size": image_size, "num_labels": 4, "width": 8, "depth": 1, **changes})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(n: int, image_size: int = 12, channels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, image_size, image_size, generator=generator)
    return x, torch.randn(n, generator=generator), torch.arange(n) % 4


def parameters_of(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_default_size_is_dpdms():
    net = UNet(in_channels=1, out_channels=1, image_size=28, num_labels=11)
    assert parameters_of(net) == pytest.approx(1.75e6, rel=0.1)
    colour = UNet(in_channels=3, out_channels=3, image_size=64, num_labels=1)
    assert parameters_of(colour) == pytest.approx(1.80e6, rel=0.1)


@pytest.mark.parametrize(("image_size", "in_channels", "out_channels"), [(28, 1, 1), (28, 2, 1), (32, 6, 3), (64, 3, 3), (12, 1, 1), (68, 1, 1)])
def test_shapes(image_size: int, in_channels: int, out_channels: int):
    net = small_unet(image_size, in_channels=in_channels, out_channels=out_channels)
    out = net(*inputs(2, image_size, in_channels))
    assert out.shape == (2, out_channels, image_size, image_size)
    assert out.dtype == torch.float32 and out.isfinite().all() and out.std() > 0


@pytest.mark.parametrize("width", range(8, 137, 8))
def test_every_allowed_width_builds(width: int):
    with torch.device("meta"):
        UNet(in_channels=1, out_channels=1, image_size=28, num_labels=2, width=width, depth=1)


def test_depth_and_width_add_parameters():
    sizes = [parameters_of(small_unet(width=width, depth=depth)) for width, depth in [(8, 1), (8, 2), (16, 2)]]
    assert sizes == sorted(set(sizes))


def test_starts_at_zero_and_learns():
    net = UNet(in_channels=1, out_channels=1, image_size=12, num_labels=4, width=8, depth=1)
    x, c_noise, labels = inputs(2, channels=1)
    assert (net(x, c_noise, labels) == 0).all()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (net(x, c_noise, labels) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_depends_on_every_input():
    net = small_unet()
    x, c_noise, labels = inputs(2)
    base = net(x, c_noise, labels)
    for changed in [(x + 0.1, c_noise, labels), (x, c_noise + 0.1, labels), (x, c_noise, (labels + 1) % 4)]:
        assert (net(*changed) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_no_layer_mixes_examples():
    net = small_unet().double()
    x, c_noise, labels = inputs(5)
    x, c_noise = x.double().requires_grad_(), c_noise.double()
    out = net(x, c_noise, labels)
    alone = torch.cat([net(x[i : i + 1], c_noise[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(out[2].square().sum(), x)
    assert (gradient[[0, 1, 3, 4]] == 0).all() and (gradient[2] != 0).any()


def test_every_parameter_is_in_a_supported_layer_that_is_called_once():
    net = small_unet()
    calls: Counter[str] = Counter()
    owners = {name: module for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None}
    for name, module in owners.items():
        assert isinstance(module, SUPPORTED), f"{name} is a {type(module).__name__}"
        module.register_forward_hook(lambda _module, args, _out, name=name: calls.update({name: 1 + 10 * (len(args[0]) != 3)}))
    net(*inputs(3))
    assert calls == dict.fromkeys(owners, 1)  # each once, with the batch as first dimension
    assert sum(parameters_of(module) for module in owners.values()) == parameters_of(net)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def test_runs_under_bf16_autocast():
    net = small_unet()
    exact = net(*inputs(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(*inputs(2))
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02
