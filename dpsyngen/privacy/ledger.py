"""What one run may spend and has spent: its plan, its key, its journal and its report, opened and closed together."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.noise_levels import central_stages, stages
from dpsyngen.privacy.continuation import Segment, segments_of
from dpsyngen.privacy.journal import MEANS, Journal, Spending, fingerprint
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey, SecureStream, destroy
from dpsyngen.privacy.report import privacy_report
from dpsyngen.run_directory import RunDirectory

# privacy.json is priced and written anew about this many times in a run, since accounting is slow.
_POINTS = 20


@dataclass
class Ledger:
    """Opened when a run first touches private data, or resumes doing so; closed when the run is finished.

    privacy.json is ahead of the journal, and the journal ahead of the work: before a step is announced that privacy.json doesn't cover yet,
    it is rewritten to cover the steps up to the next of twenty points of the plan. So it never understates what was spent.
    """

    config: RunConfig
    plan: PrivacyPlan | None
    run: RunDirectory
    key: PrivateKey
    journal: Journal
    earlier: tuple[Segment, ...] = ()
    """What was begun under other plans."""
    _told: Spending | None = field(default=None, init=False)
    """What privacy.json covers of this plan."""

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
        weights: str,
        computed_by: int | None,
    ) -> "Ledger":
        """Find the run's key and journal or make them; privacy.json tells what was spent from now on.

        `reached` and `has_class_means` say what the weights at hand have already spent, `reached` in private steps; `weights` and `computed_by`
        say which weights they are, as in `Journal.open_attempt`, and all processes give the same. Raises InputError if private steps were
        begun with a key that is gone, since they can neither be replayed nor continued, if the journal lacks what the weights have seen, and
        if it lists spending that `plan` doesn't count.
        """
        journal = Journal(run.journal, writable=compute.is_main)
        spending = journal.spending
        if plan is not None and (reached > spending.steps or (has_class_means and spending.means_releases == 0)):
            raise InputError(f"{run.journal}: expected the record of {reached} private steps, found {spending.steps}; what was spent can't be told")
        earlier = _earlier(plan, journal)
        if compute.is_main and not run.key.exists():
            if run.journal.exists():
                raise InputError(f"{run.key}: expected the key of the private steps that {run.journal} lists; a new run needs a new directory")
            fixed = config.privacy.unsafe_fixed_key
            (PrivateKey.fresh() if fixed is None else PrivateKey.fixed(fixed)).save(run.key)
        compute.wait()  # the key is there, and all have read the journal before one writes to it
        key = PrivateKey.load(run.key)
        this = compute.joined_digest(fingerprint(data_fingerprint(), _result_deciding(config), compute.device, compute.processes))
        # A plan that goes on keeps the record it has, whatever this version would add to it, or its steps would be counted as another's.
        goes_on = plan is not None and plan in (segment.plan for segment in segments_of(journal)[-1:])
        journal.open_attempt(this, weights, computed_by=computed_by, plan=None if plan is None or goes_on else plan.record())
        ledger = cls(config, plan, run, key, journal, earlier)
        ledger._tell(journal.segments[-1][1])
        journal.ahead = ledger._tell
        return ledger

    def begin_class_means(self) -> np.random.Generator | SecureStream:
        """Journal a release of the class means and hand out its noise generator; InputError if the budget has no room for another."""
        spending = self._spending
        if self.plan is not None and not self.journal.has_begun(MEANS):
            if self.plan.class_means is None:
                raise InputError(f"{self.run.checkpoints}: expected a checkpoint with the class means, since the budget has no room for others")
            if spending.means_releases > 0 and self.plan.affordable_steps(spending.means_releases + 1) < spending.steps:
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
        affordable = self._affordable(self._spending)
        last = reached + self.journal.begun_since(reached) + affordable - self._spending.steps
        if last < reached:
            raise self._exhausted()
        return last

    def _exhausted(self) -> InputError:
        target = self.config.privacy.epsilon
        return InputError(f"{self.run.path}: the budget of epsilon = {target:g} is spent; nothing is left to resume with")

    def epsilon_at(self, step: int) -> float | None:
        """Epsilon of all that was begun to stand at `step`, from above; None where nothing is guaranteed.

        What this attempt had begun beyond `step` before a crash is left out, so that a replay logs what was logged before. It is what
        privacy.json said when the step was begun.
        """
        if self.plan is None or not self.key.guaranteed:
            return None
        spent = Spending(self._spending.steps - self.journal.begun_since(step), self._spending.means_releases)
        ahead = self._ahead(spent)
        return self.plan.epsilon_after(ahead.steps, ahead.means_releases)

    def close(self) -> None:
        """Report what was spent in the end, then destroy the key; a crash in between leaves that to the next call of train.py."""
        self.run.write_privacy(self.report())
        destroy(self.run.key)

    def report(self) -> dict[str, Any]:
        """What privacy.json says when the run is finished."""
        return privacy_report(
            self.plan, self._spending, self.config, status="finished", guaranteed=self.key.guaranteed, earlier=self.earlier
        )  # fmt: skip

    @property
    def _spending(self) -> Spending:
        """What was begun under this plan."""
        return self.journal.segments[-1][1]

    def _affordable(self, spending: Spending) -> int:
        """The most steps of this plan, spent ones included, that the target leaves."""
        if self.plan is None or spending.means_releases <= 1:
            return 0 if self.plan is None else self.plan.steps
        return self.plan.affordable_steps(spending.means_releases)

    def _ahead(self, spending: Spending) -> Spending:
        """`spending` with its steps rounded up to the next point at which privacy.json is written."""
        interval = max(1, self.plan.steps // _POINTS) if self.plan is not None else 1
        steps = min(-(-spending.steps // interval) * interval, self._affordable(spending))
        return Spending(max(spending.steps, steps), spending.means_releases)

    def _tell(self, coming: Spending) -> None:
        """See to it that privacy.json covers what is about to be begun."""
        ahead = self._ahead(coming)
        if self.journal.writable and ahead != self._told:
            self._told = ahead
            end = Spending(max(ahead.steps, self._affordable(coming)), max(1, coming.means_releases))
            self.run.write_privacy(privacy_report(
                self.plan, ahead, self.config, status="unfinished", guaranteed=self.key.guaranteed, earlier=self.earlier, end=end,
            ))  # fmt: skip


def _earlier(plan: PrivacyPlan | None, journal: Journal) -> tuple[Segment, ...]:
    """The journal's segments that had other plans; InputError if `plan` was made without them."""
    if plan is None:
        return ()
    segments = segments_of(journal)
    earlier = segments[:-1] if segments and segments[-1].plan == plan else segments
    if plan.before != (earlier[-1].mechanisms if earlier else ()):
        raise InputError(f"{journal.path}: another train.py has gone on with this run meanwhile; run the same command again")
    return earlier


def _result_deciding(config: RunConfig) -> str:
    """The parts of the config that a private step's result depends on; where the images lie isn't one of them.

    The stages are there as they were settled too, since a uniform draw ends where sampling does, which may change on resume.
    """
    compute = (config.compute.precision, config.compute.chunk_size, config.compute.chunks_at_once)
    data = replace(config.data, path="", test_path=None, index=None, description="", public=False)
    synthetic = replace(config.synthetic, cache=None)
    parts = (config.seed, data, config.network, config.stages, stages(config), config.hints, synthetic, config.private, config.privacy)
    central = (config.central, central_stages(config)) if config.uses_central else ()
    teacher = (config.teacher,) if config.teacher.used else ()
    return repr((*parts, *central, *teacher, compute))
