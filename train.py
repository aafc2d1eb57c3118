"""Train a denoiser: python train.py --config configs/mnist/dp_syngen.yaml [--config overlay.yaml ...] [--privacy.epsilon 1 ...]"""

from contextlib import nullcontext
from pathlib import Path

from dpsyngen.cli import ScriptParser, dump_config, is_main_process, read_config, run_script
from dpsyngen.config import RunConfig
from dpsyngen.interruption import signals_deferred, signals_raised
from dpsyngen.launcher import settled
from dpsyngen.run_directory import CHANGED_PRIVACY_FLAG, RunDirectory


def main(arguments: list[str]) -> None:
    """Plan with --dry-run; else train, or resume, in the run directory."""
    parser = ScriptParser("Train a denoiser on programmatic images, then on private ones under differential privacy.")
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="a YAML file; later ones override earlier ones")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run directory (default: runs/NAME); an unfinished run in it is resumed")
    parser.add_argument(CHANGED_PRIVACY_FLAG, action="store_true", help="go on with other privacy settings; epsilon is of both parts together")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what it costs; touches no private data")
    options, overrides = parser.parse(arguments)
    config = settled(read_config(options.config, overrides))
    if options.dry_run:
        from dpsyngen.planning import print_plan

        print_plan(config)
        return
    run = RunDirectory(options.run or Path("runs") / config.name)
    changed = options.resume_with_changed_privacy and not run.is_finished
    run.expect_config(dump_config(config), resuming=True, changed_privacy=changed)
    if run.is_finished:
        destroy_key_left_behind(run)
    else:
        with signals_raised():
            start(config, run, changed_privacy=changed)
    if is_main_process():
        print(f"{run.path}: training is finished; next: python sample.py --run {run.path}")


def start(config: RunConfig, run: RunDirectory, *, changed_privacy: bool) -> None:
    """Train from the beginning or the newest checkpoint, on as many processes as were launched."""
    with signals_deferred():  # an import that is cut short can end in any error
        from dpsyngen.compute import Compute  # after the cheap checks: importing torch takes seconds
        from dpsyngen.tracking import following
        from dpsyngen.training import prepare, train

    compute = Compute.start(config.compute)
    prepared = prepare(config, compute, run, changed_privacy=changed_privacy)
    directory = run.open(dump_config(config), changed_privacy=changed_privacy) if compute.is_main else nullcontext()
    with directory, following(config, run, main=compute.is_main) as trackers:
        finished_meanwhile = compute.is_main and run.is_finished  # by another train.py, before its lock was free
        if not compute.largest_over_processes(int(finished_meanwhile)):
            train(prepared, run, trackers)


def destroy_key_left_behind(run: RunDirectory) -> None:
    """Destroy a finished run's key, if it was killed between writing its last file and that."""
    from dpsyngen.privacy.randomness import destroy  # imports SciPy, and Ctrl-C before `main` ends in a traceback

    if is_main_process():
        destroy(run.key)


if __name__ == "__main__":
    run_script(main)
