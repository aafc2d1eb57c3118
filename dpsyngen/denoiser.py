"""From a backbone to a denoiser: preconditioning, class hints, routing by stage."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dpsyngen.config import RunConfig, StageConfig
from dpsyngen.errors import InputError
from dpsyngen.networks import build_backbone


class Denoiser(nn.Module):
    """D(x; sigma, y) = m + c_skip (x - m) + c_out F(c_in (x - m), m, c_noise, y), with the hint m of class y (0 without hints).

    The coefficients are EDM's (Karras et al., arXiv 2206.00364, Table 1) or those of v-prediction (Salimans and Ho,
    arXiv 2202.00512), written for x = x0 + sigma n. The hint is E[x0 | y] as far as it is known, which is the best denoiser
    as sigma grows; the network starts from there.
    """

    class_means: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        image_shape: tuple[int, int, int],
        num_labels: int,
        *,
        parameterisation: Literal["edm", "v"],
        sigma_data: float,
        hinted: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.parameterisation = parameterisation
        self.sigma_data = sigma_data
        self.hinted = hinted
        self.null_label = num_labels - 1
        self.register_buffer("class_means", torch.zeros(num_labels if hinted else 0, *image_shape))

    def set_class_means(self, means: Tensor) -> None:
        """Take over DP class means, float32 [num_classes, C, H, W] in [-1, 1]; the null label's hint is their mean."""
        self.class_means.copy_(torch.cat([means, means.mean(dim=0, keepdim=True)]))

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in for float32 sigma of any shape."""
        data = self.sigma_data if self.parameterisation == "edm" else 1.0
        total = torch.sqrt(sigma**2 + data**2)
        return data**2 / total**2, sigma * data / total, 1 / total

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor, hint: Tensor | None = None) -> Tensor:
        """Estimate x0: x float32 [N, C, H, W], sigma float32 [N] > 0, labels int64 [N] -> float32 [N, C, H, W].

        `hint` float32 [N, C, H, W] replaces the class means, which programmatic images don't have.
        """
        c_skip, c_out, c_in = self.coefficients(sigma[:, None, None, None])
        c_noise = torch.log(sigma) / 4
        if not self.hinted:
            return c_skip * x + c_out * self.backbone(c_in * x, c_noise, labels).float()
        m = self.class_means[labels] if hint is None else hint
        inputs = torch.cat([c_in * (x - m), m], dim=1)
        return m + c_skip * (x - m) + c_out * self.backbone(inputs, c_noise, labels).float()


class RoutedDenoiser(nn.Module):
    """One denoiser per stage; each row goes to the one whose range holds its ln sigma (Choi et al., section 4.3).

    Raises InputError for a stage whose name means something to torch's ModuleDict.
    """

    def __init__(self, stages: Sequence[StageConfig], denoisers: Sequence[Denoiser]) -> None:
        super().__init__()
        for stage in stages:
            if hasattr(nn.ModuleDict(), stage.name):
                raise InputError(f"stages.custom: expected a stage name that torch doesn't use itself, got {stage.name}")
        self.stages = tuple(stages)
        self.experts = nn.ModuleDict({stage.name: denoiser for stage, denoiser in zip(stages, denoisers, strict=True)})
        self.null_label = denoisers[0].null_label
        self.hinted = denoisers[0].hinted

    def expert(self, name: str) -> Denoiser:
        """The denoiser of the stage of that name."""
        return self.experts[name]  # type: ignore[return-value]

    def set_class_means(self, means: Tensor) -> None:
        """Give the DP class means, float32 [num_classes, C, H, W], to every expert."""
        for stage in self.stages:
            self.expert(stage.name).set_class_means(means)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """As `Denoiser.forward`."""
        out = torch.empty_like(x)
        log_sigma = torch.log(sigma)
        for stage in self.stages:
            lower, upper = stage.range
            rows = (log_sigma >= lower) & (log_sigma < upper)
            if rows.any():
                out[rows] = self.expert(stage.name)(x[rows], sigma[rows], labels[rows])
        return out


def build_denoiser(config: RunConfig) -> Denoiser | RoutedDenoiser:
    """The untrained denoiser of a config, initialised from its public seed."""
    torch.manual_seed(config.seed)
    if config.stages.holder == "routed":
        stages = config.stages.stages
        return RoutedDenoiser(stages, [_build_single(config) for _ in stages])
    return _build_single(config)


def _build_single(config: RunConfig) -> Denoiser:
    channels, hinted = config.data.channels, config.hints.kind != "none"
    num_labels = max(1, config.data.num_classes) + 1
    backbone = build_backbone(
        config.network,
        in_channels=channels * (2 if hinted else 1),
        out_channels=channels,
        image_size=config.data.image_size,
        num_labels=num_labels,
    )
    network = config.network
    return Denoiser(
        backbone, config.data.image_shape, num_labels,
        parameterisation=network.parameterisation, sigma_data=network.sigma_data, hinted=hinted,
    )  # fmt: skip
