"""Networks of two runs swapped stage by stage while sampling: python -m dpsyngen.swap --run REAL --with SYNTHETIC [--to DIR].

What a stage's network is worth beside another one in its place, as in the experiment of Choi et al. (arXiv 2412.09842, section 3) that
motivates learning the cleaning and the coarse stage from programmatic images: networks of their own for every stage, learnt from real images
in one run and from programmatic ones in another, and every choice between them sampled from and evaluated.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpsyngen.cli import ScriptParser, load_run_config, run_script
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import Dataset, ImageDataset, load_reference, load_train
from dpsyngen.denoiser import RoutedDenoiser
from dpsyngen.errors import InputError
from dpsyngen.evaluation import FeatureExtractor, build_extractor, evaluate, save_picture
from dpsyngen.files import read_json, write_file, write_json, writing
from dpsyngen.launcher import settled
from dpsyngen.run_directory import MAY_CHANGE
from dpsyngen.samples import describe_origin, model_sha256, read_samples, write_samples
from dpsyngen.sampling import sample_set
from dpsyngen.saved_model import load_trained
from dpsyngen.swap import report
from dpsyngen.swap.compose import Swap, choices, compose, expect_alike, stages_by_noise


def main(argv: list[str]) -> None:
    """Parse, check that the runs go together, draw and evaluate the swaps that are missing, write what they came to."""
    parser = ScriptParser(
        "Swap the networks of two finished runs with a network for each stage, stage by stage, while sampling; evaluate every choice. Run it "
        "again to resume it. It spends no privacy.", sections=("sampling", "evaluation", "compute"),
    )  # fmt: skip
    parser.prog = "python -m dpsyngen.swap"
    parser.add_argument("--run", type=Path, required=True, help="the first run's directory; settings not given are its own")
    parser.add_argument("--with", type=Path, required=True, dest="second", metavar="PATH",
                        help="the second run's, whose networks replace those of the first")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the results go (default: swaps/NAME)")
    parser.add_argument("--swaps", metavar="TEXT", help="which stages to swap: none,coarse,cleaning+coarse (default: every choice)")
    options, overrides = parser.parse(argv)
    for flag in overrides:
        if flag.startswith("--") and not flag.removeprefix("--").replace("-", "_").startswith((*MAY_CHANGE, "seed")):
            name = flag.partition("=")[0]
            raise InputError(f"{name}: expected a field of sampling, evaluation or compute, or the seed, since the others were settled by training")
    paths, trained = (options.run, options.second), (load_run_config(options.run), load_run_config(options.second))
    expect_alike(*trained, paths)
    config, swaps = settled(load_run_config(options.run, overrides)), choices(trained[0], options.swaps)
    directory = options.to or Path("swaps") / config.name
    compute = Compute.start(config.compute)
    networks = [_load(path, its_config, compute) for path, its_config in zip(paths, trained, strict=True)]
    record = _record(directory, config, trained, paths, networks)
    missing = [swap for swap in swaps if not (directory / swap.name / "evaluation.json").is_file()]
    if compute.is_main:
        _write(directory, record, trained[0], swaps)
    if missing:
        work = _Work.prepare(directory, config, compute, *networks)
        for swap in tqdm(missing, desc="swaps", unit="swap", disable=None if compute.is_main else True):
            work.finish(swap)
            if compute.is_main:
                _write(directory, record, trained[0], swaps)
    if compute.is_main:
        report.save_picture(directory, record)
        print(f"swaps finished: {len(record['swaps'])}; see {directory / 'table.md'} and {directory / 'swap.png'}")


@dataclass(frozen=True)
class _Work:
    """Drawing and evaluating, all swaps alike: the same noise, labels, real images and feature network."""

    directory: Path
    config: RunConfig
    compute: Compute
    first: RoutedDenoiser
    second: RoutedDenoiser
    train: Dataset | None
    reference: ImageDataset
    extractor: FeatureExtractor | None

    @classmethod
    def prepare(cls, directory: Path, config: RunConfig, compute: Compute, first: RoutedDenoiser, second: RoutedDenoiser) -> "_Work":
        """Load the real images and make the feature network, once for all swaps; InputError if they can't be had."""
        evaluation, data = config.evaluation, config.data
        train = load_train(data) if evaluation.features in ("auto", "classifier") else None
        extractor = None if evaluation.features == "none" else build_extractor(evaluation.features, train, config.seed, compute)
        return cls(directory, config, compute, first, second, train, load_reference(data, evaluation.reference), extractor)

    def finish(self, swap: Swap) -> None:
        """Draw and evaluate a swap; it leaves samples/, evaluation.png, and at last evaluation.json, in a directory of its name."""
        config, compute, place = self.config, self.compute, self.directory / swap.name
        images, labels = self._samples(swap, place / "samples")
        result = evaluate(images, labels, self.train, self.reference, config.evaluation, config.seed,
                          public=config.data.public, compute=compute, extractor=self.extractor)  # fmt: skip
        if compute.is_main:
            save_picture(result, images, labels, place / "evaluation.png")
            write_json(place / "evaluation.json", result)

    def _samples(self, swap: Swap, place: Path) -> tuple[Any, Any]:
        """The swap's sample set, drawn and written if it isn't there: images uint8 [N, H, W, C], labels int64 [N]."""
        config, compute = self.config, self.compute
        if (place / "provenance.json").is_file():
            return read_samples(place)
        denoiser = compose(self.first, self.second, swap)
        images, labels = sample_set(denoiser, config, compute)
        if compute.is_main:
            write_samples(place, images, labels, describe_origin(config, denoiser) | {"swapped": list(swap.stages)})
        return images, labels


def _load(path: Path, config: RunConfig, compute: Compute) -> RoutedDenoiser:
    return load_trained(path, config, compute.device)  # type: ignore[return-value]  # expect_alike has seen that it is


def _record(
    directory: Path, config: RunConfig, trained: Sequence[RunConfig], paths: Sequence[Path], networks: Sequence[RoutedDenoiser]
) -> dict[str, Any]:
    """What swap.json holds beside its swaps; InputError if the directory has one of other runs or settings."""
    runs = {which: report.spending(its_config, path) | {"model_sha256": model_sha256(network)}
            for which, its_config, path, network in zip(("run", "with"), trained, paths, networks, strict=True)}  # fmt: skip
    stages = [{"name": stage.name, "lower": stage.lower, "upper": stage.upper} for stage in stages_by_noise(trained[0])]
    record = {"stages": stages, "runs": runs, "privacy": report.together(list(runs.values())), "settings": report.settings(config), "swaps": {}}
    file = directory / "swap.json"
    if file.is_file():
        old = read_json(file)
        for name in ("stages", "runs", "settings"):
            if old.get(name) != record[name]:
                raise InputError(f"{file}: expected swaps of the same runs with the same settings, got others ({name}); or a new directory by --to")
        record["swaps"] = old.get("swaps", {})
    return record


def _write(directory: Path, record: dict[str, Any], config: RunConfig, swaps: Sequence[Swap]) -> None:
    """swap.json and table.md with the swaps that are finished; before the first one too, so that nothing else is drawn in their place."""
    known = choices(config, ",".join([*record["swaps"], *(swap.name for swap in swaps)]))
    finished = {swap: directory / swap.name / "evaluation.json" for swap in known}
    record["swaps"] = {swap.name: report.swap_record(swap, read_json(file)) for swap, file in finished.items() if file.is_file()}
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "swap.json", record)
    write_file(directory / "table.md", report.table(record))


if __name__ == "__main__":
    sys.argv[0] = "python -m dpsyngen.swap"  # what complaints begin with
    run_script(main)
