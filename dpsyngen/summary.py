"""What a run came to, in a few lines: python -m dpsyngen.summary runs/NAME."""

from pathlib import Path
from typing import Any

from dpsyngen.cli import OneLineParser, run_script
from dpsyngen.errors import InputError
from dpsyngen.files import read_json
from dpsyngen.model_card import rounded_up


def main(argv: list[str]) -> None:
    """Print the summary of one run directory."""
    parser = OneLineParser(prog="python -m dpsyngen.summary", description="Print what a run spent and what it is worth.")
    parser.add_argument("run", type=Path, help="the run's directory")
    print(summary(parser.parse_args(argv).run))


def summary(run: Path) -> str:
    """The privacy spent, the metrics and the pictures of a run, a line each.

    Raises InputError if there is no privacy.json; metrics and pictures that aren't there yet are named with the script that makes them.
    """
    if not (run / "privacy.json").is_file():
        raise InputError(f"{run / 'privacy.json'}: expected a run directory, but there is no such file; run train.py first")
    lines = [f"{run}", f"  privacy  {_privacy(read_json(run / 'privacy.json'))}"]
    if (run / "evaluation.json").is_file():
        lines += [f"  {kind:8} {text}" for kind, text in _metrics(read_json(run / "evaluation.json"))]
    else:
        lines.append(f"  utility  not measured yet: python evaluate.py --run {run}")
    pictures = [str(run / name) for name in ("samples/grid.png", "evaluation.png") if (run / name).is_file()]
    lines.append(f"  look at  {' and '.join(pictures)}" if pictures else f"  images   none yet: python sample.py --run {run}")
    return "\n".join(lines)


def _privacy(report: dict[str, Any]) -> str:
    unfinished = "" if report.get("status") == "finished" else f" ({report.get('status')})"
    if report.get("epsilon") is None:
        return f"NOTHING IS GUARANTEED: {report.get('guarantee') or report.get('randomness')}{unfinished}"
    if "at_the_end" in report:
        unfinished = f" (at most this so far; the whole run will have spent {rounded_up(report['at_the_end']['epsilon'])})"
    epsilon, delta = rounded_up(report["epsilon"]), f"{report['delta']:g}"
    return f"epsilon = {epsilon} at delta = {delta}; the unit is {report['unit']}; {report['adjacency']}{unfinished}"


def _metrics(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    metrics = evaluation.get("metrics", {})
    scores = [f"{100 * metrics[name]['value']:.1f} % by {name.removeprefix('cas_').replace('_', ' ')}" for name in metrics if name.startswith("cas_")]
    others = [f"{metrics[name].get('name', name)} {metrics[name]['value']:.4g}" for name in metrics if not name.startswith("cas_")]
    rows = [("utility", f"accuracy on real images, trained on synthetic ones alone: {', '.join(scores)}")] if scores else []
    return [*rows, ("fidelity", ", ".join(others))] if others else rows


if __name__ == "__main__":
    run_script(main)
