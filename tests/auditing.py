"""The statistical audit: the real private step on two neighbouring datasets, and what its outputs prove about epsilon.

The worst case that the guarantee allows: a dataset of one image, the canary, against the empty one, and a network whose
gradient for the canary points the same way and is longer than C whatever is drawn. So a step's output, projected on that direction,
is N(0, (nu C)^2), plus C where the canary was drawn, and the likelihood ratio of the datasets is known in closed form.

    python tests/auditing.py [--repetitions 20000] [--only REGEX]

Exit status 0 if for every sampling rate the certified epsilon is at most the claimed one and at least REQUIRED of it, and if each of
the breaks of BROKEN, in a copy of the code, certifies more than is claimed.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mutate import copy_code, patched, run_in
from mutations import MUTATIONS
from torch import Tensor, nn

from dpsyngen.audit.bounds import certified_epsilon
from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig, DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig
from dpsyngen.data import ImageDataset
from dpsyngen.denoiser import Denoiser
from dpsyngen.noise_levels import mixture, stages_of
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.private_step import PrivateStep
from dpsyngen.privacy.randomness import PrivateKey

EPSILON, DELTA, CLIPPING_NORM = 2.0, 1e-2, 3.0
REQUIRED = 0.6
"""The part of the claimed epsilon that the full audit must certify; theory says that 20,000 repetitions certify three quarters."""
SUSPECTED = (1.0, 0.5)
"""Multiples of the planned noise for which the thresholds are the best: what is claimed, and half of it."""
AUDITED = ((1.0, 1, False), (0.5, 2, False), (0.5, 2, True))
"""Sampling rate, how many composed steps one repetition has, and privacy.secure_noise."""
CONFIDENCE = 1 - 1e-3 / (len(AUDITED) * len(SUSPECTED) * 2)
"""Of each bound, so that all of them together hold with 99.9 %: every row of AUDITED, every threshold, adding and removing."""
BROKEN = ("noise halved", "K rows counted as examples", "empty batch skipped")
"""Breaks of tests/mutations.py that the full audit must expose."""


class ConstantNet(nn.Module):
    """Two parameters, seen by every pixel as it is: huge weights make the gradient point along (1, 1), far longer than C, for any draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.conv.weight, 1e4)
        nn.init.constant_(self.conv.bias, 1e4)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        return self.conv(torch.ones_like(x))


@dataclass(frozen=True)
class Audit:
    """What the audit of one sampling rate found: epsilon as claimed by the plan, and as certified for either direction."""

    claimed: float
    removing: float
    adding: float

    @property
    def certified(self) -> float:
        return max(self.removing, self.adding)


def config_of(rate: float, steps: int, secure: bool = False) -> RunConfig:
    """An expected size of 1 / `rate` and batches of one image on average; everything that isn't at stake as small as it gets."""
    return RunConfig(
        data=DataConfig(image_size=8, num_classes=1, expected_size=round(1 / rate)),
        network=NetworkConfig(width=8),
        hints=HintsConfig(kind="none"),
        private=PrivateConfig(batch_size=1, noise_multiplicity=4, steps=steps, epochs=None),
        privacy=PrivacyConfig(epsilon=EPSILON, delta=DELTA, clipping_norm=CLIPPING_NORM, secure_noise=secure),
        compute=ComputeConfig(chunk_size=1),
    )


def projections(config: RunConfig, plan: PrivacyPlan, canary: bool, repetitions: int) -> np.ndarray:
    """What the private step gives out along the canary's gradient, in units of C: float64 [repetitions, steps].

    Each repetition has a key of its own. A step that leaves no gradient behind gave out zero. The journal stays in memory: flushing
    its lines to a disk can take longer than the steps.
    """
    images = np.full((int(canary), 1, 8, 8), 255, dtype=np.uint8)
    dataset = ImageDataset(images, np.zeros(len(images), dtype=np.int64), ("image",))
    denoiser = Denoiser(ConstantNet(), (1, 8, 8), 1, parameterisation="edm", sigma_data=0.5, hinted=False)
    journal = Journal(Path(os.devnull), writable=False)
    journal.open_attempt("audit", "start")
    compute, sigma_draw = Compute(torch.device("cpu")), mixture(stages_of(config, "private"))
    found = np.zeros((repetitions, plan.steps))
    for repetition in range(repetitions):
        step = PrivateStep(denoiser, sigma_draw, dataset, plan, PrivateKey.fresh(), journal, config, compute)
        for number in range(plan.steps):
            for parameter in denoiser.parameters():
                parameter.grad = None
            step(repetition * plan.steps + number)
            found[repetition, number] = sum(float(p.grad.sum()) for p in denoiser.parameters() if p.grad is not None)
    return found * plan.batch_size / (math.sqrt(2) * plan.clipping_norm)


def log_likelihood_ratio(projected: np.ndarray, plan: PrivacyPlan) -> np.ndarray:
    """ln P(projections | canary) / P(projections | empty), by the plan's own noise: [n, steps] -> [n]."""
    shift = (projected - 0.5) / plan.noise_multiplier**2
    q = plan.sampling_rate
    return (np.logaddexp(math.log1p(-q), math.log(q) + shift) if q < 1 else shift).sum(axis=1)


def bounds(threshold: float, with_canary: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """Certified epsilon of removing and of adding, by whether the log likelihood ratio lies above the threshold, or below it."""
    trials, others = len(with_canary), len(without)
    hits, false_alarms = int((with_canary > threshold).sum()), int((without > threshold).sum())
    removing = certified_epsilon((hits, trials), (false_alarms, others), DELTA, CONFIDENCE)
    adding = certified_epsilon((others - false_alarms, others), (trials - hits, trials), DELTA, CONFIDENCE)
    return removing, adding


def thresholds(plan: PrivacyPlan, repetitions: int) -> list[tuple[float, float]]:
    """For each suspected noise the thresholds that certify most for removing and for adding, by simulated theory alone."""
    rng = np.random.default_rng(0)
    found = []
    for suspected in SUSPECTED:
        shape = (repetitions, plan.steps)
        noise = [suspected * plan.noise_multiplier * rng.standard_normal(shape) for _ in range(2)]
        with_canary = log_likelihood_ratio(noise[0] + (rng.random(shape) < plan.sampling_rate), plan)
        without = log_likelihood_ratio(noise[1], plan)
        candidates = np.quantile(np.concatenate([with_canary, without]), np.linspace(0.002, 0.998, 250))
        table = np.array([bounds(candidate, with_canary, without) for candidate in candidates])
        found.append(tuple(_middle_of_best(candidates, table[:, direction]) for direction in (0, 1)))
    return found


def _middle_of_best(candidates: np.ndarray, certified: np.ndarray) -> float:
    """The middle of the candidates that are nearly the best, which one simulation's luck moves least."""
    best = certified.max()
    return float(np.median(candidates[certified >= best - 0.05 * abs(best)]))


def audit(rate: float, steps: int, secure: bool, repetitions: int, noise: float = 1.0) -> Audit:
    """Audit `steps` private steps at a sampling rate; with `noise` below 1 broken ones, which add less noise than their plan claims."""
    config = config_of(rate, steps, secure)
    plan = PrivacyPlan.calibrate(config, round(1 / rate))
    fixed = thresholds(plan, repetitions)
    used = dataclasses.replace(plan, noise_multiplier=noise * plan.noise_multiplier)
    with_canary, without = (log_likelihood_ratio(projections(config, used, canary, repetitions), plan) for canary in (True, False))
    removing = max(bounds(threshold, with_canary, without)[0] for threshold, _ in fixed)
    adding = max(bounds(threshold, with_canary, without)[1] for _, threshold in fixed)
    return Audit(plan.epsilon_after(steps), removing, adding)


def audit_broken(name: str, repetitions: int) -> Audit:
    """The audit of one step on every image, in a copy of the code that has a break of tests/mutations.py."""
    (mutation,) = (mutation for mutation in MUTATIONS if mutation.name == name)
    code = f"import auditing, dataclasses, json; print(json.dumps(dataclasses.asdict(auditing.audit(1.0, 1, False, {repetitions}))))"
    with tempfile.TemporaryDirectory() as directory:
        copy = copy_code(Path(directory).resolve())
        with patched(copy, mutation):
            result = run_in(copy, "-c", code)
    if result.returncode != 0:
        raise RuntimeError(f"the audit of {name!r} ended with exit status {result.returncode}: {result.stderr}")
    return Audit(**json.loads(result.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description="What the outputs of the private step prove about epsilon, against what is claimed.")
    parser.add_argument("--repetitions", type=int, default=20000, help="of each of the two datasets")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose name matches, ignoring case")
    arguments = parser.parse_args()
    rows: dict[str, tuple[bool, Callable[[int], Audit]]] = {}
    for rate, steps, secure in AUDITED:
        rows[f"q = {rate:g}, steps = {steps}{', secure noise' if secure else ''}"] = False, functools.partial(audit, rate, steps, secure)
    for name in BROKEN:
        rows[f"broken: {name}"] = True, functools.partial(audit_broken, name)
    chosen = {name: row for name, row in rows.items() if re.search(arguments.only, name, re.IGNORECASE)}
    wrong = 0 if chosen else 1
    print(f"{arguments.repetitions} repetitions, delta = {DELTA:g}, all bounds together hold with 99.9 %; rows: {'; '.join(rows)}")
    print(f"{'':36}  claimed  certified  (removing, adding)  seconds", flush=True)
    for name, (broken, run) in chosen.items():
        started = time.perf_counter()
        found = run(arguments.repetitions)
        exposed, weak = found.certified > found.claimed, found.certified < REQUIRED * found.claimed
        good = exposed if broken else not exposed and not weak
        verdict = "more than is claimed" if exposed else f"{found.certified / found.claimed:.0%} of what is claimed"
        wrong += not good
        print(
            f"{name:36}  {found.claimed:7.3f}  {found.certified:9.3f}  ({found.removing:8.3f}, {found.adding:6.3f})"
            f"  {time.perf_counter() - started:7.1f}  {'as expected' if good else 'WRONG'}: {verdict}", flush=True,
        )  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
