"""What a config costs, or what noise it needs, without any data: python -m dpsyngen.privacy --config configs/mnist/dp_syngen.yaml.

And what a run has spent, finished or not: python -m dpsyngen.privacy --run runs/NAME.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dpsyngen.cli import ScriptParser, read_config, run_script
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError

if TYPE_CHECKING:
    from dpsyngen.privacy.plan import PrivacyPlan

# Beyond this nothing is private any more, and pricing it exactly would take more memory than it is worth.
_MEANINGLESS_EPSILON = 1000
# What epsilon = 0.001 takes at millions of full batches; beyond, accountants meet the limits of floating point.
_MOST_NOISE = 1e7


def main(argv: list[str]) -> None:
    """Parse, calibrate or price, show."""
    parser = ScriptParser(
        "Find the noise that a config's privacy.epsilon needs, or what epsilon a given noise costs, or what a run has spent. Touches no data.",
        sections=("data", "private", "privacy", "hints"),
    )
    parser.prog = "python -m dpsyngen.privacy"
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="a YAML file; later ones override earlier ones")
    parser.add_argument("--run", type=Path, metavar="DIR",
                        help="instead: what this run has spent, from its journal; fails if its privacy.json says less")  # fmt: skip
    parser.add_argument("--noise-multiplier", type=float, help="the noise of DP-SGD, in multiples of the clipping norm, instead of calibrating it")
    parser.add_argument("--accountant", choices=["pld", "rdp"], default="pld", metavar="{pld,rdp}",
                        help="rdp: show the bound by Renyi DP as well; the claim is by privacy loss distributions (pld) in any case")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw epsilon over the private steps: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options, overrides = parser.parse(argv)
    if options.run is not None:
        if options.config or overrides:
            raise InputError(f"--run: expected no config beside it, got {[*map(str, options.config), *overrides][0]}; the run has its own")
        _show_spent(options.run, as_json=options.json)
        return
    config = read_config(options.config, overrides)
    plan = _plan(config, options.noise_multiplier)
    from rich.console import Console

    from dpsyngen.privacy.price import price, price_tables, save_curve

    result = price(plan, renyi=options.accountant == "rdp")
    if options.plot is not None:
        save_curve(plan, options.plot, f"{config.name}: {plan.steps:,} steps, q = {plan.sampling_rate:.4g}, noise {plan.noise_multiplier:.4g}")
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    given = "as given" if options.noise_multiplier is not None else "calibrated"
    console = Console(soft_wrap=True)
    for table in price_tables(result, f"Privacy of {config.name}, noise multiplier {plan.noise_multiplier:.5g} {given}"):
        console.print(table)


def _show_spent(path: Path, *, as_json: bool) -> None:
    from dpsyngen.privacy.spent import lines_of, spent
    from dpsyngen.run_directory import RunDirectory

    found = spent(RunDirectory(path))
    print(json.dumps(found, indent=2, allow_nan=False) if as_json else "\n".join([str(path), *lines_of(found)]))


def _plan(config: RunConfig, noise_multiplier: float | None) -> "PrivacyPlan":
    size = config.data.expected_size
    if size is None:
        raise InputError("data.expected_size: expected a number, since null counts the private images")
    if not config.is_private:
        raise InputError("stages.variant: expected a variant under differential privacy, got nonprivate, which guarantees nothing")
    if noise_multiplier is not None and not 0 < noise_multiplier <= _MOST_NOISE:
        raise InputError(f"--noise-multiplier: expected a number > 0, at most {_MOST_NOISE:g}, got {noise_multiplier:g}")
    from dpsyngen.privacy import accounting  # after the cheap checks: importing SciPy and torch takes seconds
    from dpsyngen.privacy.plan import PrivacyPlan

    if noise_multiplier is None:
        return PrivacyPlan.calibrate(config, size)
    plan = PrivacyPlan.with_noise(config, size, noise_multiplier)
    if accounting.renyi_epsilon_of(plan.mechanisms(plan.steps), plan.delta) > _MEANINGLESS_EPSILON:
        raise InputError(f"--noise-multiplier: expected enough noise for an epsilon below about {_MEANINGLESS_EPSILON}, got {noise_multiplier:g}")
    return plan


if __name__ == "__main__":
    sys.argv[0] = "python -m dpsyngen.privacy"  # what complaints begin with
    run_script(main)
