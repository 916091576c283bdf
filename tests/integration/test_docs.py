"""Documentation is true: its pages are current and its programs run."""

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from forkserver import PRETRAIN, PROGRAM
from helpers import NOISE, options
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

import hjepa_engine.handlers
from hjepa_engine import dump_config, load_config
from hjepa_engine.config.changes import MAY_CHANGE, MAY_CHANGE_ELSEWHERE
from hjepa_engine.config.options import list_options
from hjepa_engine.interop.writing import export_encoder
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


def test_generated_pages_are_what_the_schema_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run: python docs/generate.py"
    assert generate.CHECKPOINTS.read_text(encoding="utf-8") == generate.checkpoints_page(), (
        "run: python docs/generate.py"
    )


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


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s\"]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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
