"""How often a run's teacher is right, without the run: a minute or so, where training and sampling take a quarter of an hour.

    python -m benchmarks.utility.teacher --config benchmarks/utility/faint_mnist.yaml [--teacher.steps 120 ...]

The teacher is released as train.py releases it, but for the noise's seed, and asked about the training images that data.held_out keeps out. These
must be public: what it prints isn't private, and noise of a known seed hides nothing.
"""

import sys
import time
from pathlib import Path

import numpy as np

from dpsyngen.cli import ScriptParser, read_config, run_script
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import load_held_out, load_train
from dpsyngen.errors import InputError
from dpsyngen.launcher import settled
from dpsyngen.moments import seen_by_teacher
from dpsyngen.privacy.plan import PrivacyPlan

_SEEDS = 2


def accuracies(config: RunConfig, seeds: int = _SEEDS) -> list[float]:
    """The part of the held-out images, in [0, 1], whose class the teacher says; for each seed of the noise.

    Raises InputError where there is no teacher, nothing is held out, or data.public doesn't say that the images are public.
    """
    settings, data = config.teacher, config.data
    if not settings.used:
        raise InputError("teacher.share: expected more than 0, since there is no teacher otherwise")
    if not data.public:
        raise InputError("data.public: expected true, since how often a teacher is right tells about private images")
    if data.held_out == 0:
        raise InputError("data.held_out: expected more than 0, the training images that the teacher is asked about")
    private, held_out = load_train(data), load_held_out(data)
    mechanism = PrivacyPlan.with_noise(config, data.expected_size or len(private), 0.0).teacher
    compute = Compute.start(config.compute)
    directions, batches = seen_by_teacher(config, private, compute)
    seen = list(batches)
    asked, labels = held_out.batch(np.arange(len(held_out)))
    features = directions.seen(asked.to(compute.device)).cpu()
    weights = (mechanism.release(seen, np.random.default_rng(seed)) for seed in range(seeds))  # type: ignore[union-attr]  # it is used
    return [((features @ each).argmax(dim=1) == labels).double().mean().item() for each in weights]


def main(argv: list[str]) -> None:
    """Print the mean accuracy of two teachers, taught with other noise each, and theirs."""
    parser = ScriptParser("Say how often a run's teacher is right about the images that are held out of training.")
    parser.prog = "python -m benchmarks.utility.teacher"
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="a YAML file; later ones override earlier ones")
    options, overrides = parser.parse(argv)
    start = time.monotonic()
    right = accuracies(settled(read_config(options.config, overrides)))
    print(f"right about {100 * np.mean(right):.1f} % of the held-out images ({', '.join(f'{100 * each:.1f}' for each in right)}); "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    sys.argv[0] = "python -m benchmarks.utility.teacher"  # what complaints begin with
    run_script(main)
