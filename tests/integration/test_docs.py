"""Documentation is true: its pages are current and its programs run."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forkserver import PRETRAIN, PROGRAM
from helpers import NOISE, options
from ignite.engine import Events
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

import hjepa_engine.handlers
from hjepa_engine import TrainEvents, dump_config, load_config
from hjepa_engine.config.changes import MAY_CHANGE, MAY_CHANGE_ELSEWHERE
from hjepa_engine.config.options import list_options
from hjepa_engine.interop.writing import export_encoder
from hjepa_engine.metrics.glossary import GLOSSARY, explain
from hjepa_engine.models import build_modules
from hjepa_engine.recipes import export, linear_probe, pretrain
from hjepa_engine.state import TrainState

ROOT = Path(__file__).parents[2]
TINY = [
    *("--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2", "--data.fake_size", "32"),
    *("--model.predictor.width", "16", "--model.predictor.depth", "1", "--model.predictor.num_heads", "2"),
    *("--training.max_iters", "5", "--probe.enabled", "false", "--logging.log_frequency", "2"),
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture
def run(server):
    """Run a program, or the recipe, in a folder whose modules it can import; what it prints."""

    def run(folder: Path, *words: str, body: str = PROGRAM) -> str:
        printed, said, code = server.call(*words, folder=folder, body=body)
        assert code == 0, said
        return printed

    return run


def script(name, monkeypatch):
    """A program of docs/ as a module, which finds its neighbors."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says(monkeypatch):
    pages = script("generate", monkeypatch).pages()
    assert [path.name for path in pages] == ["configuration.md", "checkpoints.md", "handlers.md", "metrics.md"]
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/generate.py"


def test_figures_are_what_the_code_draws(monkeypatch):
    figures = script("draw", monkeypatch).figures()
    assert {path.stem for path in figures} == {"hjepa-light", "hjepa-dark", "timeline-light", "timeline-dark"}
    for path, text in figures.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/draw.py"


def test_handlers_name_keys_of_the_configuration_that_exist(monkeypatch):
    docstrings = script("docstrings", monkeypatch)
    known = [option.key for option in list_options()]
    for handler in docstrings.HANDLERS.values():
        for key in docstrings.keys(handler):
            assert key in known or (key.endswith(".*") and any(name.startswith(key[:-1]) for name in known)), key
    assert docstrings.keys(hjepa_engine.handlers.EarlyStopping) == ["training.early_stopping"]
    assert docstrings.events(hjepa_engine.handlers.OnlineProbe) == ["STARTED", "EPOCH_COMPLETED"]


def test_every_metric_that_a_run_logs_has_a_term_and_every_term_a_handler(tmp_path):
    more = {
        "collapse.every": 100,
        "collapse.batch_every": 2,
        "data.fake_size": 256,
        "collapse.alpha_req": True,
        "collapse.lidar_views": 2,
    }
    losses = {"loss.variance_weight": 0.1, "training.level_lrs": "[1e-3, 1e-3]", "collapse.images": 40}
    probes = {"probe.epochs": 1, "online_probe.train_images": 20, "online_probe.val_images": 20, "training.epochs": 1}
    pretrain.main(options({**NOISE, **more, **losses, **probes, "run_dir": tmp_path / "run"}))
    names = {name for line in logged_whole(tmp_path / "run") for name in line} - {"step", "epoch", "time"}
    names = {name for name in names if not name.endswith("_spectrum")}
    assert {name for name in names if explain(name) is None} == set()
    # What this run had no reason to log.
    rare = {"train/skipped_updates", "train/rollbacks", "val/damaged", "data/damaged"}
    unseen = {term.name for term in GLOSSARY} - {explain(name).name for name in names}
    of_another_step = {f"{when}/{name}" for when in ("train", "val") for name in ("distance", "sigreg")}
    assert {name for name in unseen if not name.startswith("system/gpu")} == rare | of_another_step
    handlers = {term.source for term in GLOSSARY}
    assert handlers - set(HANDLERS) == {"pretrain.py"}
    for term in GLOSSARY:
        assert re.fullmatch(r"[A-Z].{10,120}\.", term.meaning), term
    assert explain("train/loss_level_1").name == "train/loss_level_{l}" and explain("train/mine") is None


def logged_whole(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def handler_files(tmp_path):
    """The files of docs/handlers.md, each with its name in the first line."""
    for text in blocks("docs/handlers.md", "python") + blocks("docs/handlers.md", "yaml"):
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_handler_of_the_documentation_runs_when_attached_from_yaml(run, handler_files):
    run(handler_files, "--config", "my_run.yaml", *TINY, body=PRETRAIN)
    assert "train/similarity" in (handler_files / "runs" / "my_run" / "metrics.jsonl").read_text()


def test_the_handler_of_the_documentation_runs_when_attached_from_python(run, handler_files):
    text = (handler_files / "my_run.yaml").read_text()
    (handler_files / "my_run.yaml").write_text(text[text.index("logging:") :])
    program = (handler_files / "train.py").read_text()
    (handler_files / "train.py").write_text(program.replace('"my_run.yaml")', f'"my_run.yaml", {TINY})'))
    run(handler_files, "train.py")
    assert "train/similarity" in (handler_files / "runs" / "my_run" / "metrics.jsonl").read_text()


def test_the_step_of_the_documentation_runs(run, tmp_path):
    program, _ = blocks("docs/steps.md", "python")
    (tmp_path / "program.py").write_text(program + "\nprint(trainer.state.metrics)\n")
    assert "train/worst" in run(tmp_path, "program.py")


def test_the_run_with_an_own_step_of_the_documentation_runs(run, tmp_path):
    _, program = blocks("docs/steps.md", "python")
    program = program.replace('"recipes/', f'"{ROOT}/recipes/')
    program = program.replace("overrides = [", 'overrides = ["training.max_iters=3", "probe.epochs=1", ')
    (tmp_path / "program.py").write_text(program)
    run(tmp_path, "program.py")
    assert "collapse/target_rank" in (tmp_path / "runs" / "my_mae" / "metrics.jsonl").read_text()


#: What takes long; the others are run by default.
SLOW_FORMATS = ("onnx",)


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    """A folder with a run and the encoders of other projects that docs/interop.md names, small ones."""
    monkeypatch.chdir(tmp_path)
    changes = {"model.num_hierarchies": 1, "probe.enabled": "false", "training.epochs": 1}
    config = load_config(None, options({**NOISE, **changes}))
    (tmp_path / "my_run.yaml").write_text(dump_config(config))
    pretrain.main(["--config", "my_run.yaml", "--run_dir", "runs/my_run"])
    modules = build_modules(config)
    parts = {"encoder": modules["context_encoder"].vit, "target_encoder": modules["target_encoder"].vit}
    weights = {key: {f"module.{name}": value for name, value in vit.state_dict().items()} for key, vit in parts.items()}
    torch.save({**weights, "epoch": 300}, "IN1K-vit.h.14-300e.pth.tar")
    export_encoder(Path("runs/my_run"), "huggingface", Path("ijepa_vith14_1k"))
    save_file(modules["target_encoder"].vit.state_dict(), "vit.safetensors")
    return tmp_path


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_and_programs_of_interop_run(encoders, capsys, slow):
    quick = {"data.dataset": "fake", "data.fake_size": 20, "probe.epochs": 1, "model.num_heads": 2, "device": "cpu"}
    more = {linear_probe: options({**quick, "logging.progress_bar": "false"})}
    recipes = {
        f"recipes/{recipe.__name__.rpartition('.')[2]}.py": recipe for recipe in (pretrain, linear_probe, export)
    }
    ran = 0
    for line in "".join(blocks("docs/interop.md", "bash")).splitlines():
        _, name, *words = shlex.split(line)
        if slow or not set(SLOW_FORMATS) & set(words):
            recipes[name].main([*words, *more.get(recipes[name], [])])
            ran += 1
    assert ran == 10 + slow
    programs = [
        text for text in blocks("docs/interop.md", "python") if slow or not any(x in text for x in SLOW_FORMATS)
    ]
    assert len(programs) == 4 + slow
    for program in programs:
        found = {}
        exec(program.replace("224, 224", "24, 24"), found)
        assert found["tokens"].shape[1:] == (36, 16)
    printed = capsys.readouterr().out
    assert printed.count("weights from ") == 4 and "runs/my_run/export/timm: timm, " in printed
    assert " kB, " in printed
    assert Path("probes/vith14/linear_probe.json").is_file()


def test_the_readme_example_runs(run, tmp_path):
    (program,) = blocks("README.md", "python")
    (tmp_path / "program.py").write_text(program)
    assert "torch.Size([1, 16, 64])" in run(ROOT, str(tmp_path / "program.py"))


def test_the_readme_has_one_line_to_run_and_one_to_test():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for title in ("Run it", "Test it"):
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        assert len(block.strip().splitlines()) == 1


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link may name behind ``#``: the headings as GitHub and mkdocs call them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_lead_somewhere():
    count = 0
    for page in PAGES:
        found = re.findall(r"\]\(([^)\s\"]+)\)", prose(page)) + re.findall(r'(?:src|srcset)="([^"]+)"', prose(page))
        for target in found:
            if re.match(r"https?:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{page.name}: {target}"
            count += 1
    assert count > 100


def test_every_page_is_in_the_index_and_in_the_site():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
        assert f": {page.name}\n" in site, page.name


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference" / "handlers" / "index.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in page for name in HANDLERS)
    assert "<strong>Listens to</strong>" in page and ":class:" not in page
    assert not list(tmp_path.rglob("*.py"))
    assert "Break it" in (tmp_path / "tutorials" / "first_run" / "index.html").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {hjepa_engine.__version__}\n" in citation
    assert f"\n## {hjepa_engine.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_readme_fits():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_keys_and_names_of_the_page_on_migration_exist():
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    known = {option.key for option in list_options()}
    first, *others = page.split("\n## ")[1:]
    cells = [line.split("|")[2] for line in first.splitlines() if line.startswith("| `")]
    cells += [line.split("|")[2] for text in others for line in text.splitlines() if line.startswith("| `")]
    keys = {name for cell in cells for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: \w+)?`", cell)}
    assert len(keys) > 45 and keys <= known
    upper = {name for cell in cells for name in re.findall(r"`([A-Z_]+)`", cell)}
    assert len(upper) == 6 and upper <= {event.name for event in (*TrainEvents, *Events)}
    logged = {name for cell in cells for name in re.findall(r"`((?:probe|collapse)/\w+)`", cell)}
    assert len(logged) == 4 and all(map(explain, logged))
    classes = {name for cell in cells for name in re.findall(r"`((?:[A-Z][a-z]+)+(?:EMA)?)`", cell)}
    assert classes == {"OnlineProbe", "CollapseMonitor", "TargetEncoderEMA"} and classes <= set(HANDLERS)


def test_the_keys_that_may_change_are_those_of_the_documentation():
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    same, elsewhere = (
        re.findall(r"`([a-z_.]+\*?)`", line) for line in page.splitlines() if line.startswith(("| when a", "| besides"))
    )
    assert same == [key + "*" * key.endswith(".") for key in MAY_CHANGE]
    assert [*same, *elsewhere] == [key + "*" * key.endswith(".") for key in MAY_CHANGE_ELSEWHERE]


def promises(handler, word):
    """The attributes of ``engine.state`` that a handler's docstring names in its ``Reads:`` or ``Writes:`` lines."""
    section = re.search(rf"^{word}: .*?(?=^[A-Z][\w ]*:|^$|\Z)", inspect.getdoc(handler), re.MULTILINE | re.DOTALL)
    named = re.findall(r"``(?:engine\.)?(?:state\.)?(\w+)(?=``|\[)", section[0]) if section else []
    return set(named) & set(TrainState.__annotations__)


def accesses(handler):
    """The attributes of the trainer's state that the source of a handler touches."""
    touched = set()
    for node in ast.walk(ast.parse(inspect.getsource(handler))):
        if isinstance(node, ast.Attribute) and re.search(
            r"\b(engine|_trainer)\.state$|^state$", ast.unparse(node.value)
        ):
            touched.add(node.attr)
    return touched & set(TrainState.__annotations__)


HANDLERS = {
    name: value
    for name, value in vars(hjepa_engine.handlers).items()
    if isinstance(value, type) and value.__module__.startswith("hjepa_engine.handlers")
}


@pytest.mark.parametrize("name", HANDLERS)
def test_a_handlers_docstring_names_what_it_shares(name):
    handler = HANDLERS[name]
    said = promises(handler, "Reads") | promises(handler, "Writes")
    assert said - {"epoch_length"} == accesses(handler) - {"epoch_length"}


def test_the_table_of_what_handlers_share_is_what_they_say_themselves():
    text = (ROOT / "docs" / "handlers.md").read_text(encoding="utf-8")
    table = text[text.index("## What handlers share") : text.index("## The handlers that are there")]
    rows = {
        attribute: cells for attribute, *cells in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", table, re.MULTILINE)
    }
    assert list(rows) == list(TrainState.__annotations__)
    for attribute, (_, writers, readers) in rows.items():
        for word, cell in {"Writes": writers, "Reads": readers}.items():
            told = {name for name in re.findall(r"`(\w+)`", cell) if name in HANDLERS}
            if not re.search(r"\b(whoever|every handler)\b", cell):
                assert told == {n for n in HANDLERS if attribute in promises(HANDLERS[n], word)}, (attribute, word)


def test_the_launches_of_the_page_on_scaling_have_options_that_exist():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    launches = re.findall(r"torchrun (.*?)recipes/", page, re.S)
    known = get_args_parser().format_help().replace("-", "_")
    options = {option for launch in launches for option in re.findall(r"--[a-z_-]+", launch)}
    assert len(launches) >= 3 and all(option.replace("-", "_") in known for option in options)
    (loop,) = re.findall(r"```bash\n(.*?)```", page, re.S)
    subprocess.run(["bash", "-n"], input=loop, text=True, check=True)
    keys = {option.key for option in list_options()}
    assert set(re.findall(r"`((?:distributed|loss)\.\w+)`", page)) <= keys


def test_the_gathering_step_of_the_documentation_runs():
    (text,) = blocks("docs/scaling.md", "python")
    names = {"loss": torch.zeros(()), "embeddings": torch.randn(6, 4)}
    exec(text, names)
    assert names["loss"] > 0


def test_the_job_script_of_the_documentation_is_valid_and_its_options_exist():
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```bash\n(.*?)```", page, re.S) if "#SBATCH" in block)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    known = get_args_parser().format_help()
    launch = script.split("torchrun")[1].split("recipes/")[0]
    assert all(option in known for option in re.findall(r"--[a-z_-]+", launch))
