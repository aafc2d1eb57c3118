"""The list of deliberate breaks stays true: each text is still in the code, each test still exists. No break is run here."""

import ast
import re
from pathlib import Path

import pytest
from mutate import ROOT, patched, run_tests
from mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_break_fits_the_code(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.before) == 1
    broken = text.replace(mutation.before, mutation.after)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(text))
    for test in mutation.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), f"{test} does not exist"


def test_names_tell_breaks_apart_and_are_those_of_the_documentation() -> None:
    rows = re.findall(r"^\|.*`test_.*\|(.*)\|$", (ROOT / "docs" / "privacy.md").read_text(), re.MULTILINE)
    documented = [name.strip() for row in rows for name in row.split(";") if name.strip()]
    assert sorted(documented) == sorted(mutation.name for mutation in MUTATIONS)
    assert len(set(documented)) == len(documented)


def test_patch_is_taken_back_and_refused_where_its_text_is_not_found(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("x = 1\n")
    with patched(tmp_path, Mutation("two", 1, "code.py", "x = 1", "x = 2", ())):
        assert file.read_text() == "x = 2\n"
    assert file.read_text() == "x = 1\n"
    for text in ("y = 1", "x = 1\nx = 1"):
        file.write_text(text)
        with pytest.raises(LookupError, match="expected its text once"), patched(tmp_path, Mutation("two", 1, "code.py", "x = 1", "x = 2", ())):
            pass


def test_only_a_red_test_counts_as_caught(tmp_path: Path) -> None:
    """A green test, no test of that name, a file that can't be imported, a fixture that fails and code that crashes have caught nothing."""
    (tmp_path / "tests").mkdir()
    for name, text in {
        "red": "def test_it():\n    assert 1 == 2",
        "green": "def test_it():\n    pass",
        "unimportable": "import nothing_of_that_name\ndef test_it():\n    pass",
        "crashing": "def test_it():\n    nothing_of_that_name",
        "fixture": "import pytest\n@pytest.fixture\ndef broken():\n    assert False\ndef test_it(broken):\n    pass",
    }.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    assert run_tests(tmp_path, ["test_red.py::test_it"]) == (1, "test_it (assert)")
    for nothing in ("green.py::test_it", "green.py::test_other", "unimportable.py::test_it", "crashing.py::test_it", "fixture.py::test_it"):
        assert run_tests(tmp_path, [f"test_{nothing}"])[0] != 1
