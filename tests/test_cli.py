"""The configuration as files and flags make it, the help page, and how scripts end."""

import dataclasses
import errno
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsyngen.cli import ScriptParser, config_help, dump_config, load_run_config, read_config, run_script
from dpsyngen.config import (
    DataConfig,
    EvaluationConfig,
    HintsConfig,
    PrivacyConfig,
    PrivateConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    StagesConfig,
    SyntheticConfig,
    Variant,
)
from dpsyngen.errors import InputError

FIELDS = {  # dotted name: the dataclass that has the field, and its name there
    f"{section}.{field.name}": (kind, field.name)
    for section, kind in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)
    for field in dataclasses.fields(kind)
} | {name: (RunConfig, name) for name in ("name", "seed")}


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal(paths, overrides=()) -> str:
    with pytest.raises(InputError) as caught:
        read_config(paths, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


# --- Files ---


def test_nothing_set_is_the_defaults():
    assert read_config([], []) == RunConfig()


def test_later_files_win_field_by_field(write):
    first = write("privacy: {epsilon: 3, delta: 1e-6}\nseed: 1\n", "first.yaml")
    second = write("privacy: {epsilon: 4}\n", "second.yaml")
    config = read_config([first, second], ["--seed", "7"])
    assert config.privacy == PrivacyConfig(epsilon=4.0, delta=1e-6)
    assert config.seed == 7


def test_options_are_merged_key_by_key(write):
    first = write("synthetic: {options: {a: 1, b: 2}}", "first.yaml")
    second = write("synthetic: {options: {b: three}}", "second.yaml")
    config = read_config([first, second], ["--synthetic.options.c", "0.5", "--synthetic.options.d=true"])
    assert config.synthetic.options == {"a": 1, "b": "three", "c": 0.5, "d": True}


def test_options_within_options_are_merged_by_their_dotted_names(write):
    first = write("synthetic: {options: {dead_leaves: {weight: 0.5, exponent: 2}, degraded: {dead_leaves: {leaves: 9}}}}", "first.yaml")
    second = write("synthetic: {options: {dead_leaves: {weight: 3}, salt.density: 0.1}}", "second.yaml")
    config = read_config([first, second], ["--synthetic.options.dead_leaves.exponent", "4", "--synthetic.options={salt: {grain: 2}}"])
    expected = {"dead_leaves.weight": 3, "dead_leaves.exponent": 4, "degraded.dead_leaves.leaves": 9, "salt.density": 0.1, "salt.grain": 2}
    assert config.synthetic.options == expected
    assert read_config([write(dump_config(config), "again.yaml")]) == config
    stages = "stages: {variant: custom, custom: [{name: a, source: synthetic, family: mixture, options: {dead_leaves: {weight: 2}}}]}"
    assert read_config([write(stages, "stages.yaml")]).stages.custom[0].options == {"dead_leaves.weight": 2}


def test_base_is_relative_to_the_file_and_below_it(write, tmp_path):
    (tmp_path / "deep").mkdir()
    write("seed: 1\nname: bottom\nprivacy: {epsilon: 1}", "bottom.yaml")
    write("privacy: {delta: 1e-7}\nseed: 2", "side.yaml")
    write("base: ../bottom.yaml\nprivacy: {epsilon: 2}", "deep/middle.yaml")
    top = write("base: [deep/middle.yaml, side.yaml]\nname: top")
    config = read_config([top])
    assert (config.name, config.seed, config.privacy) == ("top", 2, PrivacyConfig(epsilon=2, delta=1e-7))


@pytest.mark.parametrize("phase", ["synthetic", "central", "private"])
def test_the_later_of_steps_and_epochs_clears_the_other(write, phase):
    by_steps = write(f"{phase}: {{steps: 5}}", "steps.yaml")
    by_epochs = write(f"{phase}: {{epochs: 1.5}}", "epochs.yaml")

    def lengths(*arguments):
        section = getattr(read_config(*arguments), phase)
        return section.steps, section.epochs

    assert lengths([by_steps]) == (5, None)
    assert lengths([by_steps, by_epochs]) == (None, 1.5)
    assert lengths([by_epochs, by_steps]) == (5, None)
    assert lengths([by_steps], [f"--{phase}.epochs", "2"]) == (None, 2.0)
    assert lengths([by_epochs], [f"--{phase}.epochs=null", f"--{phase}.steps=3"]) == (3, None)


def test_yaml_scalars_are_of_version_1_2(write):
    config = read_config([write("privacy: {delta: 1e-5}\nprivate: {batch_size: 1e3, epochs: 2}\nseed: 1_000\ndata: {class_names: [no, 1:30, yes, ~x],"
                                " num_classes: 4}\nsampling: {s_max: .inf}")])  # fmt: skip
    assert config.privacy.delta == 1e-5
    assert (config.private.batch_size, type(config.private.batch_size)) == (1000, int)
    assert (config.private.epochs, type(config.private.epochs)) == (2.0, float)
    assert config.seed == 1000
    assert config.data.class_names == ("no", "1:30", "yes", "~x")
    assert config.sampling.s_max == float("inf")


# --- Flags ---


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--privacy.epsilon", "1"], "privacy.epsilon", 1.0),
        (["--privacy.epsilon=1e-1"], "privacy.epsilon", 0.1),
        (["--stages.tau1", "-3.5"], "stages.tau1", -3.5),
        (["--stages.tau1", "-1e-3"], "stages.tau1", -1e-3),
        (["--network.label-dropout", "0"], "network.label_dropout", 0.0),
        (["--network.label_dropout", "0.5"], "network.label_dropout", 0.5),
        (["--evaluation.classifiers", "[cnn, mlp]"], "evaluation.classifiers", ("cnn", "mlp")),
        (["--hints.synthetic-blur=[0, 1]"], "hints.synthetic_blur", (0.0, 1.0)),
        (["--data.expected_size", "null"], "data.expected_size", None),
        (["--data.public", "true"], "data.public", True),
        (["--data.path", "null"], "data.path", None),
        (["--data.path", "007"], "data.path", "007"),
        (["--data.path=a=b: [c"], "data.path", "a=b: [c"),
        (["--data.description", "true"], "data.description", "true"),
        (["--data.description="], "data.description", ""),
        (["--name", "12"], "name", "12"),
        (["--privacy.unsafe-fixed-key", "0" * 64], "privacy.unsafe_fixed_key", "0" * 64),
        (["--privacy", "{epsilon: 2}"], "privacy.epsilon", 2.0),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_flags(flags, field, value):
    found = read_config([], flags)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_flags_pass_through_a_script_in_any_order():
    parser = ScriptParser("A script.")
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--num-images", type=int)
    options, overrides = parser.parse(
        ["--stages.tau1", "-1e-3", "--config", "a.yaml", "--num_images", "3", "--data.description", "-x y", "--config=b.yaml", "--seed=4"]
    )
    assert options.config == [Path("a.yaml"), Path("b.yaml")]
    assert options.num_images == 3
    config = read_config([], overrides)
    assert (config.stages.tau1, config.data.description, config.seed) == (-1e-3, "-x y", 4)
    with pytest.raises(InputError, match="--num-images: invalid int value: 'x'"):
        parser.parse(["--num-images", "x"])
    with pytest.raises(InputError, match=r"--con: expected the name of a field"):
        read_config([], parser.parse(["--con", "a.yaml"])[1])


# --- What can't be used ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("privacy: {epsilom: 1}", ["privacy.epsilom", "did you mean privacy.epsilon?"]),
        ("privcy: {epsilon: 1}", ["privcy.epsilon", "did you mean privacy.epsilon?"]),
        ("epsilon: 1", ["epsilon", "did you mean privacy.epsilon?"]),
        ("trainig: {log_every: 1}", ["trainig.log_every", "did you mean tracking.log_every?"]),
        ("private: {ema: 1}", ["private.ema", "exist"]),
        ("zzzz: 1", ["zzzz", "--help"]),
        ('"a\\nb": 1', ["a\\nb"]),
        ("1: 2", ["1", "expected the name of a field"]),
        ("privacy: 3", ["privacy", "a mapping of fields", "got 3"]),
        ("privacy:", ["privacy", "a mapping of fields", "got null"]),
        ("privacy: {epsilon: high}", ["privacy.epsilon", "a number", "got 'high'"]),
        ("privacy: {epsilon: true}", ["privacy.epsilon", "a number", "got true"]),
        ("privacy: {epsilon: '1'}", ["privacy.epsilon", "a number", "got '1'"]),
        ("privacy: {epsilon: null}", ["privacy.epsilon", "a number", "got null"]),
        ("privacy: {epsilon: [1]}", ["privacy.epsilon", "a number", "got [1]"]),
        ("privacy: {epsilon: .nan}", ["privacy.epsilon", "a number", "got nan"]),
        ("privacy: {epsilon: .inf}", ["privacy.epsilon", "in [0.001, 100]", "got inf"]),
        (f"privacy: {{epsilon: 1{'0' * 400}}}", ["privacy.epsilon", "a number"]),
        ("privacy: {epsilon: 0}", ["privacy.epsilon", "in [0.001, 100]", "got 0"]),
        ("privacy: {epsilon: -1}", ["privacy.epsilon", "in [0.001, 100]", "got -1"]),
        ("privacy: {delta: 1}", ["privacy.delta", "(0, 1)", "got 1"]),
        ("privacy: {unsafe_fixed_key: abc}", ["privacy.unsafe_fixed_key", "64 hexadecimal digits"]),
        ("private: {batch_size: 1.5}", ["private.batch_size", "an integer", "got 1.5"]),
        ("private: {batch_size: true}", ["private.batch_size", "an integer", "got true"]),
        ("private: {batch_size: 60001}", ["private.batch_size", "at most", "60000", "got 60001"]),
        ("private: {steps: 1, epochs: 1}", ["private.steps", "private.epochs"]),
        ("private: {steps: null, epochs: null}", ["private.steps", "private.epochs", "got None"]),
        ("private: {steps: soon}", ["private.steps", "an integer or null", "got 'soon'"]),
        ("stages: {tau1: 2, tau2: -1}", ["stages.tau1", "below stages.tau2"]),
        ("stages: {variant: fine}", ["stages.variant", "dpdm or coarse", "got 'fine'"]),
        ("stages: {variant: finetune, holder: routed}", ["stages.holder", "shared"]),
        ("stages: {custom: [{name: a, source: private}]}", ["stages.custom", "no stages, since stages.variant is finetune_all", "['a']"]),
        ("stages: {variant: custom}", ["stages.custom", "at least one stage"]),
        ("stages: {custom: {name: a}}", ["stages.custom", "a list of mappings with some of name, source", "got {'name': 'a'}"]),
        ("stages: {custom: [{name: a}]}", ["stages.custom: entry 1: source", "synthetic or private or nonprivate, got nothing"]),
        ("stages: {custom: [{name: a, source: private}, {nam: b}]}", ["stages.custom: entry 2: 'nam'", "one of name, source, lower"]),
        ("stages: {custom: [{name: a, source: private, upper: high}]}", ["entry 1: upper", "a number or null", "got 'high'"]),
        ("stages: {custom: [{name: a, source: private, upper: .inf}]}", ["stage a: upper", "null for an open end", "got inf"]),
        ("stages: {custom: [{name: a, source: private, lower: 2, upper: 1}]}", ["stage a: lower", "below upper = 1.0", "got 2.0"]),
        ("stages: {custom: [{name: a.b, source: private}]}", ["stage a.b: name", "letters, digits"]),
        ("stages: {custom: [{name: a, source: private, family: dead_leaves}]}", ["stage a: family", "null, since its source is private"]),
        ("stages: {custom: [{name: a, source: synthetic, options: {x: 1}}]}", ["stage a: options", "family beside them"]),
        ("stages: {custom: [{name: a, source: synthetic, sigma_weights: [[0, 1], [1]]}]}", ["entry 1: sigma_weights", "lists of 2 numbers"]),
        ("stages: {custom: [{name: a, source: synthetic, sigma_weights: [[0, 1], [1, 1]]}]}", ["stage a: sigma_weights", "sigma_draw weights"]),
        ("stages: {custom: [{name: a, source: synthetic, sigma_draw: uniform, p_mean: 1}]}", ["stage a: p_mean", "since sigma_draw is uniform"]),
        ("stages: {replay: 1, variant: coarse, holder: routed}", ["stages.replay", "since with stages.holder routed"]),
        ("private: {sigma_draw: weights}", ["private.sigma_weights", "at least two pairs", "got ()"]),
        ("synthetic: {sigma_draw: weights, sigma_weights: [[1, 1], [0, 1]]}", ["synthetic.sigma_weights", "ascending"]),
        ("synthetic: {sigma_weights: [[0, 0], [1, 0]]}", ["synthetic.sigma_weights", "one of them above 0"]),
        ("data: {channels: 2}", ["data.channels", "1 or 3", "got 2"]),
        ("data: {channels: true}", ["data.channels", "1 or 3", "got true"]),
        ("data: {public: 1}", ["data.public", "true or false", "got 1"]),
        ("data: {public: yes}", ["data.public", "true or false", "got 'yes'"]),
        ("data: {class_names: cat}", ["data.class_names", "a list of texts or null", "got 'cat'"]),
        ("data: {class_names: [1, 2]}", ["data.class_names", "a list of texts or null", "got [1, 2]"]),
        ("data: {class_names: [a]}", ["data.class_names", "10 names"]),
        ("data: {source: folder}", ["data.path", "a path"]),
        ("data: {image_size: 30}", ["data.image_size", "a multiple of 4"]),
        ("name: 12", ["name", "text", "got 12"]),
        ("name: a/b", ["name", "plain directory name"]),
        ("hints: {synthetic_blur: [1]}", ["hints.synthetic_blur", "a list of 2 numbers", "got [1]"]),
        ("hints: {synthetic_blur: [0, 1, 2]}", ["hints.synthetic_blur", "a list of 2 numbers"]),
        ("hints: {synthetic_blur: [1, 0]}", ["hints.synthetic_blur", "low <= high"]),
        ("evaluation: {classifiers: [cnn, svm]}", ["evaluation.classifiers", "logistic_regression or mlp or cnn", "svm"]),
        ("evaluation: {classifiers: [cnn, cnn]}", ["evaluation.classifiers", "no name twice"]),
        ("evaluation: {reference: held_out}", ["data.held_out", "> 0"]),
        ("synthetic: {options: 3}", ["synthetic.options", "a mapping", "got 3"]),
        ("synthetic: {options: {a: [1]}}", ["synthetic.options", "a mapping of names"]),
        ("synthetic: {options: {1: 1}}", ["synthetic.options", "a mapping of names"]),
        ("synthetic: {options: {a: {}}}", ["synthetic.options", "to such mappings that aren't empty"]),
        ("synthetic: {options: {a: {1: 1}}}", ["synthetic.options", "a mapping of names"]),
        ("synthetic: {options: {1: {a: 1}}}", ["synthetic.options", "a mapping of names"]),
        ("compute: {device: tpu}", ["compute.device", "cuda", "got 'tpu'"]),
        ("seed: 1\nname: a\nseed: 2", ["line 3", "once", "'seed' twice"]),
        ("privacy:\n  epsilon: 1\n  epsilon: 2", ["line 3", "once", "'epsilon' twice"]),
        ("privacy: {epsilon: 1", ["expected YAML"]),
        ("a: b: c", ["expected YAML"]),
        ("a:\n\t- 1", ["line 2", "expected YAML"]),
        ("- seed", ["a mapping of fields", "got ['seed']"]),
        ("seed", ["a mapping of fields", "got 'seed'"]),
        ("", ["a mapping of fields", "got null"]),
        ("seed: 1\n---\nseed: 2", ["expected YAML", "another document"]),
        ("seed: !!python/object/apply:os.getpid []", ["expected YAML", "a tag"]),
        ("data: &d {held_out: 1}\nnetwork: *d", ["expected YAML", "an alias"]),
        ("? [a]\n: 1", ["expected YAML", "key"]),
        (f"seed: {'9' * 5000}", ["expected YAML"]),
        ("[" * 700, ["expected YAML"]),
        ("\x00", ["expected YAML"]),
        ("base: {a: 1}", ["base", "a file or a list of files"]),
        ("base: [1]", ["base", "a file or a list of files", "got [1]"]),
        ("base: nowhere.yaml", ["base", "nowhere.yaml", "No such file"]),
        ("base: config.yaml", ["base", "circle"]),
        ('base: "a\\0b"', ["base", "expected a YAML file"]),
    ],
)
def test_bad_files_are_refused_in_one_line(write, text, parts):
    path = write(text)
    message = refusal([path])
    assert message.startswith((str(path), "data.", "stages.custom", "private.sigma_weights"))  # or a field that the file doesn't set, but has to
    for part in parts:
        assert part in message


def test_files_that_are_not_there_or_not_files(tmp_path):
    assert refusal([tmp_path / "none.yaml"]).startswith(f"{tmp_path / 'none.yaml'}: expected a YAML file")
    assert refusal([tmp_path]).startswith(f"{tmp_path}: expected a YAML file")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert refusal([tmp_path / "binary.yaml"]).startswith(f"{tmp_path / 'binary.yaml'}: expected YAML")


def test_a_circle_of_two_files_is_named(write):
    one, _ = write("base: two.yaml", "one.yaml"), write("base: one.yaml", "two.yaml")
    message = refusal([one])
    assert "one.yaml" in message
    assert "two.yaml" in message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--privacy.epsilom", "1"], ["--privacy.epsilom", "did you mean privacy.epsilon?"]),
        (["--privcy.epsilon", "1"], ["--privcy.epsilon", "did you mean privacy.epsilon?"]),
        (["--private.learning-rates", "1"], ["--private.learning_rates", "did you mean private.learning_rate?"]),
        (["--privacy.epsilon", "0"], ["--privacy.epsilon", "in [0.001, 100]", "got 0"]),
        (["--privacy.epsilon", "high"], ["--privacy.epsilon", "a number", "got 'high'"]),
        (["--privacy.epsilon"], ["--privacy.epsilon", "a value"]),
        (["--privacy.epsilon="], ["--privacy.epsilon", "a number", "got null"]),
        (["--privacy.epsilon", "--seed", "1"], ["--privacy.epsilon", "a value"]),
        (["--privacy.epsilon.more", "1"], ["--privacy.epsilon", "a number"]),
        (["--data.class_names", "[a"], ["--data.class_names", "expected YAML"]),
        (["--data.class_names", "{a: 1, a: 2}"], ["--data.class_names", "'a' twice"]),
        (["extra.yaml"], ["extra.yaml", "expected a flag"]),
        (["-x"], ["-x", "expected a flag"]),
        (["--"], ["--", "expected a flag"]),
        (["--=1"], ["--", "expected a flag"]),
        (["--stages.tau1", "5"], ["--stages.tau1", "below stages.tau2 = 2.0", "got 5.0"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, parts):
    message = refusal([], flags)
    assert message.startswith(parts[0])
    for part in parts:
        assert part in message


def test_the_blame_falls_on_what_was_read_last(write):
    path = write("privacy: {epsilon: -1}")
    assert refusal([path]).startswith(f"{path}: privacy.epsilon: ")
    assert refusal([path], ["--privacy.epsilon=-2"]).startswith("--privacy.epsilon: ")
    assert read_config([path], ["--privacy.epsilon=2"]).privacy.epsilon == 2


# --- Round trip ---

TEXT = st.text(max_size=40)
PHASE = {
    "batch_size": st.integers(1, 60000),
    "learning_rate": st.floats(1e-12, 1e3),
    "ema_decay": st.floats(0, 0.99999),
    "p_mean": st.floats(-1e300, 1e300),
    "warmup": st.floats(0, 0.5),
    "decay": st.floats(0, 0.5),
}
LENGTH = st.one_of(st.tuples(st.integers(0, 10**9), st.none()), st.tuples(st.none(), st.floats(0, 1e9)))
ORDERED = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple)


def _with_length(kind, **fields):
    return st.builds(lambda length, **rest: kind(steps=length[0], epochs=length[1], **rest), LENGTH, **fields)


STAGE = st.builds(
    StageConfig, name=st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True), source=st.just("synthetic"), lower=st.none() | st.floats(-1e300, -1),
    upper=st.none() | st.floats(0, 1e300), weight=st.floats(1e-300, 1e300),
    family=TEXT, options=st.dictionaries(TEXT, st.booleans() | TEXT, max_size=2),
    sigma_draw=st.just("weights"), sigma_weights=st.none() | st.just(((-1.5, 0.0), (2.0, 1e-9), (3.0, 0.0))), replay=st.floats(0, 1e9),
)  # fmt: skip
CONFIGS = st.builds(
    RunConfig,
    name=TEXT.filter(lambda name: name not in ("", ".", "..") and not set(name) & set("/\\\0")),
    seed=st.integers(0, 2**64),
    data=st.builds(
        DataConfig, path=st.none() | TEXT, class_names=st.none() | st.lists(TEXT, min_size=3, max_size=3).map(tuple), num_classes=st.just(3),
        public=st.booleans(), description=TEXT, channels=st.sampled_from([1, 3]),
    ),
    stages=st.one_of(
        st.builds(StagesConfig, variant=st.sampled_from([variant for variant in get_args(Variant) if variant != "custom"]),
                  tau1=st.floats(-1e300, -1), tau2=st.floats(1, 1e300)),
        st.builds(StagesConfig, variant=st.just("custom"),
                  custom=st.lists(STAGE, min_size=1, max_size=3, unique_by=lambda stage: stage.name).map(tuple)),
    ),
    hints=st.builds(HintsConfig, synthetic_blur=ORDERED, synthetic_fade=ORDERED),
    synthetic=_with_length(SyntheticConfig, **PHASE, family=TEXT, options=st.dictionaries(
        TEXT, st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, max_size=4)),
    private=_with_length(PrivateConfig, **PHASE),
    privacy=st.builds(PrivacyConfig, epsilon=st.floats(1e-3, 100), delta=st.floats(1e-300, 0.5),
                      unsafe_fixed_key=st.none() | st.text("01234567e", min_size=64, max_size=64)),
    sampling=st.builds(SamplingConfig, s_max=st.floats(min_value=0)),
    evaluation=st.builds(EvaluationConfig, classifiers=st.sampled_from([(), ("cnn",), ("mlp", "cnn"), ("cnn", "logistic_regression", "mlp")])),
)  # fmt: skip


@settings(max_examples=25)
@given(CONFIGS)
def test_a_dump_reads_back_as_the_same_configuration(tmp_path_factory, config):
    text = dump_config(config)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_config([path]) == config
    assert dump_config(read_config([path])) == text
    read_as_1_1 = yaml.safe_load(text)  # by PyYAML's own rules, which other tools follow
    assert read_as_1_1["synthetic"]["options"] == config.synthetic.options
    assert read_as_1_1["data"]["class_names"] == (config.data.class_names and list(config.data.class_names))
    assert [read_as_1_1["name"], read_as_1_1["privacy"]["epsilon"]] == [config.name, config.privacy.epsilon]


def test_a_dump_is_complete():
    dumped = yaml.safe_load(dump_config(RunConfig()))
    sections = {section: fields for section, fields in dumped.items() if isinstance(fields, dict)}
    assert {f"{section}.{name}" for section, fields in sections.items() for name in fields} | {"name", "seed"} == set(FIELDS)


def test_a_run_directory_gives_its_configuration_back(tmp_path):
    config = read_config([], ["--privacy.epsilon", "3", "--data.held_out=10"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_run_config(tmp_path) == config
    changed = load_run_config(tmp_path, ["--sampling.guidance", "2"])
    assert changed == dataclasses.replace(config, sampling=SamplingConfig(guidance=2.0))
    with pytest.raises(InputError, match=r"nowhere: is not a run directory .*; run train\.py first"):
        load_run_config(tmp_path / "nowhere")


# --- Help ---


def test_help_shows_every_field_with_its_docstring_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = config_help()
    assert max(map(len, page.splitlines())) <= 100
    assert {name.removeprefix("--") for name in re.findall(r"--[a-z_0-9.]+", page)} == set(FIELDS) | {"help", "run"}
    prose = re.sub(r"[^\w.]+", "", page)  # without boxes and line breaks
    for dotted, (kind, name) in FIELDS.items():
        docstring = re.search(rf'^    {name}: .*\n    """([^"]+?)"""', _source(kind, name), re.MULTILINE)
        assert docstring, f"{dotted} has no docstring"
        meaning = re.sub(r"[^\w.]+", "", docstring.group(1))
        start = prose.index(f"{dotted}")
        assert meaning in prose[start : start + 700]
    assert "(default: [logistic_regression, mlp, cnn])" in " ".join(page.replace("│", " ").replace("'", "").split())
    for shown in ("{dpdm,coarse,", "[FLOAT, FLOAT]", "INT|null", "{true,false}", "(default: 1e-05)", "(default: null)", "(default: .inf)"):
        assert shown in page


def _source(kind, name) -> str:
    """The source of the class that declares the field last: `kind` or a base of it."""
    return inspect.getsource(next(base for base in kind.__mro__ if name in base.__annotations__))


def test_help_of_a_script_has_its_own_flags_and_only_its_sections(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    parser = ScriptParser("Draw images.", sections=("sampling",))
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run's directory")
    parser.add_argument("--dry", action="store_true", help="only look")
    with pytest.raises(SystemExit) as caught:
        parser.parse(["--help"])
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: ")
    for shown in ("Draw images.", "--run DIR", "the run's directory", "--dry ", "--sampling.guidance FLOAT"):
        assert shown in page
    assert "--privacy.epsilon" not in page


# --- How a script ends ---


def end_of(main, monkeypatch, capsys, argv=("/some/where/train.py", "--a")):
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


def raiser(error):
    def main(argv):
        assert argv == ["--a"]
        raise error

    return main


def test_bad_input_ends_in_one_line_and_status_2(monkeypatch, capsys):
    assert end_of(raiser(InputError("a: expected b,\ngot c")), monkeypatch, capsys) == (2, "train.py: a: expected b, got c\n")


def test_only_the_main_process_speaks(monkeypatch, capsys):
    """Unless it has nothing to say: then, after a while, the process does that failed."""
    monkeypatch.setattr("dpsyngen.cli._HEAD_START", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert end_of(raiser(InputError("a")), monkeypatch, capsys) == (2, "train.py: process 1: a\n")
    assert end_of(raiser(KeyboardInterrupt()), monkeypatch, capsys) == (130, "")
    monkeypatch.setenv("RANK", "0")
    assert end_of(raiser(InputError("a")), monkeypatch, capsys) == (2, "train.py: a\n")


def test_an_interrupt_ends_in_one_line_and_status_130(monkeypatch, capsys):
    assert end_of(raiser(KeyboardInterrupt()), monkeypatch, capsys) == (130, "train.py: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_ends_in_one_line_and_status_2(monkeypatch, capsys):
    def main(argv):
        with open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123 (as any library would)
            file.write(b"x")

    status, message = end_of(main, monkeypatch, capsys)
    assert status == 2
    assert re.fullmatch(r"train\.py: .+: No space left on device\n", message)


def test_a_forbidden_file_is_named(monkeypatch, capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "/some/file")
    assert end_of(raiser(error), monkeypatch, capsys) == (2, "train.py: /some/file: Permission denied\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--a"])
    with pytest.raises(ZeroDivisionError):
        run_script(raiser(ZeroDivisionError()))
    with pytest.raises(FileNotFoundError):
        run_script(raiser(FileNotFoundError(2, "No such file")))


def test_success_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    run_script(lambda argv: None)
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_hangs_up_is_no_error():
    script = "from dpsyngen.cli import run_script\nrun_script(lambda argv: print('x\\n' * 10**6))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"x\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
