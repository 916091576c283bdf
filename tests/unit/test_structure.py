"""The house: which room imports which, what lives in a room, how long a file is, and that nothing stands twice."""

import ast
import re
from collections import defaultdict

import pytest
from sources import ROOT, name_of

FOLDERS = ("hjepa_engine", "handlers", "recipes")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
#: Not installed; held to the same rules.
BENCHMARKS = ROOT / "recipes" / "benchmarks"

#: Which room imports which others, lowest room first; "face" is ``hjepa_engine/__init__.py``. A room that is not named
#: here, or an arrow that is not, fails: add it knowingly.
ARROWS = {
    "_version": "",
    "errors": "",
    "types": "",
    "utils": "errors types",
    "events": "",
    "schedules": "",
    "losses": "types utils",
    "optim": "types utils",
    "masking": "utils",
    "state": "types utils",
    "engine": "errors events state types utils",
    "evaluator": "engine state types utils",
    "metrics": "utils",
    "loggers": "utils",
    "config": "errors metrics utils",
    "levels": "config masking",
    "models": "config errors levels masking utils",
    "data": "config errors utils",
    "steps": "config data levels losses types utils",
    "visualization": "config levels loggers masking metrics",
    "checkpoint": "config engine errors state types utils",
    "run": "checkpoint config data engine errors metrics state utils",
    "export": "checkpoint config errors models types utils",
    "interop": "_version checkpoint config errors export models types utils",
    "devices": "config errors utils",
    "build": "checkpoint config errors loggers losses masking models optim schedules steps types utils",
    "report": "build checkpoint config errors metrics run utils",
    "face": "_version config engine evaluator events export",
    "handlers": "checkpoint config data engine errors evaluator events export levels loggers masking metrics run state "
    "types utils visualization",
    "recipes": "build checkpoint config data devices engine errors evaluator events face handlers interop levels loggers "
    "losses masking metrics models report run schedules steps types utils visualization",
}
#: Packages that only these rooms import. The configuration and what it imports load without torch.
LIBRARIES = {
    "datasets": "data recipes",
    "huggingface_hub": "interop",
    "ignite": "build checkpoint data devices engine evaluator events handlers interop metrics recipes report run state "
    "utils",
    "jinja2": "report",
    "matplotlib": "handlers recipes visualization",
    "PIL": "data loggers recipes visualization",
    "pydantic": "config",
    "safetensors": "checkpoint export interop recipes",
    "sklearn": "data",
    "tensorboardX": "loggers",
    "timm": "interop models recipes",
    "torch": "build checkpoint data devices engine evaluator export handlers interop levels loggers losses masking metrics "
    "models optim recipes run state steps types utils visualization",
    "torchvision": "data recipes",
    "tqdm": "utils",
    "wandb": "loggers",
    "yaml": "config",
}


NAMES = {name_of(path) for path in SOURCES}


def imports_of(path):
    """Dotted names that a file imports anywhere in it, functions included; ``from a import b`` is ``a.b`` where ``b`` is
    a module, else ``a``."""
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


def room_of(name):
    """The room that a dotted name belongs to; None for one from outside."""
    parts = name.split(".")
    if parts[0] != "hjepa_engine":
        return None
    return parts[1] if len(parts) > 1 else "face"


def imports():
    """Every import: the path of the file in the tree, its room, the name."""
    for path in SOURCES:
        for name in sorted(imports_of(path)):
            yield str(path.relative_to(ROOT)), room_of(name_of(path)), name


# Who imports whom: recipes -> handlers -> hjepa_engine -> ignite, torch


def test_the_parser_of_imports_sees_every_spelling():
    """Otherwise the arrows below would hold for anything."""
    assert "hjepa_engine.steps" in imports_of(ROOT / "hjepa_engine" / "build.py")
    assert "hjepa_engine.recipes.common.build" in imports_of(ROOT / "recipes" / "pretrain.py")
    assert "hjepa_engine.handlers.throughput" in imports_of(ROOT / "handlers" / "__init__.py")
    assert "ignite.distributed" in imports_of(ROOT / "handlers" / "mask_sampler.py")
    assert "wandb" in imports_of(ROOT / "hjepa_engine" / "loggers" / "wandb.py")  # inside a function
    assert room_of("hjepa_engine.models.encoder") == "models" and room_of("hjepa_engine.engine") == "engine"
    assert room_of("hjepa_engine") == "face" and room_of("types") is None


def test_rooms_import_only_the_rooms_that_the_table_allows():
    not_allowed = [
        f"{path} imports {name}"
        for path, room, name in imports()
        if room_of(name) not in (None, room, *ARROWS[room].split())
    ]
    assert not_allowed == []


def test_the_table_names_every_room_and_no_arrow_of_it_runs_back_up():
    assert {room_of(name) for name in NAMES} == set(ARROWS)
    rooms = list(ARROWS)
    for number, room in enumerate(rooms):
        assert set(ARROWS[room].split()) <= set(rooms[:number]), room


def test_libraries_are_imported_only_in_their_rooms():
    not_allowed = [
        f"{path} imports {name}"
        for path, room, name in imports()
        if (package := name.partition(".")[0]) in LIBRARIES and room not in LIBRARIES[package].split()
    ]
    assert not_allowed == []


def test_a_handler_imports_no_other_handler():
    paths = [path for path in (ROOT / "handlers").glob("*.py") if path.name != "__init__.py"]
    assert len(paths) > 10
    found = [f"{path.name}: {name}" for path in paths for name in imports_of(path) if room_of(name) == "handlers"]
    assert found == []


def test_files_import_each_other_in_no_circle():
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


# What a room looks like


def test_the_docstring_of_every_folder_says_in_one_line_what_lives_there():
    for path in SOURCES:
        if path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert re.fullmatch(r"[^\n]{20,110}\.", docstring), f"{path.relative_to(ROOT)}: {docstring!r}"


def test_no_file_is_longer_than_300_lines_but_the_schema():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    del lengths["hjepa_engine/config/schema.py"]
    assert {path: lines for path, lines in lengths.items() if lines > 300} == {}


def test_the_tree_of_the_documentation_names_every_room_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert len(tree) <= 15
    named = {word for line in tree for word in re.findall(r"[a-z_]+(?=/)", line)}
    folders = {path.parent.name for path in SOURCES if path.name == "__init__.py"}
    assert named == folders | {"ablations", "configs", "docs", "tests"}


def test_no_run_of_six_lines_stands_twice_in_the_sources():
    """Blank lines, comments and indentation do not count; lists of imports do."""
    places = defaultdict(list)
    for path in SOURCES:
        numbered = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        lines = [(number, line.strip()) for number, line in numbered if line.strip() and line.strip()[0] != "#"]
        for first in range(len(lines) - 5):
            run = tuple(line for _, line in lines[first : first + 6])
            places[run].append(f"{path.relative_to(ROOT)}:{lines[first][0]}")
    assert [where for where in places.values() if len(where) > 1] == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"weights_only\s*=\s*False",
        r"\bpickle\.loads?\b",
        r"\btorch\.load\((?![^()]*weights_only=True)",
        r"\byaml\.(load|unsafe_load)\(",
    ],
)
def test_nothing_loads_a_file_in_a_way_that_can_run_code(pattern):
    found = [str(path) for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert found == []
