"""Every file under configs/ can be used, and those that reproduce a paper have the paper's numbers."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from dpsyngen.cli import dump_config, read_config
from dpsyngen.config import RunConfig, Variant
from dpsyngen.errors import InputError
from dpsyngen.noise_levels import stages
from dpsyngen.swap.compose import expect_alike
from dpsyngen.sweep.grid import build_cells
from synthetic_generators import make_generator

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
DATASETS = ("mnist", "fashion_mnist")
"""Those with every variant."""
WHOLE = [path for path in FILES if path.parent.name in (*DATASETS, "cifar10")]
OVERLAYS = [path for path in FILES if path.parent.name not in (*DATASETS, "cifar10", "base", "examples", "experiments")]
EXAMPLES = [path for path in FILES if path.parent.name == "examples"]
EXPERIMENTS = [path for path in FILES if path.parent.name == "experiments"]
WITH_CELLS = [path for path in EXPERIMENTS if "cells" in yaml.safe_load(path.read_text())]
EPSILONS = {"0.2": 0.2, "1": 1.0, "10": 10.0}


@functools.cache
def load(*paths: Path) -> RunConfig:
    return read_config(paths)


def names(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_both_datasets_have_every_variant():
    expected = {f"{variant}.yaml" for variant in get_args(Variant) if variant != "custom"} | {"dp_syngen.yaml"}
    for dataset in DATASETS:
        assert {path.name for path in WHOLE if path.parent.name == dataset and "-" not in path.stem} == expected


@pytest.mark.parametrize("path", FILES, ids=names)
def test_every_file_says_what_it_is_and_where_its_numbers_are_from(path):
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert path.read_text().startswith("# ")
    assert re.search(r"arXiv \d{4}\.\d{5}|Numbers: |DPDM|LeCun", comment)


@pytest.mark.parametrize("path", WHOLE, ids=names)
def test_every_run_loads_and_is_what_its_name_says(path, tmp_path):
    config, (recipe, _, epsilon) = load(path), path.stem.partition("-")
    assert config.name == f"{path.parent.name}_{path.stem}"
    assert config.data.source == path.parent.name
    assert config.stages.variant == ("finetune_context" if recipe == "dp_syngen" else recipe)
    assert not epsilon or config.privacy.epsilon == EPSILONS[epsilon]
    make_generator(config.synthetic.family, config.data.channels, config.data.image_size, **config.synthetic.options)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("overlay", OVERLAYS, ids=names)
@pytest.mark.parametrize("path", WHOLE, ids=names)
def test_every_overlay_fits_every_run(path, overlay):
    plain = load(path)
    if "dp_syngen" in overlay.stem and plain.hints.kind == "none":
        with pytest.raises(InputError, match=r"teacher.share: expected 0, since hints.kind is none"):
            load(path, overlay)
        return
    config = load(path, overlay)
    assert config.stages == plain.stages
    assert config.data == plain.data
    for section, fields in yaml.safe_load(overlay.read_text()).items():
        for field in fields:
            changed = getattr(getattr(config, section), field)
            assert changed == getattr(getattr(load(overlay), section), field)


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_examples_of_stages_fit_every_run(example, tmp_path):
    for path in WHOLE:
        config = load(path, example)
        assert config.stages.stages == load(example).stages.stages
        for stage in stages(config):
            if stage.source == "synthetic":
                make_generator(stage.family, config.data.channels, config.data.image_size, **stage.options)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("name", EPSILONS)
def test_epsilon_overlays(name):
    config = load(CONFIGS / "mnist" / "dpdm.yaml", CONFIGS / "epsilon" / f"{name}.yaml")
    assert config.privacy.epsilon == EPSILONS[name]
    assert config.network.parameterisation == ("v" if name == "0.2" else "edm")


@pytest.mark.parametrize("dataset", DATASETS)
def test_dpdm_has_the_published_numbers(dataset):
    config = load(CONFIGS / dataset / "dpdm.yaml")
    phase = config.private
    assert (phase.batch_size, phase.epochs, phase.steps, phase.noise_multiplicity) == (4096, 300, None, 32)
    assert (phase.learning_rate, phase.ema_decay, phase.p_mean, phase.p_std, phase.warmup, phase.decay) == (3e-4, 0.999, -1.2, 1.2, 0, 0)
    assert (config.privacy.epsilon, config.privacy.delta, config.privacy.clipping_norm) == (10, 1e-5, 1)
    assert (config.network.backbone, config.network.width, config.network.depth, config.network.label_dropout) == ("unet", 32, 2, 0.1)
    assert config.network.sigma_data == pytest.approx(3**-0.5, abs=1e-4)
    assert config.hints.kind == "none"
    assert (config.sampling.sampler, config.sampling.steps, config.sampling.guidance) == ("ddim", 50, 1)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("variant", ["coarse", "cleaning", "coarse_cleaning", "finetune", "finetune_all", "finetune_context"])
def test_dp_syngen_has_the_published_numbers(dataset, variant):
    config, dpdm = load(CONFIGS / dataset / f"{variant}.yaml"), load(CONFIGS / dataset / "dpdm.yaml")
    assert (config.stages.tau1, config.stages.tau2, config.hints.kind) == (-3, 2, "none")
    phase = config.synthetic
    assert (phase.family, phase.batch_size, phase.epochs, phase.steps, phase.learning_rate, phase.noise_multiplicity) == (
        "dead_leaves", 128, 300, None, 4e-4, 4)  # fmt: skip
    assert config.private == dataclasses.replace(dpdm.private, epochs=200, noise_multiplicity=8)
    assert (config.network, config.privacy, config.sampling) == (dpdm.network, dpdm.privacy, dpdm.sampling)


@pytest.mark.parametrize("path", WHOLE, ids=names)
def test_the_laptop_overlay_is_small(path):
    config = load(path, CONFIGS / "laptop.yaml")
    assert config.network.backbone == "lean"
    assert config.private.batch_size * config.private.noise_multiplicity * config.private.steps <= 400_000  # images denoised
    assert config.synthetic.batch_size * config.synthetic.noise_multiplicity * config.synthetic.steps <= 400_000


def expect_experiment(config: RunConfig, name: str) -> None:
    """It is named like its file, is measured on held-out images, can be drawn and taught, and takes a minute to four on one core.

    A synthetic phase that cells share may take longer.
    """
    assert config.name == name
    data, evaluation, private, synthetic = config.data, config.evaluation, config.private, config.synthetic
    assert (data.held_out, data.expected_size, config.network.backbone) == (5000, 55_000, "lean")
    assert evaluation.reference == ("test" if data.source == "fashion_mnist" else "held_out")
    assert (data.source, config.privacy.epsilon) == ("mnist", 10) or name in ("gain", "recipe")
    assert config.network.width <= 48
    assert private.batch_size * private.noise_multiplicity * private.steps <= 160_000
    assert synthetic.batch_size * synthetic.noise_multiplicity * synthetic.steps <= (160_000 if synthetic.cache is None else 240_000)
    assert config.sampling.num_images * config.sampling.steps <= 60_000
    for stage in stages(config):
        if stage.source == "synthetic":
            make_generator(stage.family, data.channels, data.image_size, **stage.options)


@pytest.mark.parametrize("path", WITH_CELLS, ids=names)
def test_every_cell_of_an_experiment_can_be_run(path):
    cells = build_cells([], [], [], path)
    assert len({cell.name for cell in cells}) == len(cells) > 1
    for cell in cells:
        expect_experiment(cell.config, path.stem)


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path not in WITH_CELLS], ids=names)
def test_every_experiment_without_cells_can_be_run(path):
    expect_experiment(load(path), "experiment" if path.stem == "base" else path.stem)


def test_the_runs_whose_stages_are_swapped_go_together():
    paths = (CONFIGS / "experiments" / "swap_real.yaml", CONFIGS / "experiments" / "swap_synthetic.yaml")
    real, synthetic = map(load, paths)
    expect_alike(real, synthetic, paths)
    assert [stage.source for stage in real.stages.stages] == ["nonprivate"] * 3
    assert [stage.source for stage in synthetic.stages.stages] == ["synthetic"] * 3
    assert (real.private.steps, real.private.batch_size) == (synthetic.synthetic.steps, synthetic.synthetic.batch_size)
    assert (real.sampling, real.evaluation, real.network) == (synthetic.sampling, synthetic.evaluation, synthetic.network)


def test_thresholds_are_those_that_the_experiment_is_about():
    chosen = {cell.values["cell"]: cell.config.stages for cell in build_cells([], [], [], CONFIGS / "experiments" / "thresholds.yaml")}
    assert [c.tau1 for c in chosen.values() if c.variant == "cleaning"] == list(range(-3, 3))
    assert [c.tau2 for c in chosen.values() if c.variant == "coarse"] == list(range(5))
    assert {(c.tau1, c.tau2) for c in chosen.values() if c.variant in ("coarse_cleaning", "finetune")} == {(-3, 2)}
    for name, config in chosen.items():
        assert name.startswith("cleaning") == (config.variant == "cleaning")
        assert "tau" not in name or name.endswith(f"tau{'1' if config.variant == 'cleaning' else '2'} = "
                                                 f"{int(config.tau1 if config.variant == 'cleaning' else config.tau2)}")  # fmt: skip


def test_families_are_compared_in_the_cleaning_and_the_coarse_stage():
    cells = build_cells([], [], [], CONFIGS / "experiments" / "families.yaml")
    found = {(cell.config.stages.variant, cell.config.synthetic.family) for cell in cells[1:]}
    assert found == {(variant, family) for variant in ("cleaning", "coarse") for _, family in found} and len(found) == len(cells) - 1
    for cell in cells[1:]:
        assert cell.values["cell"] == f"{cell.config.stages.variant}, {cell.config.synthetic.family.replace('_', ' ')}"


def test_each_degraded_cell_spoils_what_its_name_says():
    unspoilt = {"no programmatic images", "dead leaves", "dead leaves, again"}
    for cell in build_cells([], [], [], CONFIGS / "experiments" / "degraded.yaml"):
        options, name = cell.config.synthetic.options, cell.values["cell"]
        assert cell.config.synthetic.family == ("dead_leaves" if name in unspoilt else "degraded")
        if "distinct" in options:
            assert name == f"{options['distinct']} different"
        elif options:
            assert (name, options["strength"]) == (options["artefact"], 1)
