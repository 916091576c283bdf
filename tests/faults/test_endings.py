"""How runs end, and what loggers that fail do to them: real signals, real files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import linear_trainer, rows
from ignite.engine import Events

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import build_loader, loading, open_split
from hjepa_engine.errors import ConfigError
from hjepa_engine.handlers import MetricsLogger
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.recipes.pretrain import DEFAULT_CONFIG, build
from hjepa_engine.state import Metrics

ROOT = Path(__file__).parents[2]
SHORT = ["training.max_iters=2", "probe.enabled=false", "logging.progress_bar=false", "logging.log_frequency=1"]


def test_sigterm_ends_a_run_with_75_saved_and_the_same_command_goes_on(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "recipes" / "pretrain.py"),
        "--run_dir",
        "run",
        *("--logging.log_frequency", "1", "--probe.enabled", "false"),
    ]
    process = subprocess.Popen([*command, "--data.num_workers", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"train/loss"') > 2):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert process.returncode == 75
    (saved,) = (tmp_path / "run" / "checkpoints").glob(f"epoch_0000_step_{status['step']:08d}")
    reason = (
        f"SIGTERM at step {status['step']}: saved {saved.relative_to(tmp_path)}; run the same command again to go on"
    )
    assert err.splitlines()[-1] == reason
    assert (status["state"], status["exit_code"], status["reason"]) == ("preempted", 75, reason)
    assert status["step"] >= 2
    again = [*command, "--training.max_iters", str(status["step"] + 2)]
    answer = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert f"resumed step {status['step']} " in answer.stdout
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, status["step"] + 3))


def test_a_finished_run_is_not_trained_again_from_python_either(tmp_path):
    def contents():
        files = (path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in files}

    config = load_config(DEFAULT_CONFIG, [f"run_dir={tmp_path}", *SHORT])
    build(config).fit()
    before = contents()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    again = build(config)
    steps = []
    again.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: steps.append(1))
    again.fit()
    assert (steps, again.trainer.state.iteration) == ([], 2)
    assert contents() == before


def test_status_says_that_a_run_was_cut_short(tmp_path):
    run = build(load_config(DEFAULT_CONFIG, [f"run_dir={tmp_path}", *SHORT, "training.max_iters=9"]))
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), run.trainer.terminate)
    run.fit()
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "ended after 2 of 9 iterations"


def test_a_batch_that_cannot_be_shared_out_is_a_mistake_in_the_configuration(monkeypatch):
    monkeypatch.setattr(loading.idist, "get_world_size", lambda: 2)
    config = DataConfig(dataset="fake", image_size=8, batch_size=7)
    with pytest.raises(
        ConfigError, match=r"^data.batch_size must be a multiple of the number of processes \(2\), got 7$"
    ):
        build_loader(config, open_split(config, "train"), 0, train=True)


def test_metrics_may_be_tensors_and_what_is_no_number_is_not_logged(tmp_path):
    trainer, _ = linear_trainer()
    MetricsLogger([JsonlWriter(tmp_path / "metrics.jsonl")]).attach(trainer)

    def write(engine):
        engine.state.metrics |= {"tensor": torch.tensor(1.5), "whole": 2, "text": "no number", "many": torch.zeros(3)}
        engine.state.metrics.setdefault("default", 3.0)

    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, write)
    trainer.run(rows((1, 0)))
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {name: record[name] for name in record if name not in ("step", "epoch", "time")} == {
        "tensor": 1.5,
        "whole": 2.0,
        "default": 3.0,
    }
    assert isinstance(trainer.state.metrics, Metrics)
