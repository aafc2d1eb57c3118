"""Images made by a program, from public randomness alone: training data that costs no privacy.

One procedural family a file. A family is a frozen dataclass with the fields `channels` and `image_size`, then its options, each
with a default and a docstring, and a method `generate(streams)` that gives each stream its image (see `registry.Generator`);
`register` lists it under a name:

    @register("checkerboard")
    @dataclass(frozen=True)
    class Checkerboard:
        \"\"\"Two random levels in squares.\"\"\"

        channels: int
        image_size: int
        squares: int = 4
        \"\"\"Squares along a side.\"\"\"

        def generate(self, streams: Streams) -> np.ndarray:
            \"\"\"uint8 [n, C, H, W].\"\"\"
            at = np.arange(self.image_size) * self.squares // self.image_size
            levels = streams.integers("levels", 256, (self.channels, 2)).astype(np.uint8)
            return levels[:, :, (at[:, None] + at) % 2]

Importing this package imports every module in its directory, so a new file here is found without being named anywhere. A file that
lies elsewhere does as well: its family is called `path/to/my_family.py:checkerboard`, or `my_package.my_module:checkerboard` where
Python can import it. `python -m synthetic_generators` lists the families, explains their options and draws them.

This package knows nothing of the product that uses it.
"""

import importlib
import pkgutil

from synthetic_generators.description import describe
from synthetic_generators.registry import Generator, UnknownFamilyError, available, code_files, make_generator, register
from synthetic_generators.streams import Streams

for _module in pkgutil.iter_modules(__path__):  # importing a family registers it
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Generator", "Streams", "UnknownFamilyError", "available", "code_files", "describe", "make_generator", "register"]
