"""Measure a run's synthetic images against real ones: python evaluate.py --run runs/NAME [--evaluation.classifier_seeds 5]."""

from pathlib import Path

from rich.console import Console

from dpsyngen.cli import ScriptParser, load_run_config, run_script
from dpsyngen.compute import Compute
from dpsyngen.data import load_reference, load_train
from dpsyngen.errors import InputError
from dpsyngen.evaluation import evaluate, metrics_table, save_picture
from dpsyngen.files import write_json
from dpsyngen.samples import read_samples


def main(argv: list[str]) -> None:
    """Parse, load, evaluate, write."""
    parser = ScriptParser(
        "Measure a run's synthetic images against real ones by CAS, FID, precision and recall: evaluation.json and evaluation.png.",
        sections=("evaluation", "compute", "data"),
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's directory")
    parser.add_argument("--samples", type=Path, help="another sample set's directory than RUN/samples; the results then go there")
    options, overrides = parser.parse(argv)
    for flag in overrides:
        if flag.startswith("--") and not flag.startswith(("--evaluation.", "--compute.", "--data.", "--seed")):
            raise InputError(f"{flag}: expected a field of evaluation, compute or data, or the seed, since the others were settled by training")
    config = load_run_config(options.run, overrides)
    samples = options.samples or options.run / "samples"
    if not (samples / "images.npz").is_file():
        raise InputError(f"{samples / 'images.npz'}: expected the run's synthetic images, but there is no such file; run sample.py first")
    images, labels = read_samples(samples)
    compute = Compute.start(config.compute)
    reference = load_reference(config.data, config.evaluation.reference)
    train = load_train(config.data) if config.evaluation.features in ("auto", "classifier") else None
    result = evaluate(
        images, labels, train, reference, config.evaluation, config.seed,
        public=config.data.public, compute=compute,
    )  # fmt: skip
    if not compute.is_main:
        return
    out = options.samples or options.run
    save_picture(result, images, labels, out / "evaluation.png")
    write_json(out / "evaluation.json", result)
    console = Console()
    console.print(metrics_table(result))
    console.print(f"{out / 'evaluation.json'} and {out / 'evaluation.png'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
