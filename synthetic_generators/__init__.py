"""Images made by a program, from public randomness alone: training data that costs no privacy.

One procedural family a file. A family is a frozen dataclass whose fields after `channels` and `image_size` are its
options; `register` lists it under a name. This package knows nothing of the product that uses it.
"""

from synthetic_generators.registry import Generator, available, make_generator, register

# Importing a family registers it.
from synthetic_generators import dead_leaves, salt_and_pepper, strokes  # isort: skip

__all__ = ["Generator", "available", "dead_leaves", "make_generator", "register", "salt_and_pepper", "strokes"]
