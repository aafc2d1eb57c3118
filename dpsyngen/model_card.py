"""The model card of a released model: what it is, what it cost in privacy, what it is for. It holds nothing else derived from private data."""

import math
from typing import Any

import dpsyngen
from dpsyngen.config import RunConfig
from dpsyngen.strict_yaml import dump_yaml

_FRONT_MATTER = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["differential-privacy", "diffusion", "synthetic-data", "dpsyngen"],
}
_INTENDED_USE = """\
Drawing synthetic images in place of the private ones: to develop and test software, to train and compare models, to teach. Drawing costs
no further privacy, however many images are drawn and whatever is done with them."""
_LIMITS = (
    "The guarantee is for one unit, as stated above. Who contributed several images is protected less.",
    "What many images have in common, such as what a class looks like, is not hidden: the model is there to tell it.",
    "Privacy adds up: every further model or statistic released from the same images costs its own epsilon.",
    "An image shows nobody in particular and proves nothing about anybody. Don't take decisions about people from such images.",
    "Noise hides rare things first: small groups and unusual images are drawn worse than common ones, or not at all.",
    "Labels are balanced unless chosen otherwise, so their frequencies say nothing about those of the private images.",
    "What a model trained on synthetic images is worth on real ones has to be measured on real ones.",
)


def model_card(config: RunConfig, report: dict[str, Any]) -> str:
    """The card, Markdown with YAML front matter as model hubs read it, from the run's public settings and the content of privacy.json."""
    sections = [
        f"# {config.name}\n\n{_summary(config, report)}",
        f"## Use\n\n{_usage(config)}",
        f"## Privacy\n\n{_privacy(report)}",
        f"## Data\n\n{_data(config)}",
        f"## Intended use\n\n{_INTENDED_USE}",
        f"## Limits\n\n{_bullets(_LIMITS)}",
    ]
    return f"---\n{dump_yaml(_FRONT_MATTER)}---\n\n" + "\n\n".join(sections) + "\n"


def metrics_section(evaluation: dict[str, Any]) -> str:
    """The content of evaluation.json as a further section of the card; only for where it may be released."""
    rows = ["| metric | value | reference | protocol |", "|---|---|---|---|"]
    for name, record in evaluation["metrics"].items():
        rows.append(f"| {record.get('name', name)} | {record['value']:.4g} | {record['reference']} | {record['protocol']} |")
    return f"\n## Metrics\n\nThese were {evaluation['private']}.\n\n" + "\n".join(rows) + "\n"


def _summary(config: RunConfig, report: dict[str, Any]) -> str:
    channels, height, width = config.data.image_shape
    kind = f"{height} x {width} {'grayscale' if channels == 1 else 'RGB'} images"
    classes = f" in {config.data.num_classes} classes" if config.data.num_classes else ""
    claim = "NO privacy guarantee"
    if report["epsilon"] is not None:
        claim = f"({rounded_up(report['epsilon'])}, {report['delta']:g})-differential privacy"
    return (
        f"A diffusion model that draws {kind}{classes}, trained with {claim} by dpsyngen {dpsyngen.__version__} "
        f"(variant {config.stages.variant}, backbone {config.network.backbone})."
    )


def _usage(config: RunConfig) -> str:
    labels = "class_labels=[0, 1, 2], " if config.data.num_classes >= 3 else "num_images=3, "
    return (
        "```python\nfrom dpsyngen.pipeline import DPSynGenPipeline\n\n"
        'pipeline = DPSynGenPipeline.from_pretrained("path/to/this/directory")\n'
        f"images = pipeline({labels}seed=0).images\n```"
    )


def _privacy(report: dict[str, Any]) -> str:
    """The statement of privacy.json."""
    if report["epsilon"] is None:
        reason = report.get("guarantee") or report.get("randomness")
        return f"**Nothing is guaranteed:** {reason}.\n\nCaveats:\n\n{_bullets(report['caveats'])}"
    rows = {
        "unit": report["unit"],
        "adjacency": report["adjacency"],
        "epsilon": rounded_up(report["epsilon"]),
        "delta": f"{report['delta']:g}",
        "accountant": report["accountant"],
        "randomness": report["randomness"],
        **({"noise": report["noise"]} if "noise" in report else {}),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    mechanisms = _bullets([_mechanism(mechanism) for mechanism in report["mechanisms"]])
    selection = ""
    if "selection" in report:
        chosen = report["selection"]
        selection = (
            f"\n\nThis is the best of a random number of runs ({chosen['mean_runs']:g} on average), each of one of {chosen['settings']} settings of "
            f"{', '.join(chosen['fields'])}, by {chosen['score']}. The choice is in epsilon; what touched the private images is named for one run."
        )
    return f"{table}{selection}\n\nWhat touched the private images:\n\n{mechanisms}\n\nCaveats:\n\n{_bullets(report['caveats'])}"


def rounded_up(epsilon: float) -> str:
    """Four digits after the point that never claim less than was spent."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"


def _mechanism(mechanism: dict[str, Any]) -> str:
    parameters = [
        f"{name.replace('_', ' ')} {value:.6g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in mechanism.items()
        if name not in ("name", "type")
    ]
    return f"{mechanism['name']} ({mechanism['type']}): {', '.join(parameters)}"


def _data(config: RunConfig) -> str:
    data = config.data
    described = data.description.strip() or "The owner of the images gave no description of them (`data.description`)."
    declared = []
    if data.expected_size is not None:
        declared.append(f"Declared size: {data.expected_size} images.")
    if data.class_names is not None:
        declared.append(f"Declared classes, in the order of their labels: {', '.join(data.class_names)}.")
    declared.append("The images are declared public." if data.public else "The images are private and not part of this release.")
    return f"{described}\n\n{' '.join(declared)}{_programmatic(config)}"


def _programmatic(config: RunConfig) -> str:
    """What it learnt from that is not the private images."""
    central = " From deformed copies of the class means it learnt before it saw an image, at no further cost." if config.uses_central else ""
    if not config.uses_synthetic:
        return central
    config = config.without_secrets  # a family of one's own lies in a file
    families = {stage.family or config.synthetic.family: None for stage in config.stages.stages if "synthetic" in stage.sources}
    replayed = ", and with them more programmatic images" if config.stages.replays else ""
    return f"\n\nBefore them came programmatic images ({', '.join(families)}){replayed}, at no cost in privacy.{central}"


def _bullets(items: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
