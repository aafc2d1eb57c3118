"""What `accelerate launch` was told, which reaches its processes through the environment: used, or refused where a run can't do it."""

import os
from dataclasses import replace

from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError

_TRUE = ("1", "true", "yes", "on", "y", "t")
_WHOLE = "clipping an image's gradient takes all of it, and so all weights, on one process; use --multi_gpu, which shares out the images"
_REFUSED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""What splits weights or gradients between processes, by the variable that accelerate sets for it (its utils/launch.py)."""


def refuse_unsupported() -> None:
    """Raise InputError if accelerate was told to do what a run would have to ignore."""
    for variable, name in _REFUSED.items():
        if _is_set(variable):
            raise InputError(f"accelerate launch: expected processes that hold all weights, got {name}: {_WHOLE}")
    if _is_set("ACCELERATE_IN_TPU_POD"):
        raise InputError("accelerate launch: expected CPUs or CUDA devices, got a TPU pod")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise InputError(f"accelerate launch: expected dynamo_backend no, got {backend}: a compiled network hides the layers whose gradients are "
                         "taken image by image")  # fmt: skip
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise InputError(f"accelerate launch: expected gradient_accumulation_steps 1, got {steps}: private.batch_size is the whole logical batch, "
                         "and compute.chunk_size what is computed at a time")  # fmt: skip


def settled(config: RunConfig) -> RunConfig:
    """The config as these processes compute it: `compute.precision` auto becomes what accelerate's mixed precision says, float32 without it.

    A run keeps the settled config, so that it goes on, and is sampled from, as it began. Raises InputError where the two contradict each
    other, and for all that `refuse_unsupported` refuses.
    """
    refuse_unsupported()
    named, accelerate = config.compute.precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if accelerate not in ("no", "bf16"):
        raise InputError(f"accelerate launch: expected mixed_precision no or bf16, got {accelerate}: it needs scaled losses, which clipping of each "
                         f"image's gradient doesn't go with (compute.precision is {named})")  # fmt: skip
    if accelerate == "bf16" and named == "float32":
        raise InputError("compute.precision: expected bf16 or auto, since accelerate's mixed_precision is bf16, got 'float32'")
    if named != "auto":
        return config
    return replace(config, compute=replace(config.compute, precision="bf16" if accelerate == "bf16" else "float32"))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE
