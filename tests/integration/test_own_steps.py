"""A step and modules of one's own, from Python and from YAML: they get whatever H-JEPA's step gets."""

import json
import logging
import math
from functools import partial

import pytest
import torch
from helpers import NOISE, options
from ignite.engine import Events
from resuming import assert_same, outcome, train
from torch import nn

from hjepa_engine import load_config, load_encoder
from hjepa_engine.build import build_model
from hjepa_engine.errors import ConfigError, DataError, ExportError
from hjepa_engine.models import two_views
from hjepa_engine.recipes import linear_probe, pretrain
from hjepa_engine.recipes.examples import mae, supervised
from hjepa_engine.steps import two_view_step

ME = __name__
#: Two epochs of five iterations, everything on that looks at features.
SMALL = {
    **NOISE,
    "training.epochs": 2,
    "logging.log_frequency": 2,
    "collapse.images": 16,
    "collapse.every": 4,
    "collapse.batch_every": 1,
    "online_probe.every": 1,
    "online_probe.train_images": 20,
    "online_probe.val_images": 20,
    "checkpoint.save_every_steps": 2,
    "checkpoint.metric": "probe/knn",
    "checkpoint.mode": "max",
    "probe.epochs": 2,
    "logging.report": "true",
    "probe.enabled": "true",
}
BY_LOSS = {"checkpoint.metric": "val/loss", "checkpoint.mode": "min"}
MAE = {
    **SMALL,
    "step": f"{{class_path: {mae.__name__}.mae_step, init_args: {{mask_ratio: 0.25}}}}",
    "model.class_path": f"{mae.__name__}.build_modules",
    "model.init_args": "{width: 16}",
    "collapse.outputs": "{context: context_tokens}",
    "pictures.enabled": "false",
}
TWO_VIEWS = {"step": partial(two_view_step, color=0.4), "modules": two_views.build_modules}
LABELS = {"step": supervised.supervised_step, "modules": supervised.build_modules}
PLAIN = SMALL | {"pictures.enabled": "false"}
EXAMPLES = pytest.mark.parametrize(
    ("values", "parts"), [(MAE, {}), (PLAIN, TWO_VIEWS), (PLAIN, LABELS)], ids=["mae", "two_views", "supervised"]
)


def metrics_in(run):
    lines = (run.folder.path / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}


@pytest.mark.parametrize("label", [-1, 4])
def test_training_with_labels_says_which_label_it_cannot_have(label):
    modules = supervised.build_modules(load_config(None, options(NOISE)), num_classes=4)
    batch = {"images": torch.zeros(2, 3, 24, 24), "labels": torch.tensor([0, label])}
    with pytest.raises(
        DataError, match=rf"^labels must be from 0 to 3 \(model\.init_args has num_classes\), got {label}"
    ):
        supervised.supervised_step(modules, batch)


@EXAMPLES
def test_an_own_step_is_resumed_with_the_same_bits_and_has_probes_collapse_metrics_and_a_report(
    tmp_path, values, parts
):
    whole = train(tmp_path / "whole", values, **parts)
    train(tmp_path / "cut", values, stop=3, **parts)
    train(tmp_path / "cut", values, stop=8, **parts)
    assert_same(outcome(train(tmp_path / "cut", values, **parts)), outcome(whole))
    names = metrics_in(whole)
    assert {"train/loss", "val/loss", "train/lr", "probe/knn", "probe/linear", "probe/linear_random"} <= names
    assert {"collapse/target_std", "collapse/target_rank"} <= names
    assert {"collapse/batch_context_rank", "collapse/batch_target_rank"} & names
    assert "train/ema_momentum" not in names  # there is no target encoder
    html = (whole.folder.path / "report.html").read_text()
    assert "collapse/target_rank" in html and "probe/knn" in html


@pytest.mark.parametrize(("name", "build"), [("mae", mae.build_modules), ("two_views", two_views.build_modules)])
def test_the_yaml_of_an_example_is_all_its_wiring(tmp_path, capsys, name, build):
    config = str(pretrain.DEFAULT_CONFIG.with_name(f"{name}.yaml"))
    small = ["--training.max_iters=3", "--probe.epochs=1", "--collapse.enabled=false", "--logging.progress_bar=false"]
    pretrain.main(["--config", config, f"--run_dir={tmp_path / 'run'}", "--online_probe.every=null", *small])
    assert "trained encoder " in capsys.readouterr().out
    linear_probe.main(["--run", str(tmp_path / "run"), "--checkpoint", "latest"])
    assert "trained encoder " in capsys.readouterr().out
    # The export holds the weights alone; an equal encoder takes them in.
    with pytest.raises(ExportError, match="pass load_encoder an encoder to load the weights into"):
        load_encoder(tmp_path / "run", "latest")
    encoder = build(load_config(config))["encoder"]
    assert load_encoder(tmp_path / "run", "latest", encoder) is encoder


class Classifier(nn.Module):
    """No transformer at all: from images to one vector each."""

    def __init__(self, config):
        super().__init__()
        size = config.data.channels * math.prod(config.data.size)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size, 6), nn.BatchNorm1d(6))

    def forward(self, images):
        return self.body(images)


def small_modules(config):
    return nn.ModuleDict({"body": Classifier(config), "head": nn.Linear(6, 6)})


def no_modules():
    return []


def small_step(modules, batch):
    features = modules["body"](batch["images"])
    return {"loss": (modules["head"](features) - features.detach().roll(1, 0)).square().mean(), "features": features}


def test_monitors_probes_and_export_take_the_names_that_the_configuration_gives(tmp_path):
    names = {"model.encoder": "body", "collapse.outputs": "{target: features}", "pictures.enabled": "false"}
    run = train(tmp_path / "run", SMALL | names, step=small_step, modules=small_modules)
    values = run.trainer.state.metrics
    assert 1 <= values["collapse/target_rank"] <= 6 and "probe/linear_random" in metrics_in(run)
    body = Classifier(run.config)
    images = torch.rand(3, run.config.data.channels, *run.config.data.size)
    loaded = load_encoder(tmp_path / "run", encoder=body)
    torch.testing.assert_close(loaded(images), run.modules["body"].eval()(images), rtol=0, atol=0)


def test_what_cannot_be_measured_is_said_in_one_line_each_and_the_run_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = train(
            tmp_path / "run",
            SMALL | {"checkpoint.metric": "val/loss", "checkpoint.mode": "min"},
            step=small_step,
            modules=small_modules,
        )
    said = [record.getMessage() for record in caplog.records if "body, head" in record.getMessage()]
    assert len(said) == 3
    assert "collapse is not measured: none of the modules body, head is an encoder; model.encoder names one" in said
    assert run.trainer.state.iteration == 10 and not any(name.startswith("probe/") for name in metrics_in(run))


def test_outputs_that_the_step_does_not_return_are_named_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", SMALL | {"model.encoder": "body"}, step=small_step, modules=small_modules)
    said = [line for line in caplog.messages if "collapse.outputs" in line]
    assert len(said) == 1 and "context_tokens, target_tokens: the step returns loss, features" in said[0]


def test_handlers_can_be_passed_to_build(tmp_path):
    class Count:
        seen = 0

        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_STARTED, self.count)

        def count(self):
            self.seen += 1

    counter = Count()
    config = load_config(
        None, options({**NOISE, "training.epochs": 2, "run_dir": str(tmp_path / "run"), "probe.enabled": "false"})
    )
    pretrain.build(config, handlers=[counter]).fit()
    assert counter.seen == 2


class Step:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, modules, batch):
        outputs = small_step(modules, batch)
        return {**outputs, "loss": self.weight * outputs["loss"]}


def test_a_step_may_be_a_class_whose_instance_is_called(tmp_path):
    values = {**SMALL, "probe.enabled": "false", "training.max_iters": 1, "collapse.enabled": "false"}
    values |= BY_LOSS | {"online_probe.every": "null"}
    values |= {"model.class_path": f"{ME}.small_modules", "pictures.enabled": "false"}
    losses = []
    for number, weight in enumerate((1, 3)):
        step = {"step": f"{{class_path: {ME}.Step, init_args: {{weight: {weight}}}}}"}
        losses.append(train(tmp_path / str(number), values | step).trainer.state.metrics["train/loss"])
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": "{class_path: nowhere.step}"}, "step.class_path: 'nowhere.step' cannot be imported"),
        (
            {"step": f"{{class_path: {ME}.small_step, init_args: {{a: 1}}}}"},
            "step.init_args: got an unexpected keyword argument 'a'",
        ),
        ({"step": f"{{class_path: {ME}.Step}}"}, "step.init_args: .*missing 1 required positional argument: 'weight'"),
        ({"step": f"{{class_path: {ME}.SMALL}}"}, "step.class_path: .*SMALL must be a function or a class"),
        ({"model.class_path": f"{ME}.nothing"}, "model.class_path: .* has no nothing"),
        (
            {"model.class_path": f"{ME}.no_modules"},
            "model.class_path: .*no_modules must return an nn.ModuleDict, got list",
        ),
        (
            {"model.class_path": f"{ME}.small_modules", "model.init_args": "{b: 2}"},
            "model.init_args: .*unexpected keyword argument 'b'",
        ),
        (
            {"model.encoder": "backbone"},
            "model.encoder must be one of the modules context_encoder, target_encoder, predictor, got 'backbone'",
        ),
        ({"collapse.modules": "{target: teacher}"}, "collapse.modules must name modules .*got 'teacher'"),
    ],
)
def test_what_cannot_be_built_is_one_line_with_its_key(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        pretrain.build(load_config(None, options({**NOISE, **values, "run_dir": str(tmp_path / "run")})))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda loss: {"other": loss}, "a dict with other"),
        (lambda loss: None, "NoneType"),
        (lambda loss: (loss, loss), "tuple"),
        (lambda loss: loss, "Tensor"),
        (lambda loss: {"loss": 1.0}, "a loss of type float"),
        (lambda loss: {"loss": loss.detach()}, "a loss that depends on no trained parameter"),
        (lambda loss: {"loss": loss[None]}, r"a loss of shape \(1,\)"),
    ],
)
def test_a_step_without_a_loss_is_one_line(tmp_path, output, got):
    def step(modules, batch):
        return output(modules["body"](batch["images"]).square().mean())

    values = {**NOISE, "probe.enabled": "false", "collapse.enabled": "false", "pictures.enabled": "false"}
    config = load_config(None, options({**values, "run_dir": str(tmp_path / "run")}))
    message = f"the step must return a dict whose loss is a scalar tensor with a gradient, got {got}$"
    with pytest.raises(ConfigError, match=message):
        pretrain.build(config, step=step, modules=small_modules).fit()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"modules": {"body": nn.Linear(2, 2)}},
            "modules must be an nn.ModuleDict or a function that makes one, got dict",
        ),
        ({"modules": nn.Linear(2, 2)}, "modules must be an nn.ModuleDict or a function that makes one, got Linear"),
        ({"modules": no_modules}, "modules: no_modules must return an nn.ModuleDict, got list"),
        ({"modules": nn.ModuleDict()}, r"the modules \(there are none\) have no trainable parameters"),
        ({"step": "own.step"}, r"step must be a function \(modules, batch\), got 'own.step'"),
    ],
)
def test_wrong_parts_are_refused_when_they_are_given(tmp_path, parts, message):
    with pytest.raises(ConfigError, match=message):
        pretrain.build(load_config(None, options({**NOISE, "run_dir": str(tmp_path / "run")})), **parts)


def test_a_function_without_parameters_makes_modules_too():
    config = load_config(None, options(NOISE))
    assert [*build_model(config, lambda: nn.ModuleDict({"a": nn.Identity()}))] == ["a"]
    assert [*build_model(config, lambda given: nn.ModuleDict({str(given.seed): nn.Identity()}))] == ["0"]


def test_going_on_with_another_step_is_said(tmp_path, caplog):
    values = SMALL | BY_LOSS | {"collapse.enabled": "false", "online_probe.every": "null", "probe.enabled": "false"}
    train(tmp_path / "run", values | {"training.max_iters": 2}, step=small_step, modules=small_modules)
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", values, step=Step(2.0), modules=small_modules)
    (said,) = [line for line in caplog.messages if "step is" in line]
    assert f"step is {ME}.Step, the checkpoint was written with {ME}.small_step" in said
