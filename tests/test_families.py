"""What every family of programmatic images has to keep, those that are added later as well: the list is `available()`."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from synthetic_generators import Generator, Streams, available, make_generator

ROOT = Path(__file__).parent.parent
INDICES = np.array([*range(60), 10**6, 2**32 + 1, 2**40, 2**62])


def make(name: str, channels: int = 1, image_size: int = 28, options: dict[str, Any] | None = None) -> Generator:
    return make_generator(name, channels, image_size, **(options or {}))


def discrete_options(name: str) -> list[dict[str, Any]]:
    """Each value of each option that is a choice or a switch, alone; beside the defaults."""
    found: list[dict[str, Any]] = [{}]
    family = type(make(name))
    for option, kind in get_type_hints(family).items():
        values = get_args(kind) if get_origin(kind) is Literal else (False, True) if kind is bool else ()
        default = next(field.default for field in dataclasses.fields(family) if field.name == option)  # type: ignore[arg-type]
        found += [{option: value} for value in values if value != default]
    return found


CASES = [(name, options) for name in available() for options in discrete_options(name)]
NAMES = [" ".join([name, *(f"{option}={value}" for option, value in options.items())]) for name, options in CASES]


def digests() -> dict[str, str]:
    """A hash of each case's first images."""
    drawn = [make(name, 3, 12, options).generate(Streams(5, INDICES[:5])) for name, options in CASES]
    return {name: hashlib.sha256(images.tobytes()).hexdigest() for name, images in zip(NAMES, drawn, strict=True)}


@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32), (1, 9), (3, 1)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_images_are_uint8_of_the_asked_shape(name: str, options: dict[str, Any], channels: int, image_size: int) -> None:
    generator = make(name, channels, image_size, options)
    for n in (0, 3):
        images = generator.generate(Streams(0, range(n)))
        assert images.dtype == np.uint8
        assert images.shape == (n, channels, image_size, image_size)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_an_image_does_not_depend_on_the_others_of_its_batch(name: str, options: dict[str, Any], channels: int) -> None:
    generator, count = make(name, channels, options=options), len(INDICES)
    whole = generator.generate(Streams(3, INDICES))
    by_sevens = np.concatenate([generator.generate(Streams(3, INDICES[i : i + 7])) for i in range(0, count, 7)])
    assert np.array_equal(by_sevens, whole)
    for i in (0, 1, 29, 40, count - 2, count - 1):
        assert np.array_equal(generator.generate(Streams(3, INDICES[[i]]))[0], whole[i])
    order = np.random.default_rng(0).permutation(count)
    assert np.array_equal(generator.generate(Streams(3, INDICES[order])), whole[order])


def test_another_process_with_another_number_of_threads_draws_the_same_images() -> None:
    program = f"import json, sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_families; print(json.dumps(test_families.digests()))"
    threads = {f"{library}_NUM_THREADS": "3" for library in ("OMP", "OPENBLAS", "MKL")}
    environment = os.environ | threads | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    printed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert json.loads(printed) == digests()


@pytest.mark.parametrize("name", available())
def test_images_differ_from_one_another_and_between_seeds(name: str) -> None:
    generator = make(name)
    first, other = generator.generate(Streams(1, range(100))), generator.generate(Streams(2, range(100)))
    assert len({image.tobytes() for image in [*first, *other]}) > 180
