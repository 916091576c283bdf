import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import (
    ROOT,
    TINY,
    Terminal,
    is_time,
    largest_difference,
    linear_trainer,
    mostly_slow,
    options,
    rows,
    same_bits,
    tiny_config,
    weights_of,
)
from ignite.engine import Events
from processes import free_port, in_processes

from hjepa_engine import TrainEvents, create_trainer, dump_config, load_config, load_encoder
from hjepa_engine.errors import GuardStop
from hjepa_engine.handlers import ProgressBar
from hjepa_engine.recipes import linear_probe, pretrain
from hjepa_engine.recipes.common import heads
from hjepa_engine.recipes.common.probe import probe
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.run.cli import run_command
from hjepa_engine.steps import linear_probe_step

DIGITS = {
    **TINY,
    "data.dataset": "digits",
    "data.batch_size": 64,
    "data.val_fraction": 0.5,
    "training.max_iters": 20,
    "model.ema.momentum_end": 0.95,
    "probe.epochs": 20,
    "logging.log_frequency": 5,
    "logging.progress_bar": "true",
    "logging.tensorboard.enabled": "true",
    "run_dir": "run",
}

SPARE_PARTS = '''
import ignite.distributed as idist
import torch
from ignite.engine import Events
from hjepa_engine import TrainEvents


def nan_loss(prediction, target):
    return (prediction - target).mean() * float("nan")


class Spy:
    """Keep every image and mask that this rank has seen, and all weights at the end."""

    def __init__(self, folder):
        self.folder, self.images, self.context, self.target = folder, [], [], []

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.LOSS_READY, self.look)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def look(self, engine):
        batch = engine.state.batch
        self.images.append(batch["images"])
        self.context.append(batch["masks"].context_idx)
        self.target.append(batch["masks"].target_idx)

    def save(self, engine):
        modules = {name: getattr(module, "module", module) for name, module in engine.modules.items()}
        weights = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
        seen = {"images": self.images, "context": self.context, "target": self.target, "weights": weights}
        torch.save({**seen, "steps": engine.state.optimizer_step}, f"{self.folder}/rank{idist.get_rank()}.pt")


class Note:
    """Write a file when the run is over."""

    def __init__(self, path, text="attached"):
        if not text:
            raise ValueError("text must not be empty")
        self.path, self.text = path, text

    def attach(self, engine):
        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self, engine):
        with open(self.path, "w") as file:
            file.write(f"{self.text} until {engine.state.optimizer_step}")


class Bomb:
    def __init__(self, interrupt=False):
        self.error = KeyboardInterrupt() if interrupt else RuntimeError("boom\\nsecond line")

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), self.explode)

    def explode(self):
        raise self.error


class NoHandler:
    pass
'''


def call(*command, cwd, modules=None, timeout=300):
    """Run a command as a user would, who may have ``modules`` in a folder; standard output, standard error, exit code."""
    path = os.pathsep.join([str(folder) for folder in (modules, os.environ.get("PYTHONPATH")) if folder])
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    answer = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return answer.stdout, answer.stderr, answer.returncode


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The folder of a test, with a module of a user's own parts that can be imported; also the working directory."""
    name = f"parts_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(SPARE_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a recipe's command line in this process; standard output, standard error, exit code."""
    monkeypatch.chdir(tmp_path)

    def run(recipe, *argv):
        with pytest.raises(SystemExit) as stop:
            run_command(recipe.main, [str(word) for word in argv])
        captured = capsys.readouterr()
        return captured.out, captured.err, stop.value.code or 0

    return run


def write_config(path, **values):
    """A configuration file; ``values`` is YAML data that is laid over the tiny one on noise."""
    data = yaml.safe_load(dump_config(tiny_config(probe__enabled="false", run_dir="run")))
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (data[section] if section else data)[name] = value
    path.write_text(yaml.safe_dump(data))
    return path


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


# --- The two commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which ``recipes/pretrain.py`` has run, its configuration file and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    config = load_config(None, options(DIGITS))
    (folder / "tiny.yaml").write_text(dump_config(config))
    out, err, code = call(ROOT / "recipes" / "pretrain.py", "--config", "tiny.yaml", cwd=folder)
    assert code == 0, err
    return folder, config, out, err


def test_a_run_leaves_its_folder(finished):
    folder, config, _, _ = finished
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == {
        *(f"probe_{name}.jsonl" for name in ("trained", "random", "pixels")),
        "config.yaml",
        "data.json",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "encoder",
        "tensorboard",
        "checkpoints",
        ".lock",
    }
    saved = ["epoch_0001_step_00000014", "epoch_0001_step_00000020"]  # an epoch's end, and the run's in the second one
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [".lock", *saved, "index.json"]
    assert json.loads((run / "status.json").read_text())["checkpoint"] == f"run/checkpoints/{saved[1]}"
    assert load_config(run / "config.yaml") == replace(config, run_dir=str(run))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 0
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["command"][1].endswith("pretrain.py")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 20, 0)
    assert set(status["results"]) == {"trained", "random", "pixels"}
    assert next(path.name for path in (run / "tensorboard").iterdir()).startswith("events.out.tfevents")
    assert load_encoder(run)(torch.zeros(2, 1, 24, 24)).shape == (2, 36, 16)


def test_a_run_logs_every_documented_metric(finished):
    lines = [json.loads(line) for line in (finished[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line} - {"step", "epoch", "time"}
    assert keys >= {
        "train/loss",
        "train/loss_level_0",
        "train/loss_level_1",
        "train/lr",
        "train/ema_momentum",
        "train/weight_decay",
        "train/grad_norm",
        "train/images_per_s",
        "train/data_wait",
        "val/loss",
        "probe/linear",
        "probe/linear_random",
        "probe/linear_pixels",
    }
    # 899 images make 14 batches: windows end at steps 5, 10, 14 (the epoch's end), 15 and 20.
    windows = [line for line in lines if "train/loss" in line]
    assert [(line["step"], line["epoch"]) for line in windows] == [(5, 1), (10, 1), (14, 1), (15, 2), (20, 2)]
    assert all(0 <= line["train/data_wait"] <= 1 and line["train/images_per_s"] > 0 for line in windows)
    assert [line["step"] for line in lines if "val/loss" in line] == [14]
    assert all(line["train/loss"] > 0 for line in windows)
    # Warm-up over one epoch of 14 steps; a step's record shows the rate it has used.
    assert windows[0]["train/lr"] == pytest.approx(1e-3 * 5 / 14)
    assert windows[2]["train/lr"] == 1e-3
    assert windows[0]["train/ema_momentum"] == pytest.approx(0.9, abs=0.01)


def test_a_run_ends_with_its_folder_and_the_probes_table(finished):
    _, _, out, err = finished
    status = json.loads((finished[0] / "run" / "status.json").read_text())["results"]
    assert "run folder: run\n" in out
    shown = dict(re.findall(r"^ +(trained encoder|random encoder|raw pixels) +([\d.]+) %$", out, re.MULTILINE))
    names = {"trained": "trained encoder", "random": "random encoder", "pixels": "raw pixels"}
    assert shown == {names[name]: f"{100 * value:.1f}" for name, value in status.items()}
    assert status["pixels"] > 0.85  # digits are easy
    assert status["random"] > 0.15  # better than chance
    assert "epoch 1/2  train/loss" in err  # no terminal: lines
    assert "\r" not in err
    assert "Traceback" not in err


def test_the_same_command_again_changes_nothing(finished, command, monkeypatch):
    folder, _, first, _ = finished
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    out, _, code = command(pretrain, "--config", "tiny.yaml")
    assert code == 0
    assert "run folder: run (was finished already)" in out
    assert out.splitlines()[-3:] == first.splitlines()[-3:]
    assert snapshot(folder) == before


def test_another_configuration_does_not_touch_a_finished_run(finished, command, monkeypatch):
    folder = finished[0]
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    _, err, code = command(pretrain, "--config", "tiny.yaml", "--training.lr", "5e-4")
    assert code == 2
    assert err.splitlines()[-1] == (
        "run_dir run holds a run with another configuration: training.lr was 0.001, is 0.0005 now; "
        "choose another --run_dir"
    )
    assert snapshot(folder) == before


def test_the_probe_command_prints_the_accuracies_of_the_run(finished, command, monkeypatch):
    folder = finished[0]
    monkeypatch.chdir(folder)
    out, err, code = command(linear_probe, "--run", "run", "--logging.progress_bar", "false")
    assert code == 0, err
    results = json.loads((folder / "run" / "linear_probe.json").read_text())["accuracy"]
    (folder / "run" / "linear_probe.json").unlink()  # other tests compare the folder
    assert results == json.loads((folder / "run" / "status.json").read_text())["results"]
    assert f"trained encoder        {100 * results['trained']:6.1f} %" in out
    assert f"raw pixels             {100 * results['pixels']:6.1f} %" in out


def test_the_probe_is_trained_by_the_engine(finished, monkeypatch, tmp_path):
    trainers, steps = [], []

    def spy(step, modules, device):
        trainer = create_trainer(step, modules, device)
        trainers.append((step, set(modules)))
        trainer.add_event_handler(
            TrainEvents.OPTIMIZER_STEPPED, lambda engine: steps.append(engine.state.optimizer_step)
        )
        return trainer

    monkeypatch.setattr(heads, "create_trainer", spy)
    config = finished[1]
    encoder = load_encoder(finished[0] / "run")
    before = weights_of(encoder)
    accuracy = probe(config, encoder, "trained", tmp_path)
    assert trainers == [(linear_probe_step, {"head"})]
    assert steps == list(range(1, 4 * 20 + 1))  # 899 features in batches of 256, 20 epochs
    assert accuracy == json.loads((finished[0] / "run" / "status.json").read_text())["results"]["trained"]
    assert same_bits(before, weights_of(encoder))
    lines = [json.loads(line) for line in (tmp_path / "probe_trained.jsonl").read_text().splitlines()]
    assert lines[-1]["val/accuracy"] == accuracy
    assert lines[0]["train/loss"] > lines[-2]["train/loss"]


def test_a_folder_without_an_encoder_is_exit_code_4(command, tmp_path):
    out, err, code = command(linear_probe, "--run", tmp_path)
    assert (out, code) == ("", 4)
    assert err == (
        f"{tmp_path} has no exported encoder: {tmp_path}/encoder/config.json is missing; "
        "before the run ends, load it from a checkpoint (latest, best)\n"
    )


# --- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_is_exit_code_5(command, parts, tmp_path):
    write_config(tmp_path / "c.yaml", loss__type=f"{parts}.nan_loss")
    _, err, code = command(pretrain, "--config", "c.yaml")
    assert code == 5
    assert err.splitlines()[-1].startswith(
        "non-finite loss at optimizer step 0; the weights are those of the last good"
    )
    assert "Traceback" not in err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("stopped", 0, 5)
    assert status["reason"] == err.splitlines()[-1]
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_run_that_is_not_complete_is_not_taken_for_a_finished_one(command, tmp_path, parts):
    config = write_config(tmp_path / "c.yaml", handlers=[{"class_path": f"{parts}.Bomb"}])
    assert command(pretrain, "--config", config)[2] == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["checkpoint"]) == ("stopped", 2, None)
    out, _, code = command(pretrain, "--config", config, "--handlers", "[]")
    assert (code, "was finished already" in out) == (0, False)
    assert "no checkpoint yet in run/checkpoints: starting from the beginning" in out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 10)


def test_a_run_that_has_failed_goes_on_from_its_last_checkpoint(command, tmp_path, parts):
    bomb = {"class_path": f"{parts}.Bomb"}
    config = write_config(tmp_path / "c.yaml", handlers=[bomb], checkpoint__save_every_steps=1)
    assert command(pretrain, "--config", config)[2] == 1
    out, _, code = command(pretrain, "--config", config, "--handlers", "[]")
    # The bomb goes off within iteration 2, which is thus not complete.
    assert "resumed step 1 (iteration 1 of 10) from run/checkpoints/epoch_0000_step_00000001" in out
    assert code == 0
    alone = write_config(tmp_path / "alone.yaml", run_dir="alone")
    assert command(pretrain, "--config", alone)[2] == 0
    assert same_bits(weights_of(load_encoder("run")), weights_of(load_encoder("alone")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.dataset", "imagefolder", "--data.data_path", "nowhere"], "nowhere"),
        (["--data.dataset", "cifar10", "--data.data_path", "nowhere"], "download it with --data.download true"),
        (
            ["--data.batch_size", "1000"],
            "the train split has 40 images, data.batch_size must be at most that, got 1000",
        ),
    ],
)
def test_missing_data_is_exit_code_3_and_leaves_nothing(command, tmp_path, arguments, words):
    write_config(tmp_path / "c.yaml")
    out, err, code = command(pretrain, "--config", "c.yaml", *arguments)
    assert (out, code) == ("", 3)
    assert words in err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ({"class_path": "no_module.Handler"}, "handlers[0].class_path: 'no_module.Handler' cannot be imported"),
        ({"class_path": "PARTS.Missing"}, "has no Missing"),
        ({"class_path": "Handler"}, "handlers[0].class_path: 'Handler' must be a dotted path"),
        ({"class_path": "PARTS.NoHandler"}, "NoHandler must have a method attach(engine)"),
        ({"class_path": "PARTS.Note"}, "handlers[0].init_args: missing a required argument: 'path'"),
        ({"class_path": "PARTS.Note", "init_args": {"path": "p", "txt": "t"}}, "unexpected keyword argument 'txt'"),
        ({"class_path": "PARTS.Note", "init_args": {"path": "p", "text": ""}}, "init_args: text must not be empty"),
        ({"init_args": {}}, "handlers[0].class_path must be given"),
    ],
)
def test_a_handler_that_cannot_be_built_is_exit_code_2(command, parts, tmp_path, handler, message):
    handler = {
        name: value.replace("PARTS", parts) if name == "class_path" else value for name, value in handler.items()
    }
    write_config(tmp_path / "c.yaml", handlers=[handler])
    out, err, code = command(pretrain, "--config", "c.yaml")
    assert (out, code) == ("", 2)
    assert message in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("debug", [False, True])
def test_an_unexpected_error_is_one_line_and_a_traceback_only_with_debug(command, parts, tmp_path, debug):
    write_config(tmp_path / "c.yaml", handlers=[{"class_path": f"{parts}.Bomb"}])
    _, err, code = command(pretrain, "--config", "c.yaml", *(["--debug"] if debug else []))
    assert code == 1
    assert err.splitlines()[-1] == "unexpected RuntimeError: boom (--debug shows where)"
    assert ("Traceback" in err) is debug
    assert debug or len(err.splitlines()) == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("stopped", 2, 1)


def test_an_interrupted_run_says_so(command, parts, tmp_path):
    write_config(tmp_path / "c.yaml", handlers=[{"class_path": f"{parts}.Bomb", "init_args": {"interrupt": True}}])
    _, err, code = command(pretrain, "--config", "c.yaml")
    assert (err.splitlines()[-1], code) == ("interrupted", 130)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 130


def test_the_reason_stands_on_a_line_of_its_own_below_a_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def body(argv):
        trainer, _ = linear_trainer()
        ProgressBar().attach(trainer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
        trainer.run(rows(*[(1, 0)] * 4))

    with pytest.raises(SystemExit):
        run_command(body, [])
    assert "/4 [" in sys.stderr.getvalue()
    last = "unexpected ZeroDivisionError: division by zero (--debug shows where)\n"
    assert sys.stderr.getvalue().endswith("\r" + last)  # tqdm has gone back to the line's start


# --- Reading and showing the configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [pretrain, linear_probe])
def test_help_names_every_option_with_its_rule_and_default(command, recipe):
    out, _, code = command(recipe, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 125
    assert "python recipes/pretrain.py" in out or "python recipes/linear_probe.py --run RUN_DIR" in out
    assert re.search(
        r"--training\.lr\n +Learning rate at the end of the warm-up\. \[a number, above 0; default 0.001\]", out
    )
    assert "exit codes:\n  0 done   2 configuration   3 data" in out
    assert "--debug" in out
    assert "``" not in out.split("configuration keys")[1]


def test_the_printed_configuration_can_be_read_back(command, tmp_path):
    out, err, code = command(pretrain, "--training.lr", "3e-4", "--print_config")
    assert (err, code) == ("", 0)
    (tmp_path / "printed.yaml").write_text(out)
    config = load_config(tmp_path / "printed.yaml")
    assert config.training.lr == 3e-4
    assert config == load_config(pretrain.DEFAULT_CONFIG, ["--training.lr", "3e-4"])
    assert command(pretrain, "--config", "printed.yaml", "--print_config")[0] == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed.yaml"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(command, path):
    assert command(pretrain, "--config", path, "--print_config")[2] == 0


# --- Handlers of one's own ----------------------------------------------------------------------------------------------


class CountSteps:
    def __init__(self):
        self.steps = 0

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.OPTIMIZER_STEPPED, self.count)

    def count(self):
        self.steps += 1


@pytest.mark.parametrize(
    "name",
    [*("cifar10-cpu", "cifar10_views"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar10", "stl10"))],
)
def test_recipes_for_small_images_train_two_steps_on_noise_of_their_size(tmp_path, name):
    config = load_config(
        pretrain.DEFAULT_CONFIG.with_name(f"{name}.yaml"),
        options(
            {
                "data.dataset": "fake",
                "data.download": "false",
                "data.fake_size": 16,
                "data.batch_size": 4,
                "data.num_workers": 0,
                "training.max_iters": 2,
                "training.compile": "false",
                "collapse.images": 8,
                "online_probe.every": "null",
                "probe.enabled": "false",
                "pictures.enabled": "false",
                "logging.progress_bar": "false",
                "run_dir": tmp_path / "run",
            }
        ),
    )
    run = pretrain.build(config)
    before = weights_of(run.trainer.modules)
    run.fit()
    assert run.trainer.state.iteration == 2
    assert largest_difference(before, weights_of(run.trainer.modules)) > 0


def test_pixels_under_random_masks_are_trained_drawn_and_probed(tmp_path, caplog):
    keys = {"levels": "[{pool: 1, depth: 0}]", "num_hierarchies": None, "predictor__targets": "joint"}
    config = tiny_config(
        run_dir=tmp_path / "run",
        masking__type="random",
        **{f"model__{key}": value for key, value in keys.items()},
    )
    config.pictures.enabled = config.collapse.enabled = True
    run = build(config)
    accuracies = run.fit()
    assert accuracies["trained"] > 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    read = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "collapse/target_rank" in read
    assert "_level_0" not in re.sub(r'"[a-z]+/loss_level_0"', "", read)  # pixels do not collapse: they are not measured
    drawn = {path.name.split("_")[0] for path in (tmp_path / "run" / "figures").iterdir()}
    assert drawn == {"masks", "similarity", "spectrum"}


def test_a_handler_of_ones_own_is_attached_in_python(tmp_path):
    run = build(tiny_config(run_dir=tmp_path / "run", probe__enabled="false"))
    assert not (tmp_path / "run").exists()  # building writes nothing
    handler = CountSteps()
    handler.attach(run.trainer)
    run.fit()
    assert handler.steps == run.trainer.state.optimizer_step == 10
    assert set(run.modules) == {"context_encoder", "target_encoder", "predictor"}
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


def test_a_handler_of_ones_own_is_attached_from_yaml(command, parts, tmp_path):
    write_config(
        tmp_path / "c.yaml", handlers=[{"class_path": f"{parts}.Note", "init_args": {"path": "note", "text": "here"}}]
    )
    _, err, code = command(pretrain, "--config", "c.yaml")
    assert code == 0, err
    assert (tmp_path / "note").read_text() == "here until 10"


def test_a_guard_of_ones_own_ends_the_run(tmp_path):
    run = build(tiny_config(run_dir=tmp_path / "run", probe__enabled="false"))

    def stop(engine):
        raise GuardStop("enough")

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), stop)
    with pytest.raises(GuardStop, match="enough"):
        run.fit()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["reason"], status["step"], status["exit_code"]) == ("enough", 3, 5)


def test_max_iters_ends_a_run_inside_an_epoch(tmp_path):
    run = build(tiny_config(run_dir=tmp_path / "run", probe__enabled="false", training__max_iters=7))
    run.fit()
    assert run.trainer.state.iteration == 7
    longer = build(tiny_config(run_dir=tmp_path / "longer", probe__enabled="false", training__max_iters=99))
    longer.fit()
    assert longer.trainer.state.iteration == 10  # never more than the epochs


def test_early_stopping_ends_a_run(tmp_path):
    # A learning rate that moves nothing: the second validation is no better than the first.
    config = tiny_config(run_dir=tmp_path / "run", probe__enabled="false", training__early_stopping=1)
    run = build(replace(config, training=replace(config.training, epochs=50, lr=1e-30, min_lr=0.0, warmup_epochs=0)))
    run.fit()
    assert run.trainer.state.epoch == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_with_workers_ends(server, parts, tmp_path, fails):
    handlers = [{"class_path": f"{parts}.Bomb"}] if fails else []
    write_config(tmp_path / "c.yaml", handlers=handlers, data__num_workers=2)
    _, err, code = server.call("--config", "c.yaml", folder=tmp_path)
    assert code == (1 if fails else 0), err


# --- Several processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation_steps", mostly_slow([1, 2], (2,)))
def test_two_processes_equal_one(parts, command, tmp_path, accumulation_steps):
    seen = {}
    for processes in (1, 2):
        folder = tmp_path / f"of{processes}"
        folder.mkdir()
        config = write_config(
            tmp_path / f"{processes}.yaml",
            run_dir=str(folder / "run"),
            handlers=[{"class_path": f"{parts}.Spy", "init_args": {"folder": str(folder)}}],
            training__accumulation_steps=accumulation_steps,
            training__optimizer="sgd",
            training__lr=0.1,
            training__clip_grad=0.5,
            training__epochs=4,
        )
        if processes == 1:
            assert command(pretrain, "--config", config)[2] == 0
        elif accumulation_steps == 1:  # as a user starts them
            torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
            recipe = ROOT / "recipes" / "pretrain.py"
            _, err, code = call(*torchrun, recipe, "--config", config, cwd=tmp_path, modules=tmp_path)
            assert code == 0, err
        else:
            in_processes(2, tmp_path, lambda path=config: build(load_config(path)).fit())
        seen[processes] = [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]
    (alone,), (first, second) = seen[1], seen[2]
    assert alone["steps"] == first["steps"] == second["steps"] == (20 if accumulation_steps == 1 else 12)
    for what in ("images", "context", "target"):
        together = [torch.cat(halves) for halves in zip(first[what], second[what], strict=True)]
        assert len(together) == len(alone[what]) == 20
        assert all(torch.equal(a, b) for a, b in zip(alone[what], together, strict=True)), what
    assert same_bits(first["weights"], second["weights"])
    assert largest_difference(alone["weights"], first["weights"]) < 1e-5
    encoders = [weights_of(load_encoder(tmp_path / f"of{processes}" / "run")) for processes in (1, 2)]
    assert largest_difference(*encoders) < 1e-5
    start = weights_of(build(load_config(tmp_path / "1.yaml", ["--run_dir", str(tmp_path / "x")])).modules)
    assert largest_difference(start, alone["weights"]) > 1e-2  # it did learn something
    metrics = [
        [json.loads(line) for line in (tmp_path / f"of{n}" / "run" / "metrics.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    assert len(metrics[0]) == len(metrics[1])
    for one, two in zip(*metrics, strict=True):
        for key in [key for key in one if not is_time(key)]:
            if isinstance(one[key], dict):  # a spectrum, of four digits
                one[key], two[key] = one[key]["share"], two[key]["share"]
            assert two[key] == pytest.approx(one[key], rel=1e-4 if isinstance(one[key], float) else 2e-3, abs=1e-6), key
