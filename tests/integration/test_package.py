"""The package: what is installed, what imports what, examples that run, a checkout that needs no installation."""

import ast
import configparser
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hjepa_engine
import hjepa_engine.handlers
import hjepa_engine.recipes

ROOT = Path(__file__).parents[2]
FOLDERS = ("hjepa_engine", "handlers", "recipes")
BENCHMARKS = ROOT / "recipes" / "benchmarks"
#: What is installed; benchmarks are not.
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if BENCHMARKS not in path.parents)


def name_of(path):
    """The name under which a source file is imported: ``handlers/x.py`` is ``hjepa_engine.handlers.x``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hjepa_engine" else ("hjepa_engine", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in SOURCES}


def imports_of(path):
    """Dotted names that a file imports anywhere in it, functions included; ``from a import b`` is ``a.b``, and ``a``
    too where ``b`` is no module of its own."""
    found, package = set(), name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{above}.{base}".rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in NAMES else base)
    return found


def group(name):
    """The part of the project that a dotted name belongs to, else the outermost package."""
    parts = name.split(".")
    if parts[0] != "hjepa_engine":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in ("handlers", "recipes", "models", "steps", "data") else "engine"


def sources_of(*groups):
    return [path for path in SOURCES if group(name_of(path)) in groups]


def offenders(paths, forbidden):
    return [f"{path.relative_to(ROOT)}: {name}" for path in paths for name in imports_of(path) if forbidden(path, name)]


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


def test_shipped_configurations_are_package_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    data = setup["options.package_data"]
    folder, pattern = ROOT / "recipes", data["hjepa_engine.recipes"]
    assert set(folder.rglob("*.yaml")) == set(folder.glob(pattern)) != set()
    assert (ROOT / "hjepa_engine" / data["hjepa_engine"]).is_file()


def test_public_names_are_there():
    for module in (hjepa_engine, hjepa_engine.handlers):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_every_handler_file_is_exported():
    exported = {getattr(hjepa_engine.handlers, name).__module__ for name in hjepa_engine.handlers.__all__}
    files = {name_of(path) for path in sources_of("handlers")} - {"hjepa_engine.handlers"}
    assert exported == files | {"hjepa_engine.checkpoint.retention"}  # which the Checkpointer takes as an argument


# recipes -> handlers -> hjepa_engine -> ignite, torch


def test_the_parser_of_imports_sees_every_spelling(tmp_path):
    """Else the arrows below would hold of anything."""
    assert "hjepa_engine.steps" in imports_of(ROOT / "hjepa_engine" / "build.py")
    assert "hjepa_engine.handlers" in imports_of(ROOT / "recipes" / "pretrain.py")
    assert "hjepa_engine.handlers.throughput" in imports_of(ROOT / "handlers" / "__init__.py")
    assert "ignite.distributed" in imports_of(ROOT / "handlers" / "mask_sampler.py")
    assert "wandb" in imports_of(ROOT / "hjepa_engine" / "loggers" / "wandb.py")  # inside a function
    assert group("hjepa_engine.models.encoder") == "models" and group("hjepa_engine.engine") == "engine"


def test_a_handler_imports_no_other_handler_no_step_no_model_no_recipe():
    paths = [path for path in sources_of("handlers") if path.name != "__init__.py"]
    assert len(paths) > 10
    assert offenders(paths, lambda path, name: group(name) in ("handlers", "steps", "models", "recipes")) == []
    # A name taken through the package itself would hide where it comes from.
    assert offenders(paths, lambda path, name: name == "hjepa_engine") == []


def test_the_package_imports_no_handler_and_no_recipe():
    paths = sources_of("engine", "models", "steps", "data")
    assert len(paths) > 20
    assert offenders(paths, lambda path, name: group(name) in ("handlers", "recipes")) == []


def test_handlers_are_imported_by_recipes_and_recipes_by_recipes_alone():
    paths = [path for path in SOURCES if group(name_of(path)) != "recipes"]
    assert offenders(paths, lambda path, name: group(name) == "recipes") == []


def test_the_engine_knows_no_step_model_handler_or_data():
    for name in ("engine.py", "evaluator.py", "events.py", "state.py", "types.py"):
        allowed = {
            f"hjepa_engine.{module}" for module in ("engine", "events", "state", "types", "utils", "utils.tensors")
        }
        own = {found for found in imports_of(ROOT / "hjepa_engine" / name) if found.startswith("hjepa_engine")}
        assert own <= allowed


def test_models_know_no_ignite_and_no_data():
    assert offenders(sources_of("models"), lambda path, name: group(name) in ("ignite", "data", "steps")) == []
    mathematics = [
        ROOT / "hjepa_engine" / f"{name}.py" for name in ("masking", "levels", "losses", "schedules", "optim")
    ]
    assert offenders(mathematics, lambda path, name: group(name) in ("ignite", "data", "steps", "models")) == []


def test_steps_get_their_modules_as_an_argument():
    assert offenders(sources_of("steps"), lambda path, name: group(name) in ("models", "ignite", "data")) == []


def test_imports_make_no_circle():
    graph = {name_of(path): imports_of(path) & NAMES for path in SOURCES}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(graph[name]):
                visit(other)
            open_.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)


# Sources


@pytest.mark.parametrize(
    "pattern", [r"weights_only\s*=\s*False", r"\bpickle\.loads?\b", r"\byaml\.(load|unsafe_load)\("]
)
def test_nothing_runs_code_from_a_file(pattern):
    found = [str(path) for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert found == []


def test_torch_load_is_always_restricted():
    for path in SOURCES:
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, path


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
