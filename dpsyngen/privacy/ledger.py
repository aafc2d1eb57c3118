"""What one run may spend and has spent: its plan, its key, its journal and its report, opened and closed together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.privacy.journal import BEFORE_MEANS, MEANS, Journal, fingerprint
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey, SecureStream, destroy
from dpsyngen.privacy.report import privacy_report
from dpsyngen.run_directory import RunDirectory


@dataclass(frozen=True)
class Ledger:
    """Opened when a run first touches private data, or resumes doing so; closed when the run is finished."""

    config: RunConfig
    plan: PrivacyPlan | None
    run: RunDirectory
    key: PrivateKey
    journal: Journal

    @classmethod
    def open(
        cls,
        config: RunConfig,
        plan: PrivacyPlan | None,
        run: RunDirectory,
        compute: Compute,
        data_fingerprint: Callable[[], str],
        *,
        reached: int,
        has_class_means: bool,
    ) -> "Ledger":
        """Find the run's key and journal or make them; privacy.json tells the whole plan's price from now on.

        `reached` and `has_class_means` say what the weights at hand have already spent. Raises InputError if private steps were begun
        with a key that is gone, since they can neither be replayed nor continued, and if the journal lacks what the weights have seen.
        """
        journal = Journal(run.journal, writable=compute.is_main)
        spending = journal.spending
        if plan is not None and (reached > spending.steps or (has_class_means and spending.means_releases == 0)):
            raise InputError(f"{run.journal}: expected the record of {reached} private steps, found {spending.steps}; what was spent can't be told")
        if compute.is_main and not run.key.exists():
            if run.journal.exists():
                raise InputError(f"{run.key}: expected the key of the private steps that {run.journal} lists; a new run needs a new directory")
            fixed = config.privacy.unsafe_fixed_key
            (PrivateKey.fresh() if fixed is None else PrivateKey.fixed(fixed)).save(run.key)
        compute.wait()  # the key is there, and all have read the journal before one writes to it
        key = PrivateKey.load(run.key)
        this = fingerprint(data_fingerprint(), _result_deciding(config), compute.device, compute.processes)
        journal.open_attempt(this, BEFORE_MEANS if reached == 0 and not has_class_means else reached)
        ledger = cls(config, plan, run, key, journal)
        if compute.is_main:
            run.write_privacy(ledger.report("running"))
        return ledger

    def begin_class_means(self) -> np.random.Generator | SecureStream:
        """Journal a release of the class means and hand out its noise generator; InputError if the budget has no room for another."""
        spending = self.journal.spending
        again = self.plan is not None and spending.means_releases > 0 and not self.journal.has_begun(MEANS)
        if again and self.plan.affordable_steps(spending.means_releases + 1) < spending.steps:  # type: ignore[union-attr]
            raise self._exhausted()
        self.journal.begin(MEANS)
        secure = self.plan is not None and self.plan.secure_noise
        return (self.key.secure_stream if secure else self.key.substream)("class_means", attempt=self.journal.attempt)

    def last_step(self, planned: int, reached: int) -> int:
        """Where the phase ends that stands at step `reached`: as planned, or earlier if steps were spent in vain.

        Steps that the journal lists since the checkpoint are replayed free in the same attempt; all others are charged.
        """
        if self.plan is None:
            return planned
        spending = self.journal.spending
        affordable = planned if spending.means_releases <= 1 else self.plan.affordable_steps(spending.means_releases)
        last = reached + self.journal.begun_since(reached) + affordable - spending.steps
        if last < reached:
            raise self._exhausted()
        return last

    def _exhausted(self) -> InputError:
        target = self.config.privacy.epsilon
        return InputError(f"{self.run.path}: the budget of epsilon = {target:g} is spent; nothing is left to resume with")

    def epsilon_at(self, step: int) -> float | None:
        """Epsilon of all that was begun to stand at `step`, from above; None where nothing is guaranteed.

        What this attempt had begun beyond `step` before a crash is left out, so that a replay logs what was logged before. Accounting
        is slow, so it is done for twenty numbers of steps.
        """
        if self.plan is None or not self.key.guaranteed:
            return None
        spending, grid = self.journal.spending, max(1, self.plan.steps // 20)
        spent = spending.steps - self.journal.begun_since(step)
        steps = max(spent, min(-(-spent // grid) * grid, self.plan.steps))
        return self.plan.epsilon_after(steps, max(1, spending.means_releases))

    def close(self) -> None:
        """Report what was spent in the end, then destroy the key; a crash in between leaves that to the next call of train.py."""
        self.run.write_privacy(self.report("finished"))
        destroy(self.run.key)

    def report(self, status: str) -> dict[str, Any]:
        """What privacy.json says now, if the run's status is "running" or "finished"."""
        return privacy_report(self.plan, self.journal.spending, self.config, status=status, guaranteed=self.key.guaranteed)


def _result_deciding(config: RunConfig) -> str:
    """The parts of the config that a private step's result depends on."""
    compute = (config.compute.precision, config.compute.chunk_size, config.compute.chunks_at_once)
    parts = (config.seed, config.data, config.network, config.stages, config.hints, config.synthetic, config.private, config.privacy)
    return repr((*parts, compute))
