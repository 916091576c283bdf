"""Runs of the pretraining recipe that are stopped, started again, and compared bit by bit."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from helpers import NOISE, is_time, logged, options
from ignite.engine import Events

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.checkpoint.retention import best
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.state import collect_state
from hjepa_engine.errors import Preempted
from hjepa_engine.recipes import pretrain
from hjepa_engine.utils.sharding import whole

#: Everything that draws random numbers or keeps a state; 3 epochs of 5 iterations.
RICH = {
    **NOISE,
    "data.batch_size": 4,
    "data.fake_size": 20,
    "model.depth": 2,
    "model.drop_path": 0.3,
    "data.random_affine": 0.5,
    "data.color_jitter": 0.5,
    "data.horizontal_flip": 0.5,
    "loss.sigreg_weight": 0.1,
    "loss.variance_weight": 0.1,
    "training.epochs": 3,
    "training.clip_grad": 0.5,
    "training.level_lrs": "[1e-3, 3e-3]",
    "training.early_stopping": 5,
    "checkpoint.save_every_steps": 4,
    "probe.enabled": "false",
}
ITERATIONS = 15
#: 3 epochs of 7 iterations: processes agree upon a stop after iterations 10 and 20, inside an epoch.
TWO = {**RICH, "logging.log_frequency": 4, "data.fake_size": 28, "data.random_affine": 0, "data.color_jitter": 0}
#: What differs between one and two processes is left out.
ALIKE = {
    **TWO,
    "model.drop_path": 0,
    "loss.sigreg_weight": 0,
    "loss.variance_weight": 0,
    "training.optimizer": "sgd",
    "training.lr": 0.1,
    "training.level_lrs": None,
}


class OnlineProbe:
    """A linear head with an optimizer of its own, trained on what the step has put out."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.head = torch.nn.Linear(16, 3)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.optimizer = torch.optim.Adam(self.head.parameters(), 0.05)

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.learn)

    def learn(self, engine):
        features = engine.state.output["context_tokens"].float().mean(dim=1)
        loss = torch.nn.functional.cross_entropy(self.head(features), engine.state.batch["labels"] % 3)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        engine.state.metrics["probe/online"] = loss.item()

    def state_dict(self):
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


class Drawer:
    """Draw from every global generator between steps, and keep all that was drawn."""

    def __init__(self):
        self.drawn, self.total = [], 0.0

    def attach(self, engine):
        for event in (Events.GET_BATCH_STARTED, Events.ITERATION_STARTED, Events.EPOCH_COMPLETED):
            engine.add_event_handler(event, self.draw)

    def draw(self):
        self.drawn += [torch.rand(()).item(), np.random.rand(), random.random()]
        self.total = 0.9 * self.total + sum(self.drawn[-3:])

    def state_dict(self):
        return {"drawn": self.drawn, "total": self.total}

    def load_state_dict(self, state):
        self.drawn, self.total = list(state["drawn"]), state["total"]


class Steps:
    """Note the learning rate of every optimizer step that is taken, of all runs."""

    taken = []

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.FORWARD_STARTED, self.note)

    def note(self, engine):
        groups = engine.stateful_handlers()["OptimizerStep"].optimizer.param_groups
        self.taken.append(next(group["lr"] for group in groups if group["level"] is None))


def ask_at(run, iteration):
    """Request a stop in the middle of an iteration."""

    def ask(engine):
        if engine.state.iteration == iteration:
            run.preemption.request("asked")

    run.trainer.add_event_handler(TrainEvents.LOSS_READY, ask)


def train(folder, values, handlers=(), stop=None, ask=ask_at, reason="asked", **parts):
    """Build a run and train it, with handlers (and a step and modules) of its own, until it ends or ``ask(run, stop)``
    stops it."""
    run = pretrain.build(load_config(None, options({**values, "run_dir": str(folder)})), **parts)
    for handler in handlers:
        handler().attach(run.trainer)
    if stop is not None:
        ask(run, stop)
    with contextlib.nullcontext() if stop is None else pytest.raises(Preempted, match=reason):
        run.fit()
    return run


def outcome(run, with_generators=True):
    """All that a run leaves behind but times: its state without tensors, the tensors, the log, the best checkpoint."""
    state = collect_state(run.trainer)
    values = state["engine"]["metrics"]["values"]
    state["engine"]["metrics"]["values"] = {name: values[name] for name in values if not is_time(name)}
    del state["handlers"]["MetricsLogger"]["writers"]  # a file is as long as the numbers for times are
    if not with_generators:
        del state["ranks"][0]["random"]
    structure, tensors = flatten(state)
    records = logged(run.folder.path)
    foremost = best([checkpoint.record for checkpoint in list_checkpoints(run.folder.checkpoint_path)])
    place = foremost and (foremost.iteration, foremost.score)
    return json.loads(structure), {name: whole(tensor).clone() for name, tensor in tensors.items()}, records, place


def assert_same(one, other):
    """Two outcomes have the same bits; else the message has what differs."""
    leaves = [flat(dict(zip(("state", "log", "best"), (run[0], run[2], run[3]), strict=True))) for run in (one, other)]
    differ = {name: [run.get(name) for run in leaves] for name in leaves[0].keys() | leaves[1].keys()}
    differ = {name: pair for name, pair in differ.items() if repr(pair[0]) != repr(pair[1])}  # NaN is NaN here
    assert not differ, dict(sorted(differ.items()))
    assert one[1].keys() == other[1].keys()
    differ = [name for name in one[1] if not torch.equal(one[1][name], other[1][name])]
    assert not differ, differ


def contents(folder):
    """Every file but the lock: bytes and time of the last change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def flat(state, path=""):
    """Every leaf of nested dicts and lists by its path: where two states differ is then seen."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        return {path: state}
    return {key: value for name, item in items for key, value in flat(item, f"{path}.{name}").items()}
