"""The command ``hjepa``: its recipes, its help, completion, what it says of a machine, and that it is installed whole."""

import json
import os
import shutil
import subprocess
import sys
import venv

import pytest
from helpers import NOISE, ROOT, options

from hjepa_engine import __version__, load_config
from hjepa_engine.recipes import command, doctor, pretrain
from hjepa_engine.run.cli import run_command


@pytest.fixture
def hjepa(capsys, monkeypatch, tmp_path):
    """Run the command line in this process; standard output, standard error, exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            run_command(command.main, [str(word) for word in argv])
        captured = capsys.readouterr()
        return captured.out, captured.err, stop.value.code or 0

    return run


def test_every_recipe_has_a_command(hjepa):
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__", "command"}
    assert {module for module, _, _ in command.COMMANDS.values()} == recipes
    out, _, code = hjepa("--help")
    assert code == 0 and all(f"\n  {name} " in out for name in command.COMMANDS)
    assert hjepa() == (out, "", 0)
    assert hjepa("--version") == (f"{__version__}\n", "", 0)


def test_an_unknown_command_is_one_line_and_exit_code_2(hjepa):
    out, err, code = hjepa("pretrian", "--training.lr", "1")
    assert (out, code, err.count("\n")) == ("", 2, 1)
    assert err.startswith("command must be one of pretrain, preview,")
    assert err.endswith("got 'pretrian'; did you mean pretrain?\n")


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_help_of_a_command_is_about_the_command(hjepa, name):
    out, _, code = hjepa(name, "--help")
    assert code == 0 and out.startswith(f"usage: hjepa {name} [")
    assert "python recipes/" not in out and "hjepa " in out.split("\n", 1)[1]


def test_a_command_hands_its_arguments_to_the_recipe(hjepa):
    out, err, code = hjepa("pretrain", "--training.lr", "3e-4", "--print_config")
    assert (err, code) == ("", 0) and "\n  lr: 0.0003\n" in out
    _, err, code = hjepa("pretrain", "--training.lr", "-1")
    assert code == 2 and "training.lr" in err


def test_a_shipped_configuration_is_known_by_its_name_unless_a_file_has_it(hjepa, tmp_path):
    (tmp_path / "cifar10").mkdir()  # data, say
    assert "dataset: cifar10" in hjepa("pretrain", "--config", "cifar10", "--print_config")[0]
    (tmp_path / "digits").write_text("seed: 77")
    assert "seed: 77" in hjepa("pretrain", "--config", "digits", "--print_config")[0]
    _, err, code = hjepa("pretrain", "--config", "cifar11")
    assert code == 2 and "cifar11" in err


def test_a_preview_draws_and_trains_nothing(hjepa, tmp_path):
    out, err, code = hjepa("preview", *options(NOISE), "--run_dir=run")
    assert code == 0, err
    assert "drawn: " in out
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert written == {"run/preview/schedules.png", "run/preview/masks.png"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["pre"], {"pretrain", "preview"}),
        (["pretrain", "--training.warm"], {"--training.warmup_epochs"}),
        (["export", "--f"], {"--format"}),
        (["completion", ""], {"bash", "zsh"}),
        (["nothing", "--"], set()),
    ],
)
def test_bash_completes_commands_and_options(completion, words, found):
    line = " ".join(f"'{word}'" for word in words)
    code = f'. {completion}; COMP_WORDS=(hjepa {line}); COMP_CWORD={len(words)}; _hjepa; echo "${{COMPREPLY[@]}}"'
    assert set(subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout.split()) == found


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """The file of a completion script."""
    from hjepa_engine.recipes.completion import script

    path = tmp_path_factory.mktemp("completion") / "hjepa"
    path.write_text(script("bash"))
    assert script("zsh").endswith(script("bash")) and "bashcompinit" in script("zsh")
    return path


def test_the_doctor_says_what_a_report_of_a_problem_needs(hjepa):
    out, err, code = hjepa("doctor", "--quick")
    assert (err, code) == ("", 0)
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert said["hjepa-engine"].startswith(f"{__version__} in ")
    assert {"python", "torch", "torchvision", "pytorch-ignite", "timm", "device", "cpu", "disk", "memory"} <= set(said)
    assert "TFLOP/s, bfloat16 " in said["precision"] and "GB free" in said["disk"]
    assert "not installed" not in out and "training" not in said


def test_free_space_is_that_of_the_nearest_folder_that_is_there(tmp_path):
    assert doctor.free(str(tmp_path / "not" / "there")).split()[1:] == ["GB", "free"]


@pytest.mark.slow
def test_the_doctor_trains(hjepa, monkeypatch, tmp_path):
    out, err, code = hjepa("doctor")
    assert (err, code) == ("", 0) and "10 iterations of the default run work here" in out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['timm'] = None")  # importing it fails
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    _, err, code = hjepa("doctor")
    assert code == 1 and "training failed with exit code 1: " in err and "timm" in err


def pip(words, *first):
    command, *rest = words
    line = [sys.executable, "-m", "pip", *first, command, "-q", "--no-deps", *rest]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_runs_the_default_outside_of_the_checkout(tmp_path, kind):
    """In an environment of its own, which borrows the installed libraries from the present one."""
    built = tmp_path / "built"
    source = tmp_path / "checkout"  # building leaves files beside the sources
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    if kind == "sdist":
        backend = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
        subprocess.run([sys.executable, "-c", backend, built], cwd=source, check=True, capture_output=True)
        (source,) = built.glob("hjepa_engine-*.tar.gz")
    pip(["wheel", "--no-build-isolation", "-w", built, source])
    (file,) = built.glob("hjepa_engine-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip(["install", "--ignore-installed", file], "--python", tmp_path / "env" / "bin" / "python")
    script = tmp_path / "env" / "bin" / "hjepa"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def call(*words):
        return subprocess.run([script, *words], cwd=folder, env=environment, capture_output=True, text=True)

    assert str(site) in call("doctor", "--quick").stdout
    done = call("pretrain", "--training.max_iters=3", "--probe.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "report:     runs/digit_pages/report.html" in done.stdout
    assert json.loads((folder / "runs" / "digit_pages" / "status.json").read_text())["state"] == "done"
    assert call("report", "--run", "runs/digit_pages").returncode == 0
    config = load_config(pretrain.DEFAULT_CONFIG, ["training.max_iters=3", "probe.epochs=1"])
    assert load_config(folder / "runs" / "digit_pages" / "config.yaml").model == config.model
