"""Where the stages end: python -m dpsyngen.stages --config configs/mnist/coarse_cleaning.yaml --config configs/laptop.yaml."""

import sys
from pathlib import Path

from dpsyngen.cli import ScriptParser, read_config, run_script
from dpsyngen.errors import InputError
from dpsyngen.files import write_json, writing
from dpsyngen.launcher import settled
from dpsyngen.stages.chosen import chosen_families
from dpsyngen.stages.reference import PRIVATE_FLAG, Reference

_STEPS, _BATCH, _POINTS, _TOLERANCE = 400, 128, 25, 0.1


def main(argv: list[str]) -> None:
    """Parse, check, measure, write, propose."""
    parser = _parser()
    options, overrides = parser.parse(argv)
    config = settled(read_config(options.config, overrides))
    for flag, value, least in (("--steps", options.steps, 1), ("--batch", options.batch, 1), ("--points", options.points, 3)):
        if value < least:
            raise InputError(f"{flag}: expected an integer >= {least}, got {value}")
    if not 0 < options.tolerance <= 1:
        raise InputError(f"--tolerance: expected a number in (0, 1], got {options.tolerance:g}")
    families = chosen_families(options.families, config)
    reference = Reference.choose(config.data, options.reference, private_allowed=options.private_reference_without_dp)
    directory = options.to or Path("stages") / config.name
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if reference.is_private:
        print(f"{reference.statement}.", flush=True)
    from rich.console import Console  # after the cheap checks: importing torch takes seconds

    from dpsyngen.compute import Compute
    from dpsyngen.stages.plots import save_picture
    from dpsyngen.stages.report import as_json, config_line, custom_line, remarks, table
    from dpsyngen.stages.survey import Effort, survey

    compute = Compute.start(config.compute)
    if compute.processes > 1:
        raise InputError(f"python -m dpsyngen.stages: expected one process, got {compute.processes}")
    effort = Effort(options.steps, options.batch, options.points, options.tolerance)
    found = survey(config, families, reference.load(config.seed), effort, compute)
    write_json(directory / "stages.json", as_json(found, config, reference, effort))
    save_picture(directory / "stages.png", found, reference)
    Console(soft_wrap=True).print(table(found))
    print("\n".join(remarks(found)))
    print(f"{reference.statement}.\nCurves: {directory / 'stages.json'} and {directory / 'stages.png'}")
    if own := custom_line(found, config.synthetic):
        print(f"As stages with their own families:\n{own}\nOr for the variants with tau1 and tau2:")
    print(config_line(found))


def _parser() -> ScriptParser:
    parser = ScriptParser(
        "Measure where programmatic images teach denoising as well as a reference set does: where cleaning may end, and coarse begin.",
        sections=("data", "network", "synthetic", "compute"),
    )
    parser.prog = "python -m dpsyngen.stages"
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="a YAML file; later ones override earlier ones")
    parser.add_argument("--reference", default="config", metavar="{config,mnist,fashion_mnist,PATH}",
                        help="the images to do as well on: the config's training images, if data.public declares them public (default); or another "
                        "public set, best one that looks like the private images: a folder, .zip, .npz or .tar")  # fmt: skip
    parser.add_argument(PRIVATE_FLAG, action="store_true",
                        help="look at training images that are not public, unprotected: the result is NOT private and in no epsilon, and thresholds "
                        "chosen from it leak; a public look-alike as --reference costs nothing")  # fmt: skip
    parser.add_argument("--families", metavar="NAME,...", help="the generators to compare (default: all that need no options)")
    parser.add_argument("--steps", type=int, default=_STEPS, metavar="INT", help=f"training steps of each denoiser (default: {_STEPS})")
    parser.add_argument("--batch", type=int, default=_BATCH, metavar="INT", help=f"images a step (default: {_BATCH})")
    parser.add_argument("--points", type=int, default=_POINTS, metavar="INT", help=f"noise levels measured (default: {_POINTS})")
    parser.add_argument("--tolerance", type=float, default=_TOLERANCE, metavar="FLOAT",
                        help=f"how much more error still counts as equal, as a fraction (default: {_TOLERANCE})")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="DIR", help="where stages.json and stages.png go (default: stages/NAME)")
    return parser


if __name__ == "__main__":
    sys.argv[0] = "python -m dpsyngen.stages"  # what complaints begin with
    run_script(main)
