"""Copy out of a run what may leave, and nothing else: python -m dpsyngen.release --run runs/NAME --to DIR."""

import shutil
import sys
from pathlib import Path
from typing import Any

from dpsyngen.cli import OneLineParser, dump_config, load_run_config, run_script
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.files import read_json, replacing_directory, writing
from dpsyngen.model_card import metrics_section
from dpsyngen.run_directory import RunDirectory

SAMPLES = ("samples/images.npz", "samples/grid.png", "samples/provenance.json")
EVALUATION = ("evaluation.json", "evaluation.png")
_EVALUATION_FLAG, _MODEL_FLAG = "--include-evaluation-that-is-not-private", "--include-model-that-is-not-private"


def main(argv: list[str]) -> None:
    """Parse, release, say what stays behind."""
    what = "Copy what may leave out of a finished run, and destroy its key."
    parser = OneLineParser(prog="python -m dpsyngen.release", description=what, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="the run's directory")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the release goes; must not exist yet, or be empty")
    parser.add_argument(_EVALUATION_FLAG, dest="evaluation", action="store_true",
                        help="copy metrics against images that aren't declared public as well; the guarantee doesn't cover them")  # fmt: skip
    parser.add_argument(_MODEL_FLAG, dest="model", action="store_true", help="release a model for which nothing is guaranteed all the same")
    options = parser.parse_args(argv)
    left = release(options.run, options.to, evaluation_without_privacy=options.evaluation, model_without_privacy=options.model)
    print(f"{options.to}: the release of {options.run}")
    for name, reason in left.items():
        print(f"  without {name}: {reason}")


def release(run: Path, to: Path, *, evaluation_without_privacy: bool = False, model_without_privacy: bool = False) -> dict[str, str]:
    """Copy what may leave the finished run `run` into the new directory `to`, which is complete or absent; destroy the run's key.

    Only files that are named here are copied, whatever else lies in the run's directory, and their times are those of the copying,
    since a run's own tell how long its steps took. Paths and a fixed key are taken out of config.yaml.
    Returns why a file that was there is not in the release, by its name.
    Raises InputError: the run isn't finished or damaged; nothing is guaranteed for its model; `to` is taken or can't be written.
    """
    files, to = RunDirectory(run), to.resolve()
    config = load_run_config(run)
    _expect_releasable(files, config, model_without_privacy)
    with writing(to):
        if to.exists() and not (to.is_dir() and not any(to.iterdir())):
            raise InputError(f"{to}: expected a directory that doesn't exist yet, or is empty")
        to.parent.mkdir(parents=True, exist_ok=True)
    from dpsyngen.privacy.randomness import destroy  # after the cheap checks: importing torch takes seconds
    from dpsyngen.saved_model import FILES

    destroy(files.key)
    evaluation = read_json(run / EVALUATION[0]) if (run / EVALUATION[0]).is_file() else None
    withheld = _withheld(config, evaluation, evaluation_without_privacy)
    names = ["privacy.json", "metrics.jsonl", *(f"model/{name}" for name in FILES), *SAMPLES, *EVALUATION]
    optional = {"metrics.jsonl", *SAMPLES, *EVALUATION}
    with replacing_directory(to) as partial:
        (partial / "config.yaml").write_text(dump_config(config.without_secrets), encoding="utf-8")
        for name in names:
            if name not in withheld and ((run / name).is_file() or name not in optional):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / name, partial / name)
        if evaluation is not None and EVALUATION[0] not in withheld:
            with (partial / "model" / "README.md").open("a", encoding="utf-8") as card:
                card.write(_metrics(run, evaluation))
    return {name: reason for name, reason in withheld.items() if (run / name).is_file()}


def _expect_releasable(files: RunDirectory, config: RunConfig, model_without_privacy: bool) -> None:
    """Raise InputError unless training is finished, the model is whole, and its release is covered by a guarantee or asked for."""
    if files.candidate.exists():
        raise InputError(f"{files.path}: expected a run of its own or the winner of a selection, got one of the runs that it is chosen from")
    if not files.is_finished:
        raise InputError(f"{files.path}: training is not finished; run train.py --run {files.path} again to resume it")
    guaranteed = read_json(files.privacy).get("epsilon") is not None
    if not (guaranteed or config.data.public or model_without_privacy):
        raise InputError(f"{files.privacy}: expected a guarantee, but epsilon is null; {_MODEL_FLAG} releases the model all the same")
    import torch

    from dpsyngen.saved_model import FILES, load_trained

    for name in FILES:
        if not (files.model / name).is_file():
            raise InputError(f"{files.model / name}: expected a file that training wrote, but there is none")
    load_trained(files.path, config, torch.device("cpu"))  # these tensors and no others


def _withheld(config: RunConfig, evaluation: dict[str, Any] | None, evaluation_without_privacy: bool) -> dict[str, str]:
    """Which files stay behind, and why."""
    from dpsyngen.evaluation.metrics import PUBLIC

    reasons = {}
    if config.tracking.log_private_diagnostics_without_dp:
        reasons["metrics.jsonl"] = "it holds private diagnostics (tracking.log_private_diagnostics_without_dp)"
    declared = config.data.public and evaluation is not None and evaluation.get("private") == PUBLIC
    if not (declared or evaluation_without_privacy):
        reason = f"it was computed against images that data.public doesn't declare public; {_EVALUATION_FLAG} copies it all the same"
        reasons |= dict.fromkeys(EVALUATION, reason)
    return reasons


def _metrics(run: Path, evaluation: dict[str, Any]) -> str:
    try:
        return metrics_section(evaluation)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{run / EVALUATION[0]}: expected the JSON that evaluate.py wrote ({error!r})") from error


if __name__ == "__main__":
    sys.argv[0] = "python -m dpsyngen.release"  # what complaints begin with
    run_script(main)
