"""Importing torchvision beside a CPU build of torch.

The torchvision wheels on PyPI are built for CUDA. Beside a CPU build of torch their compiled operators don't load, and the
import fails with "operator torchvision::nms does not exist", though nothing that needs those operators is ever called here:
torchvision is only imported by clean-fid, and by libraries that look whether it is there.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_libraries: list[torch.library.Library] = []  # the schemas vanish with their library, so it lives as long as the process


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators don't fit the installed torch.

    Returns:
        The module. Where its operators are missing, transforms, models and image handling work and only box operators don't.
    Raises:
        ImportError: torchvision isn't installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _libraries:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")


def mend_torchvision() -> None:
    """`import_torchvision` for the sake of a library that will look whether torchvision is there; nothing where it isn't installed."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
