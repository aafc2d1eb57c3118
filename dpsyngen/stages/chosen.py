"""The families of programmatic images that are compared."""

from typing import Any

from dpsyngen.config import RunConfig, SyntheticConfig
from dpsyngen.errors import InputError
from synthetic_generators import available, make_generator


def chosen_families(given: str | None, config: RunConfig) -> tuple[str, ...]:
    """The families of --families, or all that need no options. Raises InputError for one that can't be made, or that is there twice."""
    names = available() if given is None else tuple(given.split(","))
    if len(set(names)) < len(names):
        raise InputError(f"--families: expected each name once, got {given}")
    usable = []
    for name in names:
        try:
            make_generator(name, config.data.channels, config.data.image_size, **options_of(name, config.synthetic))
            usable.append(name)
        except ValueError as error:
            if given is not None or name == config.synthetic.family:
                raise InputError(f"--families: {error}") from error
    return tuple(usable)


def options_of(family: str, config: SyntheticConfig) -> dict[str, Any]:
    """The options of the config, for the config's family; none for another."""
    return dict(config.options) if family == config.family else {}
