"""The lowest versions that ``setup.cfg`` admits are versions that work."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Tools that look at the sources and take no part in a test.
NOT_RUN = {"mypy", "pre-commit", "ruff", "types-PyYAML"}
NOT_RUN |= {"ipykernel", "jupytext", "mkdocs-material", "mkdocstrings-python", "nbclient"}


def lowest_versions():
    """``name==version`` of every requirement, at the lowest version that ``setup.cfg`` admits."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [*setup["options"]["install_requires"].split("\n"), *setup["options.extras_require"]["dev"].split("\n")]
    for line in filter(None, lines):
        name = re.match(r"[\w-]+", line)[0]
        if name not in NOT_RUN:
            found = re.fullmatch(r"([\w-]+) >= (\d[\d.]*)(, < \d[\d.]*)?", line)
            assert found, f"{line!r} does not say its lowest version as NAME >= VERSION"
            yield f"{found[1]}=={found[2]}"


def test_every_requirement_says_its_lowest_version():
    versions = list(lowest_versions())
    assert len(versions) > 15
    assert any(version.startswith("torch==") for version in versions)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the lowest versions were not built for this Python")
def test_the_lowest_versions_pass_the_unit_tests(tmp_path):
    """Downloads about 3 GB."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", *lowest_versions()], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"]
    tests = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert tests.returncode == 0, tests.stdout[-5000:]
