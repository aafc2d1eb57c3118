"""Grids of images on the way: what the averaged weights draw so far, for a person to look at."""

import io
import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from dpsyngen.config import RunConfig
from dpsyngen.denoiser import Denoiser, RoutedDenoiser
from dpsyngen.errors import InputError
from dpsyngen.files import write_file, writing
from dpsyngen.progress import Progress
from dpsyngen.samples import sample_grid
from dpsyngen.sampling import draw_classes

CLASSES, IMAGES_PER_CLASS, MOST_STEPS = 10, 8, 18


def write_preview(progress: Progress, averaged: Denoiser | RoutedDenoiser, config: RunConfig) -> None:
    """Draw previews/PHASE-STEP.png: a row of eight images for each of the first ten classes, or 50 images without classes.

    As cheap as it gets: DDIM with at most 18 steps, whatever `config.sampling` says, and shared by the processes, all of which
    must call this. The noise comes from the public seed and is the same each time, so pictures can be compared; torch's generator isn't
    touched, and training goes on as if nothing had been drawn. Weights whose images aren't finite get a line on stderr and no grid.
    """
    classes, compute = min(config.data.num_classes, CLASSES), progress.compute
    labels = np.repeat(np.arange(classes), IMAGES_PER_CLASS) if classes else np.zeros(50, dtype=np.int64)
    quick = replace(config.sampling, sampler="ddim", s_churn=0.0, attempts=1, teacher_guidance=0.0, steps=min(config.sampling.steps, MOST_STEPS))
    file = progress.run.previews / f"{progress.phase}-{progress.step:06d}.png"
    try:
        with compute.autocast():
            images, _ = draw_classes(
                averaged, quick, labels, config.seed, config.data.image_shape, config.data.num_classes, compute.device,
                progress=False, rank=compute.rank, processes=compute.processes,
            )  # fmt: skip
    except InputError as error:
        if compute.is_main:
            sys.stderr.write(f"{file}: not drawn, since {error}\n")
        return
    if compute.is_main:
        picture = io.BytesIO()
        Image.fromarray(sample_grid(images, labels).squeeze()).save(picture, format="PNG")
        with writing(file):
            file.parent.mkdir(exist_ok=True)
        write_file(file, picture.getvalue())
