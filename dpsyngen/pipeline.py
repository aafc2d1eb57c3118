"""A trained denoiser as a pipeline of diffusers: `DPSynGenPipeline.from_pretrained("runs/NAME/model")`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, RunConfig, SamplingConfig, StageConfig, StagesConfig, TeacherConfig, Variant
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.networks.torchvision_compat import mend_torchvision
from dpsyngen.sampling import balanced_labels, draw_classes

mend_torchvision()  # diffusers imports it on the way

from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402

_OF_STAGES = ("name", "source", "lower", "upper", "downsampling", "detail_std")
"""The fields of `StageConfig` that decide what a denoiser computes."""


class DPSynGenDenoiser(ModelMixin, ConfigMixin):
    """`dpsyngen.denoiser.build_denoiser`'s network with a config.json of its own: the fields of `RunConfig` that decide its shape."""

    _keep_in_fp32_modules = ("denoiser",)  # arithmetic in bf16 is the pipeline's precision; weights are float32 in any case

    @register_to_config
    def __init__(
        self,
        image_size: int,
        channels: Literal[1, 3],
        num_classes: int,
        backbone: Literal["lean", "unet"],
        width: int,
        depth: int,
        parameterisation: Literal["edm", "v"],
        sigma_data: float,
        label_dropout: float,
        hints: Literal["none", "class_means"],
        variant: Variant,
        tau1: float,
        tau2: float,
        holder: Literal["shared", "routed"],
        custom: Sequence[dict[str, Any]] = (),
        prototypes: int = 1,
        covariance_rank: int = 0,
        closed_form: bool = False,
        teacher: bool = False,
    ) -> None:
        super().__init__()
        config = RunConfig(
            data=DataConfig(image_size=image_size, channels=channels, num_classes=num_classes),
            network=NetworkConfig(backbone, width, depth, parameterisation, sigma_data, label_dropout),
            stages=StagesConfig(variant, tau1, tau2, holder, tuple(StageConfig(**stage) for stage in custom), closed_form),
            hints=HintsConfig(hints, prototypes, covariance_rank=covariance_rank),
            teacher=TeacherConfig(share=0.1 if teacher else 0.0),
        )
        with torch.random.fork_rng(devices=[]):  # the caller's generator is not the initialisation's business
            self.denoiser = build_denoiser(config)

    @classmethod
    def of_run(cls, config: RunConfig) -> "DPSynGenDenoiser":
        """The untrained network of a run."""
        data, stages = config.data, config.stages
        return cls(
            image_size=data.image_size, channels=data.channels, num_classes=data.num_classes, hints=config.hints.kind,
            prototypes=config.hints.prototypes, covariance_rank=config.hints.covariance_rank, closed_form=stages.closed_form,
            teacher=config.teacher.used,
            **asdict(config.network), variant=stages.variant, tau1=stages.tau1, tau2=stages.tau2, holder=stages.holder,
            custom=[{name: getattr(stage, name) for name in _OF_STAGES} for stage in stages.custom],
        )  # fmt: skip

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Estimate x0: x float32 [N, C, H, W], sigma float32 [N] > 0, labels int64 [N] -> float32 [N, C, H, W].

        Where a class has several prototypes, labels are those of `dpsyngen.denoiser.Denoiser`.
        """
        x0: Tensor = self.denoiser(x, sigma, labels)
        return x0


class DPSynGenPipeline(DiffusionPipeline):
    """Draws what `sample.py` draws: the same images for the same seed and labels.

    `sampling` holds fields of `SamplingConfig`, its defaults stand for the others; `precision` is float32 or bf16, of the network's arithmetic.
    Generation is post-processing of released weights, so it costs no privacy.
    """

    denoiser: DPSynGenDenoiser

    def __init__(self, denoiser: DPSynGenDenoiser, sampling: dict[str, Any] | None = None, precision: str = "float32") -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)
        self.register_to_config(sampling=sampling or {}, precision=precision)

    @classmethod
    def of_run(cls, config: RunConfig, denoiser: torch.nn.Module) -> "DPSynGenPipeline":
        """The pipeline of a run with the weights of its trained denoiser, on the CPU."""
        model = DPSynGenDenoiser.of_run(config)
        model.denoiser.load_state_dict(denoiser.state_dict())
        settings = {name: value for name, value in asdict(config.sampling).items() if name != "num_images" and value != math.inf}  # JSON has no inf
        return cls(model.eval(), settings, config.compute.precision)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: Literal["pil", "np", "uint8"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: One label for all images, or a label per image, in [0, num_classes] where num_classes stands for no class; by
                default labels cycle through the classes.
            num_images: How many; 1 by default, or the number of labels.
            num_inference_steps: Noise levels; those of the run by default. The same holds for
            guidance_scale: the scale of classifier-free guidance, 1 for none.
            seed: As `sample.py --seed`: image i is the same in any call. Without it
            generator: gives one, and without that torch's global generator.
            output_type: pil, np (float32 [N, H, W, C] in [0, 1]) or uint8 ([N, H, W, C], what sample.py saves).
            return_dict: False returns the tuple (images,).
        Raises:
            InputError: an argument is out of its range.
        """
        settings = SamplingConfig(**self.config.sampling)
        changed = {"steps": num_inference_steps, "guidance": guidance_scale}
        settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})
        network = self.denoiser.config
        if settings.guidance != 1 and network.label_dropout == 0:
            raise InputError(f"guidance_scale: expected 1, since this network never learnt to do without labels, got {settings.guidance!r}")
        if output_type not in ("pil", "np", "uint8"):
            raise InputError(f"output_type: expected pil, np or uint8, got {output_type!r}")
        labels, seed = _labels(class_labels, num_images, network.num_classes), _seed(seed, generator)
        shape, inner = (network.channels, network.image_size, network.image_size), self.denoiser.denoiser
        quiet = getattr(self, "_progress_bar_config", {}).get("disable", False)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            images, _ = draw_classes(inner, settings, labels, seed, shape, network.num_classes, self.device, progress=not quiet, call=self.denoiser)
        shown = _as_output(images, output_type)
        return ImagePipelineOutput(images=shown) if return_dict else (shown,)


def _labels(class_labels: int | Sequence[int] | None, num_images: int | None, num_classes: int) -> np.ndarray:
    if num_images is not None and num_images < 1:
        raise InputError(f"num_images: expected an integer >= 1, got {num_images!r}")
    if class_labels is None:
        return balanced_labels(num_images or 1, num_classes)
    given = np.atleast_1d(np.asarray(class_labels))
    labels = np.repeat(given, num_images or 1) if np.ndim(class_labels) == 0 else given
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > num_classes:
        raise InputError(f"class_labels: expected integers from 0 to {num_classes}, which stands for no class, got {class_labels!r}")
    if num_images is not None and len(labels) != num_images:
        raise InputError(f"num_images: expected {len(labels)}, the number of class_labels, or nothing, got {num_images!r}")
    return labels.astype(np.int64)


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is None:
        return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device if generator is not None else "cpu"))
    if seed < 0 or generator is not None:
        raise InputError(f"seed: expected an integer >= 0, and no generator beside it, got {seed!r}")
    return seed


def _as_output(images: np.ndarray, output_type: str) -> np.ndarray | list[Image.Image]:
    if output_type == "uint8":
        return images
    if output_type == "np":
        return images.astype(np.float32) / 255
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]
