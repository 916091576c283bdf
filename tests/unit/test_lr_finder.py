import io
import math
from contextlib import redirect_stdout
from pathlib import Path

import PIL.Image
import pytest
import torch
from helpers import NOISE, ROOT, linear_trainer, options, rows

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.errors import ConfigError
from hjepa_engine.handlers import MetricAverager, ParamSchedule
from hjepa_engine.recipes.common.lr_finder import LearningRateSweep, find_lr, smoothed, sweep_lr
from hjepa_engine.recipes.pretrain import build, main


def square_step(modules, batch):
    return {"loss": modules["model"](batch["x"]).square().mean()}


def test_the_learning_rate_rises_by_one_factor_per_optimizer_step_and_each_loss_is_noted():
    trainer, step = linear_trainer(accumulation_steps=2, lr=5.0)
    trainer.attach(ParamSchedule(step.optimizer, "lr", lambda step: 7.0), MetricAverager())
    mine = []
    trainer.add_event_handler(TrainEvents.LOG_METRICS, mine.append, "mine")
    seen = []
    trainer.add_event_handler(TrainEvents.FORWARD_STARTED, lambda: seen.append(step.optimizer.param_groups[0]["lr"]))
    sweep = sweep_lr(trainer, rows((1, 0), (3, 0), (0, 0)), steps=4)
    expected = [1e-6, 1e-4, 1e-2, 1.0]
    assert sweep.lrs == pytest.approx(expected)
    # Windows of two batches and of the epoch's last one: the means are (1 + 3) / 2 of the weight, and 0.
    assert seen == pytest.approx([1e-6, 1e-6, 1e-4, 1e-2, 1e-2, 1.0])
    weight = 1 - 1e-6 * 2
    assert sweep.losses == pytest.approx([2.0, 0.0, 2 * weight, 0.0])
    assert mine and "train/loss" not in trainer.state.metrics  # the user's own handlers stay, others leave


def test_the_sweep_ends_when_the_loss_diverges():
    trainer, _ = linear_trainer(step=square_step)
    sweep = sweep_lr(trainer, rows(*[(10, 10)] * 10), steps=100)
    values = smoothed(sweep.losses)
    assert len(values) < 100 and values[-1] > 4 * min(values[:-1]) and values[-2] <= 4 * min(values)
    # x is (10, 10): the loss shrinks where lr * 2 * 200 < 2, and fastest well below that.
    assert 1e-4 < sweep.suggestion() < 5e-3


def swept(losses):
    sweep = LearningRateSweep(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), steps=len(losses))
    sweep.losses = losses
    return sweep


def test_the_suggestion_is_where_the_loss_falls_fastest_before_it_first_rises():
    falling = [1.0] * 10 + [0.9, 0.7, 0.3, 0.25, 0.22, 0.21]
    sweep = swept([*falling, 5.0, 5.0, 0.0, 0.0, 0.0])
    assert sweep.suggestion() == swept([*falling, 5.0, 5.0, 5.0, math.nan, 5.0]).suggestion()
    place = sweep.lrs.index(sweep.suggestion())
    assert 11 <= place <= 14
    for hopeless in ([1.0] * 5, [1.0, 2.0, 3.0], [math.nan] * 3):
        assert swept(hopeless).suggestion() is None


def test_smoothing_begins_without_a_bias():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    assert smoothed([1.0, 0.0], keep=0.5) == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"start": 2.0}, {"steps": 1}])
def test_an_impossible_sweep_is_refused(wrong):
    with pytest.raises(ValueError, match="start must be above 0 and below end, steps at least 2"):
        LearningRateSweep(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), **wrong)


def test_the_recipe_suggests_a_learning_rate_and_writes_nothing_but_its_picture(tmp_path, capsys, monkeypatch):
    import hjepa_engine.recipes.common.lr_finder as module

    monkeypatch.setattr(module.find_lr, "__defaults__", (8,))
    changes = {**NOISE, "training.accumulation_steps": 2, "logging.progress_bar": "true", "pictures.enabled": "true"}
    main([*options(changes), f"--run_dir={tmp_path / 'run'}", "--find_lr"])
    printed = capsys.readouterr().out
    path = tmp_path / "run" / "preview" / "lr_finder.png"
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
    assert PIL.Image.open(path).size[0] > 500
    data, *lines = printed.splitlines()
    assert data.startswith("data: 40 images of 10 classes") and lines[0].startswith("fake in batches of 8")
    assert lines[2].split() == ["lr", "loss"]
    assert lines[3].split()[0] == "1e-06" and len(lines) == 3 + 8 + 3
    assert lines[-1] == f"drawn: {path}"


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run").write_text("in the way")
    config = load_config(None, [*options(NOISE), f"--run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"^run_dir .*run cannot be written to: "):
        find_lr(config, build, steps=2)


def test_the_example_of_the_documentation_finds_a_learning_rate():
    page = (Path(ROOT) / "docs" / "ignite.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    said = io.StringIO()
    with redirect_stdout(said):
        exec(program, {})
    assert 1e-3 < float(said.getvalue()) < 10.0
