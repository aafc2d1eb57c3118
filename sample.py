"""Draw a synthetic dataset from a finished run: python sample.py --run runs/NAME [--num-images 60000] [--sampling.guidance 1.5]."""

from pathlib import Path

import numpy as np

from dpsyngen.cli import ScriptParser, load_run_config, run_script
from dpsyngen.compute import Compute
from dpsyngen.errors import InputError
from dpsyngen.launcher import settled
from dpsyngen.samples import describe_origin, make_directory, write_samples
from dpsyngen.sampling import balanced_labels, sample_set
from dpsyngen.saved_model import load_trained


def main(argv: list[str]) -> None:
    """Parse, load, sample, write."""
    parser = ScriptParser(
        "Draw a synthetic dataset from a finished run, at no further privacy cost: images.npz, grid.png, provenance.json.",
        sections=("sampling", "compute"),
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's directory")
    parser.add_argument("--num-images", metavar="INT", help="short for --sampling.num_images")
    parser.add_argument("--seed", metavar="INT", help="draw another set than the run's public seed gives")
    parser.add_argument("--out", type=Path, help="where the set goes; RUN/samples by default")
    options, overrides = parser.parse(argv)
    for flag in overrides:
        if flag.startswith("--") and not flag.startswith(("--sampling.", "--compute.")):
            raise InputError(f"{flag}: expected a field of sampling or compute, since the others were settled by training")
    overrides += [f"--sampling.num_images={options.num_images}"] if options.num_images is not None else []
    overrides += [f"--seed={options.seed}"] if options.seed is not None else []

    trained, config = load_run_config(options.run), settled(load_run_config(options.run, overrides))
    directory = options.out if options.out is not None else options.run / "samples"
    compute = Compute.start(config.compute)
    denoiser = load_trained(options.run, trained, compute.device)
    make_directory(directory)

    images, labels = sample_set(denoiser, config, compute)
    if compute.is_main:
        write_samples(directory, images, labels, describe_origin(config, denoiser))
        relabelled = np.mean(labels != balanced_labels(len(labels), config.data.num_classes))
        print(f"{len(images)} images in {directory}" + (f", {relabelled:.1%} of them with another label from the teacher" if relabelled else ""))


if __name__ == "__main__":
    run_script(main)
