"""Prove that the tests notice: each break of tests/mutations.py, in a copy of the code, must turn a test red.

    python tests/mutate.py [--only REGEX]

Exit status 0 if every break is caught, 1 if one survives, if a patch's text isn't found any more, or if the tests fail unbroken.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
COPIED = ("dpsyngen", "synthetic_generators", "tests", "configs", "pyproject.toml", "train.py", "sample.py", "evaluate.py")
TIME_LIMIT = 300
"""Seconds for one break's tests; a test run that hangs has not caught anything."""

CRASHES = ("NameError", "AttributeError", "TypeError", "ImportError", "ModuleNotFoundError")
"""Errors that tell of a patch that no longer fits the code around it, not of a test that noticed."""


def copy_code(directory: Path) -> Path:
    """A copy of what the tests need, to be patched; the working tree stays as it is."""
    copy = directory / "copy"
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@contextmanager
def patched(copy: Path, mutation: Mutation) -> Iterator[None]:
    """While open, `copy` has the break. Raises LookupError if its text doesn't occur exactly once."""
    file = copy / mutation.file
    text = file.read_text()
    if text.count(mutation.before) != 1:
        raise LookupError(f"{mutation.name}: expected its text once in {mutation.file}, found it {text.count(mutation.before)} times")
    file.write_text(text.replace(mutation.before, mutation.after))
    try:
        yield
    finally:
        file.write_text(text)


def run_in(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, importing its dpsyngen and its tests; bytecode is not cached, since patches come faster than file times tell."""
    path = f"{copy}{os.pathsep}{copy / 'tests'}"
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "500"}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=TIME_LIMIT)


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status for some tests of the copy, up to the first failure; that test's name and error, or what pytest said last."""
    arguments = ("-m", "pytest", "-q", "-x", "-rf", "--tb=no", "-p", "no:cacheprovider")
    try:
        result = run_in(copy, *arguments, *(f"tests/{test}" for test in tests))
    except subprocess.TimeoutExpired:
        return -1, f"still running after {TIME_LIMIT} s"
    failed = re.search(r"^FAILED .+?::(.+?)(?: - (\w+)|$)", result.stdout, re.MULTILINE)
    if failed and failed[2] in CRASHES:
        return -1, f"the patch crashes in {failed[1]} ({failed[2]})"
    if result.returncode == 1 and failed is None:
        return -1, "an error outside the tests: " + result.stdout[-200:]
    return result.returncode, f"{failed[1]} ({failed[2]})" if failed else (result.stdout + result.stderr).strip()[-300:]


def baseline(copy: Path, mutations: Sequence[Mutation]) -> str | None:
    """What is wrong with the unbroken copy, if anything: another dpsyngen is imported, or a test that should notice a break fails."""
    imported = run_in(copy, "-c", "import dpsyngen; print(dpsyngen.__file__)").stdout.strip()
    if not imported.startswith(str(copy)):
        return f"tests import {imported}, not the copy in {copy}"
    status, said = run_tests(copy, sorted({test for mutation in mutations for test in mutation.tests}))
    return None if status == 0 else f"exit status {status}: {said}"


def chosen(only: str) -> list[Mutation]:
    """The breaks whose name matches a regular expression, ignoring case."""
    return [mutation for mutation in MUTATIONS if re.search(only, mutation.name, re.IGNORECASE)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code on purpose, in a copy, and see that the tests notice.")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the breaks whose name matches, ignoring case")
    mutations = chosen(parser.parse_args().only)
    if not mutations:
        print("no break has such a name; there are: " + ", ".join(mutation.name for mutation in MUTATIONS))
        return 1
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = copy_code(Path(directory).resolve())
        started = time.perf_counter()
        wrong = baseline(copy, mutations)
        print(f"unbroken: {'all tests pass' if wrong is None else wrong} ({time.perf_counter() - started:.1f} s)", flush=True)
        if wrong is not None:
            return 1
        print(f"{'rule':>4}  {'break':48}  {'seconds':>7}  caught by", flush=True)
        for mutation in mutations:
            started = time.perf_counter()
            try:
                with patched(copy, mutation):
                    status, said = run_tests(copy, mutation.tests)
            except LookupError as error:
                status, said = -1, str(error)
            caught = said if status == 1 else f"NOTHING (exit status {status}): {said}"
            survivors += status != 1
            print(f"{mutation.rule:4}  {mutation.name:48}  {time.perf_counter() - started:7.1f}  {caught}", flush=True)
    print(f"{len(mutations) - survivors} of {len(mutations)} breaks caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
