"""Per-example gradients against brute force: a loop over examples with plain autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.errors import InputError
from dpsyngen.networks import LeanNet, UNet
from dpsyngen.privacy import layer_gradients
from dpsyngen.privacy.per_example import recording


def brute_force(module: nn.Module, rows: Tensor, copies: int, loss: "Loss") -> list[dict[str, Tensor]]:
    found = []
    for start in range(0, len(rows), copies):
        module.zero_grad()
        loss(module, rows[start : start + copies], start).mean().backward()
        found.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()})
    module.zero_grad(set_to_none=True)
    return found


class Loss:
    """A loss per row that gives every output its own weight."""

    def __init__(self, extra: tuple[Tensor, ...] = ()) -> None:
        self.extra = extra

    def __call__(self, module: nn.Module, rows: Tensor, start: int = 0) -> Tensor:
        out = module(rows, *(e[start : start + len(rows)] for e in self.extra))
        weights = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view_as(out[0])
        return ((out * weights).flatten(1).sum(dim=1) + out.flatten(1).square().sum(dim=1)) / out[0].numel()


def compare(module: nn.Module, rows: Tensor, copies: int, loss: Loss) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    expected = brute_force(module, rows, copies, loss)
    with recording(module, len(expected), copies) as record:
        loss(module, rows).view(-1, copies).mean(dim=1).sum().backward()
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    norms = record.norms()
    for index, gradients in enumerate(expected):
        whole = torch.cat([gradients[name].flatten() for name in sorted(gradients)])
        ours = torch.cat([record.tensor(name)[index].flatten() for name in sorted(gradients)])
        assert (ours - whole).norm() <= 1e-5 * whole.norm()
        assert norms[index].item() == pytest.approx(whole.norm().item(), rel=1e-5)


LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 7, 7)),
    "conv stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 8, 7)),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 6)),
    "conv 1x1 without bias": (lambda: nn.Conv2d(3, 5, 1, bias=False), (3, 5, 5)),
    "conv dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=(2, 1)), (2, 8, 9)),
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear over tokens": (lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8)), (3, 4, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), (3, 5)),
}


@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, copies: int) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    compare(build(), torch.randn(4 * copies, *shape), copies, Loss())


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
@pytest.mark.parametrize("way", [layer_gradients._conv2d_by_patches, layer_gradients._conv2d_by_kernel, layer_gradients._conv2d_by_lines])
def test_convolution_by_each_way(way: Callable[[nn.Conv2d, Tensor, Tensor, int], Tensor], name: str, copies: int) -> None:
    """Which way is taken depends on sizes, device and precision, so each is compared by itself; patches also in several blocks."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(4 * copies, *shape)
    if way is layer_gradients._conv2d_by_lines and (layer.stride != (1, 1) or layer.groups > 1):
        pytest.skip("not for strides and groups")
    y = layer(x)
    g = torch.randn_like(y)
    ours = way(layer, x, g, 4)
    for index in range(4):
        rows = slice(index * copies, (index + 1) * copies)
        (expected,) = torch.autograd.grad(y[rows], layer.weight, g[rows], retain_graph=True)
        assert (ours[index] - expected).norm() <= 1e-5 * expected.norm()


def test_patches_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, g = nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(14, 4, 6, 6), torch.randn(14, 6, 6, 6)
    whole = layer_gradients._conv2d_by_patches(layer, x, g, 7)
    monkeypatch.setattr(layer_gradients, "_CACHED_PATCHES", 2 * whole.shape[0])  # less than one example's, so one at a time
    torch.testing.assert_close(layer_gradients._conv2d_by_patches(layer, x, g, 7), whole)
    monkeypatch.setattr(layer_gradients, "_CACHED_PATCHES", 3 * 2 * 36 * 36)  # 3 at a time: 7 don't divide
    torch.testing.assert_close(layer_gradients._conv2d_by_patches(layer, x, g, 7), whole)


@pytest.mark.parametrize("copies", [1, 3, 8])
def test_bf16_backbone_is_the_float32_one_to_its_precision(copies: int) -> None:
    """Mixed precision, with every way a convolution can go at these sizes."""
    torch.manual_seed(0)
    net = LeanNet(in_channels=1, out_channels=1, image_size=8, num_labels=4, width=16, depth=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, rest = torch.randn(3 * copies, 1, 8, 8), (torch.randn(3 * copies), torch.randint(0, 4, (3 * copies,)))
    records = []
    for enabled in (False, True):
        with recording(net, 3, copies) as record:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses = Loss(rest)(net, x).float().view(-1, copies).mean(dim=1)
            losses.sum().backward()
        records.append(torch.cat([record.tensor(name).float().flatten(start_dim=1) for name in sorted(record.gradients)], dim=1))
    exact, rounded = records
    assert ((rounded - exact).norm(dim=1) <= 0.05 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("copies", [1, 3])
def test_embedding_twice_in_one_row(copies: int) -> None:
    compare(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.randint(0, 5, (4 * copies, 6)), copies, Loss())


def test_layer_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    compare(Twice(), torch.randn(6, 4), 2, Loss())


@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize("backbone", [LeanNet, UNet])
def test_backbone(backbone: type[nn.Module], copies: int) -> None:
    torch.manual_seed(0)
    net = backbone(in_channels=2, out_channels=1, image_size=8, num_labels=4, width=8, depth=1)
    rows = 2 * copies
    loss = Loss((torch.randn(rows), torch.randint(0, 4, (rows,))))
    compare(net, torch.randn(rows, 2, 8, 8), copies, loss)


def test_unknown_layer_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    with pytest.raises(InputError, match="layer '1' of type PReLU"), recording(net, 1, 1):
        pass


def test_tied_parameter_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    with pytest.raises(InputError, match=r"1\.weight is the same parameter as 0\.weight"), recording(net, 1, 1):
        pass


def test_layer_on_something_shared_by_the_batch_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(5))

    net = Positions()
    with pytest.raises(InputError, match="can't tell the examples apart"), recording(net, 2, 2):
        net(torch.zeros(4, 5, 3))


def test_bf16_is_near_float32() -> None:
    torch.manual_seed(0)
    net = LeanNet(in_channels=1, out_channels=1, image_size=8, num_labels=2, width=8, depth=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    rows, loss = torch.randn(4, 1, 8, 8), Loss((torch.randn(4), torch.zeros(4, dtype=torch.int64)))
    sums = []
    for enabled in (False, True):
        with recording(net, 2, 2) as record:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses = loss(net, rows).view(2, 2).mean(dim=1)
            losses.sum().backward()
        sums.append(torch.cat([g.flatten() for g in record.clipped_sum(1.0).values()]))
        assert sums[-1].dtype == torch.float32
    assert (sums[0] - sums[1]).norm() < 0.05 * sums[0].norm()
