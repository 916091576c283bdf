"""Paths of the configuration and of commands: ``~`` and variables are expanded, the run keeps absolute ones."""

from pathlib import Path

import pytest

from hjepa_engine import Config, dump_config, load_config
from hjepa_engine.config.describe import walk
from hjepa_engine.config.fields import is_path
from hjepa_engine.config.paths import path_argument
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.errors import ConfigError
from hjepa_engine.run.folder import RunFolder

KEYS = [
    "data.data_path",
    "logging.log_dir",
    "checkpoint.checkpoint_dir",
    "checkpoint.resume",
    "model.init_from",
    "run_dir",
]


def value_of(config: Config, key: str) -> str:
    for name in key.split("."):
        config = getattr(config, name)
    return str(config)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_path_keys_are_these():
    assert sorted(key for key, field in walk(Config) if is_path(field)) == sorted(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_path_key_expands_home_and_variables_and_names_an_unknown_one(key, tmp_path):
    for given, expanded in {
        "~/x": f"{tmp_path}/x",
        "$SCRATCH/x": "/scratch/me/x",
        "a/${SCRATCH}": "a//scratch/me",
        "a~b": "a~b",
    }.items():
        assert value_of(load_config(None, [f"--{key}={given}"]), key) == expanded
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"--{key}", "$NOWHERE/x"])
    assert str(error.value) == f"{key}: there is no $NOWHERE, got '$NOWHERE/x'"
    with pytest.raises(ConfigError, match="there is no ~no-such-user-here"):
        load_config(None, [f"--{key}", "~no-such-user-here/x"])


def test_sections_made_in_python_expand_too(tmp_path):
    assert DataConfig(data_path="~/x").data_path == f"{tmp_path}/x"


def test_files_and_folders_of_commands_are_expanded(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 7\n")
    assert load_config("~/c.yaml").seed == 7
    assert path_argument("$SCRATCH/run") == Path("/scratch/me/run")
    with pytest.raises(ConfigError, match=r"^\$NOWHERE/run: there is no \$NOWHERE$"):
        path_argument("$NOWHERE/run")


def test_the_runs_configuration_holds_absolute_paths_and_the_word_auto(tmp_path):
    config = load_config(None, ["--run_dir=runs/a", "--data.data_path=images", "--logging.log_dir=logs"])
    RunFolder(config).lock()
    RunFolder(config).enter()
    saved = load_config("runs/a/config.yaml")
    assert (saved.run_dir, saved.data.data_path) == (f"{tmp_path}/runs/a", f"{tmp_path}/images")
    assert (saved.logging.log_dir, saved.checkpoint.resume) == (f"{tmp_path}/logs", "auto")
    assert saved.model.init_from is None
    assert dump_config(load_config(None, ["--run_dir=a"])).count(str(tmp_path)) == 0


@pytest.mark.parametrize("inside", ["runs/a", "runs/a/images", "runs/b/../a/images"])
def test_data_in_the_run_folder_are_refused(inside):
    options = ["--data.dataset=imagefolder", "--run_dir=runs/a"]
    with pytest.raises(ConfigError) as error:
        load_config(None, [*options, f"--data.data_path={inside}"])
    assert str(error.value) == (f"data.data_path must not be in the run folder, which may be set aside, got {inside}")
    assert load_config(None, [*options, "--data.data_path=runs/ab"]).data.data_path == "runs/ab"
