"""Images made by a program, from public randomness alone: training data that costs no privacy.

One procedural family a file. A family is a frozen dataclass whose fields after `channels` and `image_size` are its
options, with a method `generate(streams)`; `register` lists it under a name. Importing this package imports every module in its
directory, so a new file is found without being named anywhere. This package knows nothing of the product that uses it.
"""

import importlib
import pkgutil

from synthetic_generators.registry import Generator, available, make_generator, register
from synthetic_generators.streams import Streams

for _module in pkgutil.iter_modules(__path__):  # importing a family registers it
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Generator", "Streams", "available", "make_generator", "register"]
