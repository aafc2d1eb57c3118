"""Repeat and select (Papernot and Steinke, arXiv 2110.03620): a random number of runs of settings drawn at random, of which only the best leaves.

Its files:
    sweeps/NAME/selection.json        the terms: public
    sweeps/NAME/private/draws.json    how many runs of which settings, and the noise of their scores: drawn once, before anything runs
    sweeps/NAME/private/runs/TOKEN/   the runs; TOKEN is random, so that no name tells a number
    sweeps/NAME/winner/               the run that may leave, once all have ended; private/ is then removed
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpsyngen.errors import InputError
from dpsyngen.files import write_file, write_json, writing
from dpsyngen.model_card import model_card
from dpsyngen.privacy.continuation import Segment
from dpsyngen.privacy.journal import Spending
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import SecureStream, destroy
from dpsyngen.privacy.report import mechanisms_of
from dpsyngen.privacy.secure_noise import rounded_gaussian
from dpsyngen.run_directory import RunDirectory
from dpsyngen.sweep.cells import Job, run_jobs
from dpsyngen.sweep.table import read_object
from dpsyngen.sweep.terms import Terms

_WITHHELD = "none: one of the runs that a selection chooses from; only its winner may leave"


@dataclass(frozen=True)
class Draw:
    """One run of a selection, as drawn beforehand."""

    token: str
    """Random: names the run's directory and breaks ties."""
    setting: int
    """Its place among the settings."""
    noise: int
    """The noise of its score, in steps of the score's grid."""


def select(directory: Path, terms: Terms, places: Sequence[dict[str, str]]) -> Path | None:
    """Run what is unfinished, then let the best run leave: the path of the winner, or None if the number of runs that was drawn is 0.

    A run that fails is neither left out nor counted as worst, since either could tell of private images: all must end before one is
    chosen, and the next call takes it up with its own key, so that it comes to what it would have come to. Raises InputError if the
    directory holds a selection on other terms, and SystemExit, with the failures named on stderr, while a run has not ended.
    """
    winner, private = RunDirectory(directory / "winner"), directory / "private"
    draws = _draws(directory, terms)
    if not winner.path.exists():
        jobs = [Job(terms.cells[draw.setting].config, RunDirectory(private / "runs" / draw.token)) for draw in draws]
        _run(jobs, [terms.plans[draw.setting] for draw in draws], places)
        if not jobs:
            return None
        scores = [terms.score.value(read_object(job.run.path / "evaluation.json"), draw.noise) for job, draw in zip(jobs, draws, strict=True)]
        best = max(range(len(jobs)), key=lambda number: (scores[number], draws[number].token))
        _hand_over(jobs[best], terms, winner)
    winner.candidate.unlink(missing_ok=True)
    for run in (private / "runs").glob("*"):
        destroy(RunDirectory(run).key)
    if private.exists():
        with writing(private):
            shutil.rmtree(private)
    return winner.path


def _draws(directory: Path, terms: Terms) -> list[Draw]:
    """What was drawn for this directory, or is drawn now: before anything runs, once and for all."""
    public, drawn, identity = directory / "selection.json", directory / "private" / "draws.json", terms.identity()
    if public.exists():
        if read_object(public) != json.loads(json.dumps(identity)):
            raise InputError(f"{public}: expected the same selection, since another one costs its own epsilon; or a new directory by --to")
        if (directory / "winner").exists():
            return []
        if not drawn.is_file():
            raise InputError(f"{drawn}: expected what was drawn when the selection began; drawing again isn't paid for")
        return [Draw(**draw) for draw in read_object(drawn)["runs"]]
    draws = []
    for _ in range(terms.repeats.draw()):
        noise = rounded_gaussian(SecureStream(secrets.token_bytes(32)), 1, terms.score.grid.exponent)
        draws.append(Draw(secrets.token_hex(8), secrets.randbelow(len(terms.cells)), int(noise)))
    with writing(drawn):
        drawn.parent.mkdir(exist_ok=True)
        drawn.parent.chmod(0o700)
    write_json(drawn, {"runs": [asdict(draw) for draw in draws]}, mode=0o600)
    write_json(public, identity)  # last: nothing has run before it is there
    return draws


def _run(jobs: Sequence[Job], plans: Sequence[PrivacyPlan], places: Sequence[dict[str, str]]) -> None:
    """Bring all runs to their end, or raise SystemExit; nothing shows how many there are."""
    for job in jobs:
        job.prepare()
        write_file(job.run.candidate, f"{_WITHHELD}\n")

    def withhold() -> None:
        for job in jobs:
            if not job.remaining:
                _withhold(job)

    withhold()
    run_jobs(jobs, places, after=withhold, silent=True)
    for job, plan in zip(jobs, plans, strict=True):
        if job.failure is None and not _is_within(read_object(job.run.privacy), plan):
            destroy(job.run.key)
            shutil.rmtree(job.run.path)
            job.failure = "it was resumed under other conditions and spent more than was paid for; it is removed, to be run anew with a new key"
    if failed := [job for job in jobs if job.failure is not None]:
        sys.stdout.flush()
        sys.stderr.writelines(f"{job.run.path}: failed: {job.failure}\n" for job in failed)
        sys.stderr.write("no winner is chosen before every run has ended; the same command goes on\n")
        raise SystemExit(1)


def _withhold(job: Job) -> None:
    """Let nothing in the directory of a run that has ended promise a guarantee: it holds for the winner, at the selection's price."""
    report = read_object(job.run.privacy)
    if report["epsilon"] is not None:
        report |= {"epsilon": None, "guarantee": _WITHHELD}
        write_file(job.run.model / "README.md", model_card(job.config, report))
        job.run.write_privacy(report)


def _is_within(report: dict[str, Any], plan: PrivacyPlan) -> bool:
    """Whether a run spent what the plan says or less: a crash can have made it begin steps again, or the class means."""
    spending = Spending(steps=report["steps_begun"], means_releases=1)
    return spending.steps <= plan.steps and report["mechanisms"] == mechanisms_of(Segment(plan, spending))


def _hand_over(job: Job, terms: Terms, winner: RunDirectory) -> None:
    """Let the run's files state the price of the selection, and nothing that tells when it ran; then put it in its place."""
    run = job.run
    report = terms.report(read_object(run.privacy))
    write_file(run.model / "README.md", model_card(job.config, report))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()] if run.metrics.exists() else []
    for line in lines:
        line.pop("epsilon", None)  # of one run by itself
    write_file(run.metrics, "".join(f"{json.dumps(line)}\n" for line in lines))
    provenance = run.path / "samples" / "provenance.json"
    write_json(provenance, read_object(provenance) | {"created": datetime.now(UTC).isoformat(timespec="seconds")})
    run.write_privacy(report)
    with writing(winner.path):
        os.replace(run.path, winner.path)
