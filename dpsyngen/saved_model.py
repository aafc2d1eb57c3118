"""runs/NAME/model/: the trained denoiser in diffusers' layout, and its card; written at the end of training, read by sample.py."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dpsyngen.config import RunConfig
from dpsyngen.denoiser import Denoiser, RoutedDenoiser, build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.files import replacing_directory
from dpsyngen.model_card import model_card
from dpsyngen.run_directory import RunDirectory

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
FILES = ("README.md", "model_index.json", "denoiser/config.json", WEIGHTS)
"""All that model/ holds."""


def write_model(directory: Path, config: RunConfig, denoiser: Denoiser | RoutedDenoiser, report: dict[str, Any]) -> None:
    """Write a trained denoiser, its averaged weights and class means, as a `DPSynGenPipeline`, and the card with the final privacy report.

    The directory is complete or absent; one that is already there is replaced. Raises InputError if it can't be written.
    """
    from dpsyngen.pipeline import DPSynGenPipeline  # here, since importing diffusers takes seconds that sampling need not spend

    pipeline = DPSynGenPipeline.of_run(config, denoiser)
    with replacing_directory(directory) as partial:
        try:
            pipeline.save_pretrained(partial)
        except SafetensorError as error:  # what a full disk becomes in safetensors
            raise InputError(f"{directory}: expected a place that can be written ({error})") from error
        (partial / "README.md").write_text(model_card(config, report), encoding="utf-8")


def load_trained(path: Path, config: RunConfig, device: torch.device) -> Denoiser | RoutedDenoiser:
    """The trained denoiser of a finished run, in eval mode; InputError if training isn't finished or the file is broken."""
    run = RunDirectory(path)
    if not run.is_finished:
        raise InputError(f"{path}: training is not finished; run train.py --run {path} again to resume it")
    denoiser = build_denoiser(config).to(device)
    try:
        tensors = load_file(run.model / WEIGHTS)
        denoiser.load_state_dict({name.removeprefix("denoiser."): tensor for name, tensor in tensors.items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{run.model / WEIGHTS}: expected the weights of this run's network; {reason}") from error
    return denoiser.eval()
