"""A handler that is detached leaves nothing behind: every one of the package's, and any that is written like them."""

import contextlib
import functools
import hashlib
import json
import weakref

import pytest
from helpers import NOISE, is_time, linear_trainer, options, rows
from ignite.engine import Events
from processes import in_processes

from hjepa_engine import TrainEvents, handlers, load_config
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.checkpoint.storage import read_state
from hjepa_engine.handlers import MetricAverager, ParameterHistograms, ProgressBar, StepTiming, Throughput, Validation
from hjepa_engine.recipes import pretrain

CLASSES = {name: cls for name in handlers.__all__ if hasattr(cls := getattr(handlers, name), "attach")}
#: Two iterations with every handler there is; figures, which take long, apart.
FULL = {
    **NOISE,
    "data.fake_size": 16,
    "training.epochs": 1,
    "training.warmup_epochs": 0,
    "training.early_stopping": 3,
    "collapse.images": 8,
    "online_probe.every": 1,
    "online_probe.train_images": 8,
    "online_probe.val_images": 8,
    "online_probe.linear_epochs": 0,
    "logging.watch": "all",
    "logging.watch_frequency": 2,
    "logging.progress_bar": "true",
    "pictures.enabled": "true",
}
#: What else the handler needs in order to do its work, or the others in order to be quick.
OWN = {
    "BatchCollapse": {"data.image_size": 48, "data.fake_size": 80, "data.batch_size": 40},
    "Pictures": {"pictures.enabled": "true"},
}


def reaches(value, target):
    """Whether calling ``value`` could lead to ``target``: through methods, partials, closures, wrappers, arguments."""
    if isinstance(value, weakref.ref):
        value = value()
    if value is target:
        return True
    inner = []
    for name in ("__self__", "__wrapped__", "_parent", "func", "args", "keywords"):
        inner += [getattr(value, name)] if hasattr(type(value), name) or name in vars_of(value) else []
    inner += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    if isinstance(value, (tuple, list)):
        inner += value
    if isinstance(value, dict):
        inner += value.values()
    return any(reaches(item, target) for item in inner)


def vars_of(value):
    return getattr(value, "__dict__", {})


def entries_of(engine, handler):
    """What would still call a handler."""
    entries = [(event, entry) for event, entries in engine._event_handlers.items() for entry in entries]
    return [(event, function) for event, (function, _, _) in entries if reaches(function, handler)]


def table(engine):
    """Who listens to what, in which order."""
    return {
        event: [(getattr(function, "__qualname__", type(function).__name__), args[1:]) for function, args, _ in entries]
        for event, entries in engine._event_handlers.items()
        if entries
    }


def built(folder, name):
    """A run with every handler; its trainer, and the evaluator of its validation."""
    values = {**FULL, "pictures.enabled": "false", **OWN.get(name, {}), "run_dir": str(folder)}
    run = pretrain.build(load_config(None, options(values)))
    return run, [run.trainer, *(owner.evaluator for owner in owners(run.trainer) if isinstance(owner, Validation))]


def owners(engine):
    """The objects whose methods listen to an engine."""
    functions = [function for entries in engine._event_handlers.values() for function, _, _ in entries]
    functions = [function._parent() if hasattr(function, "_parent") else function for function in functions]
    return list({id(owner): owner for owner in (getattr(f, "__self__", f) for f in functions)}.values())


def trained(run):
    """All that two iterations leave: the error that ended them, weights, metrics, media, state, files, checkpoint."""
    error = None
    try:
        with contextlib.redirect_stderr(None):
            run.trainer.run(run.data, max_epochs=1)
    except Exception as caught:  # a run without masks, say, has an end of its own
        error = repr(caught)
    finally:
        run.logger.close()
        run.preemption.close()
    digest, state, folder = hashlib.sha256(), run.trainer.state, run.folder.path
    for tensor in run.modules.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    saved = [read_state(checkpoint) for checkpoint in list_checkpoints(run.folder.checkpoint_path)]
    return {
        "error": error,
        "weights": digest.hexdigest(),
        "metrics": {name: None if is_time(name) else value for name, value in state.metrics.items()},
        "media": list(state.media),
        "log": [{name: None if is_time(name) else value for name, value in line.items()} for line in lines],
        "stateful": list(run.trainer.stateful_handlers()),
        "saved": [[*state["handlers"], *state["ranks"][0]["handlers"]] for state in saved],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_that_a_handler_was_detached_from_is_one_that_never_had_it(name, tmp_path, monkeypatch):
    cls = CLASSES[name]
    run, engines = built(tmp_path / "detached", name)
    owned = [(engine, handler) for engine in engines for handler in owners(engine) if isinstance(handler, cls)]
    assert owned
    for engine, handler in owned:
        engine.detach(handler)
    for _, handler in owned:
        assert not any(entries_of(engine, handler) for engine in engines)
        assert not any(other is handler for other in run.trainer.stateful_handlers().values())

    monkeypatch.setattr(cls, "watch" if name == "Preemption" else "attach", lambda self, engine: None)
    monkeypatch.setattr(cls, "attach", lambda self, engine: None)
    never, others = built(tmp_path / "never", name)
    assert all(table(engine) == table(other) for engine, other in zip(engines, others, strict=name != "Validation"))
    found, expected = trained(run), trained(never)
    assert found == expected
    named = {other.partition("_")[0] for names in [found["stateful"], *found["saved"]] for other in names}
    assert name not in named and len(named) > 5
    assert not any(entries_of(engine, handler) for engine in engines for _, handler in owned)


class Every:
    """A handler that listens in every way there is, and has a state."""

    def __init__(self):
        self.seen = []

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self.listen)
        engine.add_event_handler(Events.ITERATION_STARTED | Events.EPOCH_COMPLETED, self.note, "list")
        engine.add_event_handler(TrainEvents.OPTIMIZER_STEPPED(every=2), self.note, "filtered")
        engine.add_event_handler(TrainEvents.LOSS_READY, functools.partial(self.note, what="partial"))
        engine.add_event_handler(Events.GET_BATCH_STARTED(once=1), functools.partial(self.note, what="both"))
        engine.add_event_handler(TrainEvents.LOG_METRICS, self)

    def listen(self, engine):
        engine.add_event_handler(TrainEvents.METRICS_READY, self.note, "late")

    def note(self, engine, what):
        self.seen.append(what)

    def __call__(self, engine):
        self.seen.append("called")

    def __eq__(self, other):
        return isinstance(other, Every)  # equal ones are not the same

    __hash__ = None

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]


WAYS = {"list", "filtered", "partial", "both", "called", "late"}


def test_every_way_to_listen_ends_and_an_equal_handler_stays():
    trainer, step = linear_trainer()
    before, one, other = table(trainer), Every(), Every()
    one.attach(trainer)
    other.attach(trainer)
    assert trainer.stateful_handlers() == {"OptimizerStep": step, "Every": one, "Every_2": other}
    trainer.detach(one)
    assert not entries_of(trainer, one) and len(entries_of(trainer, other)) == 7
    assert trainer.stateful_handlers()["Every"] is other and len(trainer.stateful_handlers()) == 2
    trainer.run(rows((1, 2), (3, 4)), max_epochs=1)
    assert one.seen == [] and set(other.seen) == WAYS
    trainer.detach(other)
    assert table(trainer) == before


def test_a_handler_that_listens_to_more_once_the_run_has_started_can_be_detached_in_its_midst():
    trainer, _ = linear_trainer()
    before, handler, after = table(trainer), Every(), []
    handler.attach(trainer)

    @trainer.on(TrainEvents.LOSS_READY)
    def leave(engine):
        after.append(len(handler.seen))
        if engine.state.iteration == 3:
            engine.detach(handler)

    trainer.run(rows((1, 2), (3, 4)), max_epochs=3)
    assert set(handler.seen) == WAYS and len(after) == 6 and after[2:] == [len(handler.seen)] * 4
    trainer.detach(leave)
    assert table(trainer) == before


@pytest.mark.parametrize("cls", [Throughput, StepTiming])
def test_handlers_that_listen_last_are_detached_in_the_midst_of_a_run(cls):
    trainer, _ = linear_trainer()
    before, handler = table(trainer), cls()
    handler.attach(trainer)
    images = [{**row, "images": row["x"]} for row in rows((1, 2), (3, 4), (5, 6))]
    moments = []

    @trainer.on(TrainEvents.METRICS_READY)
    def leave(engine):
        fresh, _ = engine.state.metrics.since(moments[-1] if moments else 0)
        moments.append(engine.state.metrics.moment)
        assert bool(fresh) == (engine.state.iteration == 1)
        if engine.state.iteration == 1:
            engine.detach(handler)

    trainer.run(images, max_epochs=1)
    trainer.detach(leave)
    assert len(moments) == 3 and moments[0] > 1 and table(trainer) == before


def test_others_that_listen_to_the_event_in_which_a_handler_leaves_are_not_passed_over():
    trainer, _ = linear_trainer()
    seen = []

    class Once:
        def attach(self, engine):
            engine.add_event_handler(TrainEvents.LOSS_READY, self.leave)

        def leave(self, engine):
            seen.append("once")
            engine.detach(self)

    for handler in (Once(), Once()):
        handler.attach(trainer)
    trainer.add_event_handler(TrainEvents.LOSS_READY, lambda: seen.append("always"))
    trainer.run(rows((1, 2), (3, 4)), max_epochs=1)
    assert seen == ["once", "once", "always", "always"]


def test_a_detached_handler_is_let_go_of_and_can_be_attached_again():
    trainer, _ = linear_trainer()
    handler = Every()
    for _ in range(2):
        handler.attach(trainer)
        trainer.detach(handler)
    kept = weakref.ref(handler)
    del handler
    assert kept() is None


def test_what_is_not_attached_cannot_be_detached():
    trainer, step = linear_trainer()
    known = table(trainer)
    for stranger in (Every(), print, step.step, TrainEvents):
        with pytest.raises(ValueError, match="is not attached to this engine"):
            trainer.detach(stranger)
    assert table(trainer) == known and trainer.stateful_handlers() == {"OptimizerStep": step}
    trainer.detach(step)
    with pytest.raises(ValueError, match=r"^OptimizerStep is not attached to this engine$"):
        trainer.detach(step)
    assert trainer.stateful_handlers() == {}


def test_a_handler_that_only_rank_0_listens_with_is_detached_on_all_ranks(tmp_path):
    def body():
        trainer, _ = linear_trainer()
        before = table(trainer)
        for handler in (ProgressBar(), ParameterHistograms(every=1), MetricAverager()):
            handler.attach(trainer)
            trainer.detach(handler)
        return table(trainer) == before

    assert in_processes(2, tmp_path, body) == [True, True]
