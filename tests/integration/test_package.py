"""The package: what is installed, examples that run, a checkout that needs no installation."""

import configparser
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

from sources import ROOT, name_of

import hjepa_engine
import hjepa_engine.handlers
import hjepa_engine.recipes

FOLDERS = ("hjepa_engine", "handlers", "recipes")
BENCHMARKS = ROOT / "recipes" / "benchmarks"
#: What is installed; benchmarks are not.
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if BENCHMARKS not in path.parents)


NAMES = {name_of(path) for path in SOURCES}


# What is installed


def test_packages_of_setup_cfg_are_the_folders_with_an_init():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = setup["options"]["packages"].split()
    on_disk = {name_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert sorted(listed) == sorted(on_disk) and len(listed) == len(set(listed))
    mapped = dict(re.split(r"\s*=\s*", line) for line in setup["options"]["package_dir"].strip().splitlines())
    assert mapped == {"hjepa_engine.handlers": "handlers", "hjepa_engine.recipes": "recipes"}
    for package in listed:
        parent = next((name for name in mapped if package == name or package.startswith(f"{name}.")), None)
        folder = package if parent is None else mapped[parent] + package.removeprefix(parent)
        folder = folder.replace(".", "/")
        assert (ROOT / folder / "__init__.py").is_file()
    # Every folder with Python files is a package: one without an __init__ would not be installed.
    assert {path.parent for path in SOURCES} == {path.parent for path in SOURCES if path.name == "__init__.py"}


def test_a_wheel_holds_every_source_and_data_file_but_no_benchmark(tmp_path):
    checkout = tmp_path / "checkout"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    built = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("hjepa_engine-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    files = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    wanted = {path for path in files if not {"__pycache__", "benchmarks"} & set(path.parts)}
    names = {str(path if path.parts[0] == "hjepa_engine" else "hjepa_engine" / path) for path in wanted}
    assert packed == names


def test_shipped_configurations_are_package_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    data = setup["options.package_data"]
    folder, patterns = ROOT / "recipes", data["hjepa_engine.recipes"].split(", ")
    assert set(folder.rglob("*.yaml")) == {path for pattern in patterns for path in folder.glob(pattern)} != set()
    assert (ROOT / "hjepa_engine" / data["hjepa_engine"]).is_file()


def test_public_names_are_there():
    for module in (hjepa_engine, hjepa_engine.handlers):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_every_handler_file_is_exported():
    exported = {getattr(hjepa_engine.handlers, name).__module__ for name in hjepa_engine.handlers.__all__}
    files = {name_of(path) for path in (ROOT / "handlers").glob("*.py") if path.name != "__init__.py"}
    assert exported == files | {"hjepa_engine.checkpoint.retention"}  # which the Checkpointer takes as an argument


def test_examples_in_docstrings_run():
    attempted = {}
    for name in sorted(NAMES):
        failures, attempted[name] = doctest.testmod(importlib.import_module(name))
        assert failures == 0, name
    assert sum(attempted.values()) >= 10
    for name in ("hjepa_engine.schedules", "hjepa_engine.metrics.means", "hjepa_engine.utils.eta"):
        assert attempted[name] > 0


# In another process


def test_an_uninstalled_checkout_works_alone_and_without_optional_packages(tmp_path):
    checkout = tmp_path / "checkout"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", checkout)
    # A user's own module of that name must win: only hjepa_engine.handlers is ours.
    (tmp_path / "handlers.py").write_text("mine = True")
    code = """if True:
        import sys
        # Editable installations find packages by hooks; an uninstalled checkout has none.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
        sys.modules.update({"wandb": None, "tensorboardX": None})  # importing them fails
        import handlers
        import hjepa_engine, hjepa_engine.handlers, hjepa_engine.recipes.pretrain
        for module in (hjepa_engine, hjepa_engine.handlers, hjepa_engine.recipes.pretrain):
            print(module.__file__)
        print(hjepa_engine.recipes.pretrain.DEFAULT_CONFIG.is_file(), handlers.mine)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == [
        str(checkout / "hjepa_engine" / "__init__.py"),
        str(checkout / "handlers" / "__init__.py"),
        str(checkout / "recipes" / "pretrain.py"),
        "True True",
    ]
