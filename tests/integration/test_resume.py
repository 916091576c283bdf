"""A run that is stopped anywhere and started again ends with the bits of one that never was."""

import signal

import pytest
import torch
from helpers import mostly_slow, same_bits
from ignite.engine import Events
from resuming import ITERATIONS, RICH, Drawer, OnlineProbe, Steps, assert_same, contents, outcome, train

from hjepa_engine import TrainEvents
from hjepa_engine.build import build_schedules
from hjepa_engine.checkpoint.folder import list_checkpoints, load_one
from hjepa_engine.errors import ConfigError
from hjepa_engine.recipes import pretrain
from hjepa_engine.recipes.common import build, heads


@pytest.fixture(autouse=True)
def evaluators(monkeypatch):
    """The evaluators of the runs that were built, newest last."""
    made, create = [], build.create_evaluator
    monkeypatch.setattr(build, "create_evaluator", lambda *args: made.append(create(*args)) or made[-1])
    return made


@pytest.fixture(autouse=True)
def loaders(monkeypatch):
    """Further arguments of loaders that have processes; these end with their run, and do not wait to be found unused."""
    arguments, create = {}, torch.utils.data.DataLoader

    def make(*args, **kwargs):
        return create(*args, **{**kwargs, **(arguments if kwargs["num_workers"] else {})})

    monkeypatch.setattr("hjepa_engine.data.loading.DataLoader", make)
    return arguments


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run leaves behind that nobody stops."""
    known = {}

    def find(values, handlers=(), with_generators=True):
        key = (*sorted((name, str(value)) for name, value in values.items()), handlers)
        if key not in known:
            run = train(tmp_path_factory.mktemp("whole"), values, handlers)
            known[key] = [outcome(run, wanted) for wanted in (False, True)]
        return known[key][with_generators]

    return find


def test_two_runs_are_the_same_and_another_seed_is_not(uninterrupted, tmp_path):
    whole = uninterrupted(RICH)
    assert [sum(name in line for line in whole[2]) for name in ("train/loss", "val/loss")] == [9, 3]
    assert {name.split(".")[0] for name in whole[1]} == {"modules", "handlers", "ranks"}
    assert_same(outcome(train(tmp_path / "again", RICH)), whole)
    other = outcome(train(tmp_path / "other", {**RICH, "seed": 1}))
    assert not same_bits(other[1], whole[1]) and other[2] != whole[2]


# --- Everywhere ------------------------------------------------------------------------------------------------------


def test_a_run_stopped_after_every_iteration_goes_on_with_the_same_bits(uninterrupted, tmp_path):
    for stop in range(1, ITERATIONS + 1):
        assert train(tmp_path, RICH, stop=stop).trainer.state.iteration == stop
    assert_same(outcome(train(tmp_path, RICH)), uninterrupted(RICH))


# The first one, inside an epoch and at its end, at a save, and the last one.
@pytest.mark.parametrize("stop", mostly_slow(range(1, ITERATIONS + 1), (5, 12)))
def test_a_run_stopped_after_any_iteration_goes_on_with_the_same_bits(uninterrupted, tmp_path, stop):
    stopped = train(tmp_path, RICH, stop=stop)
    assert stopped.trainer.state.iteration == stop
    newest = list_checkpoints(stopped.folder.checkpoint_path)[0]
    assert (newest.record.iteration, newest.reasons) == (stop, ["interrupted"])
    assert newest.record.ends_epoch is False  # an epoch's end comes after its last iteration
    assert_same(outcome(train(tmp_path, RICH)), uninterrupted(RICH))


def workers(numbers, stops):
    return [(number, persistent, stop) for number in numbers for persistent in (True, False) for stop in stops]


@pytest.mark.parametrize(
    ("number", "persistent", "stop"),
    [
        (2, False, 7),
        (3, True, 12),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in workers((1, 2, 3), range(1, ITERATIONS + 1))),
    ],
)
def test_loader_processes_do_not_change_the_bits_of_a_resumed_run(
    uninterrupted, tmp_path, loaders, number, persistent, stop
):
    loaders["persistent_workers"] = persistent
    values = {**RICH, "data.num_workers": number}
    train(tmp_path, values, stop=stop)
    run = train(tmp_path, values)
    assert run.data.processes.num_workers == number and run.data.processes.persistent_workers is persistent
    assert_same(outcome(run, with_generators=False), uninterrupted(RICH, with_generators=False))


@pytest.mark.slow
def test_ten_stops_in_a_row_with_changing_numbers_of_workers_leave_the_bits_alone(uninterrupted, tmp_path):
    for number, stop in zip((0, 2, 1, 3, 0, 1, 2, 0, 3, 0), (1, 2, 4, 5, 6, 8, 10, 11, 13, 15), strict=True):
        train(tmp_path, {**RICH, "data.num_workers": number}, stop=stop)
    run = train(tmp_path, {**RICH, "data.num_workers": 2})
    assert_same(outcome(run, with_generators=False), uninterrupted(RICH, with_generators=False))


def ask_in_validation(evaluators):
    def ask(run, place):
        epoch, batch = place

        def request(evaluator):
            if (run.trainer.state.epoch, evaluator.state.iteration) == (epoch, batch):
                run.preemption.request("asked")

        evaluators[-1].add_event_handler(Events.ITERATION_STARTED, request)

    return ask


@pytest.mark.parametrize("epoch", mostly_slow([1, 3], (3,)))
def test_a_stop_inside_a_validation_repeats_it_as_a_whole(uninterrupted, tmp_path, evaluators, epoch):
    class Counter(Drawer):
        """Counts validations as they begin, before they are stopped."""

        def attach(self, engine):
            super().attach(engine)
            evaluators[-1].add_event_handler(Events.STARTED, self.draw)

    ask = ask_in_validation(evaluators)
    for _ in range(3):  # again and again: what the epoch's end has changed by then must not be saved
        stopped = train(tmp_path, RICH, (Counter, OnlineProbe), (epoch, 1), ask)
        assert stopped.trainer.state.iteration == 5 * epoch
        newest = list_checkpoints(stopped.folder.checkpoint_path)[0].record
        assert (newest.epoch, newest.ends_epoch, newest.score) == (epoch - 1, False, None)
        assert len(evaluators[-1].state.batch["images"]) > 0
    assert_same(outcome(train(tmp_path, RICH, (Counter, OnlineProbe))), uninterrupted(RICH, (Counter, OnlineProbe)))


def ask_behind_validation(run, epoch):
    run.trainer.add_event_handler(
        TrainEvents.EPOCH_FINALIZED,
        lambda engine: run.preemption.request("asked") if engine.state.epoch == epoch else None,
    )


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_stop_behind_a_validation_does_not_repeat_it(uninterrupted, tmp_path, evaluators, epoch):
    stopped = train(tmp_path, RICH, stop=epoch, ask=ask_behind_validation)
    newest = list_checkpoints(stopped.folder.checkpoint_path)[0]
    assert (newest.record.epoch, newest.record.ends_epoch) == (epoch, True)
    run = train(tmp_path, RICH)
    assert evaluators[-1].state.iteration == (0 if epoch == 3 else evaluators[-2].state.iteration)
    assert_same(outcome(run), uninterrupted(RICH))


def test_a_run_that_early_stopping_had_ended_when_it_was_stopped_stays_ended(uninterrupted, tmp_path):
    values = {**RICH, **KINDS["stopping early"][0]}
    whole = uninterrupted(values)
    epochs = whole[0]["engine"]["iteration"] // 5
    assert epochs < 6 and whole[0]["handlers"]["EarlyStopping"]["bad"] == 1
    train(tmp_path, values, stop=epochs, ask=ask_behind_validation)
    Steps.taken.clear()
    run = train(tmp_path, values, (Steps,))
    assert Steps.taken == []
    assert_same(outcome(run), whole)


def test_a_run_that_dies_in_its_probe_is_judged_again_without_training(tmp_path, monkeypatch):
    values = {**RICH, "probe.enabled": "true", "probe.epochs": 3, "probe.batch_size": 8}
    whole = train(tmp_path / "whole", values)
    create, made = heads.create_trainer, []

    def die_in_the_second(*args):
        trainer = create(*args)
        made.append(trainer)
        if len(made) == 2:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), signal.raise_signal, signal.SIGINT)
        return trainer

    monkeypatch.setattr(heads, "create_trainer", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", values)
    assert len(made) == 2 and made[1].state.iteration == 3
    Steps.taken.clear()
    run = train(tmp_path / "run", values, (Steps,))
    assert Steps.taken == [] and len(made) == 5
    assert_same(outcome(run), outcome(whole))
    assert run.folder.status()["results"] == whole.folder.status()["results"]


# --- Every kind of run -----------------------------------------------------------------------------------------------

HEAVY = {"loss.hierarchy_weights": "[1000, 1000]"}  # makes float16 gradients overflow until the scale has fallen
#: How a run differs, and when it is stopped; only the first stop is not slow.
KINDS = {
    "bfloat16": ({"training.use_amp": "true"}, (5, 8)),
    "float16": ({"training.use_amp": "true", "training.amp_dtype": "float16", **HEAVY}, (3, 10)),
    "accumulation": ({"training.accumulation_steps": 3}, (4, 1, 2, 12)),
    "sgd": ({"training.optimizer": "sgd", "training.clip_grad": None}, (5, 8)),
    "covariance": ({"loss.covariance_weight": 0.1, "loss.sigreg_weight": 0, "training.level_lrs": None}, (7,)),
    "max_iters": ({"training.max_iters": 13}, (5, 13)),
    "skipping": ({"training.non_finite": "skip", "loss.type": f"{__name__}.sometimes_nan"}, (4, 7)),
    "stopping early": (
        {
            "training.early_stopping": 1,
            "training.lr": 1.0,  # with these weights, an epoch of it is worse than the one before
            "model.predictor.init": "trunc_normal",
            "training.epochs": 6,
        },
        (5, 9),
    ),
}


def sometimes_nan(prediction, target):
    """Not a number in about a fifth of the steps: an update is dropped, and the schedules' clock stands still."""
    loss = (prediction - target).square().mean()
    return loss * float("nan") if int(target.double().abs().sum().item() * 1e6) % 5 == 0 else loss


CASES = [(kind, stop) for kind, (_, stops) in KINDS.items() for stop in stops]


@pytest.mark.parametrize(("kind", "stop"), mostly_slow(CASES, [(kind, stops[0]) for kind, (_, stops) in KINDS.items()]))
def test_a_run_of_any_kind_goes_on_with_the_same_bits(uninterrupted, tmp_path, kind, stop):
    values = {**RICH, **KINDS[kind][0]}
    whole = uninterrupted(values)
    optimizer = whole[0]["handlers"]["OptimizerStep"]
    assert bool(optimizer["scaler"]) is (kind == "float16")
    assert (optimizer["skipped_updates"] > 0) is (kind in ("skipping", "float16"))
    assert (whole[0]["engine"]["iteration"] < 15) is (kind == "max_iters")
    stopped = train(tmp_path, values, stop=stop)
    if kind == "accumulation":  # windows of 3 and 2: an open one is completed first
        assert stopped.trainer.state.iteration == {1: 3, 2: 3, 4: 5, 12: 13}[stop]
    assert_same(outcome(train(tmp_path, values)), whole)


def test_the_handlers_of_a_user_go_on_too(uninterrupted, tmp_path):
    """An online probe with an optimizer of its own, and draws from the global generators between steps."""
    handlers = (Drawer, OnlineProbe)
    whole = uninterrupted(RICH, handlers)
    assert whole[0]["handlers"]["Drawer"]["total"] > 0
    for stop in (3, 5, 14):
        train(tmp_path, RICH, handlers, stop=stop)
    assert_same(outcome(train(tmp_path, RICH, handlers)), whole)
    plain = uninterrupted(RICH)
    assert same_bits(*({n: t for n, t in tensors[1].items() if n.startswith("modules")} for tensors in (plain, whole)))


def test_loggers_and_observers_that_come_and_go_do_not_change_the_bits(uninterrupted, tmp_path):
    class Watcher:
        def attach(self, engine):
            for event in (*Events, *TrainEvents):
                if event not in (Events.EXCEPTION_RAISED, Events.DATALOADER_STOP_ITERATION):
                    engine.add_event_handler(event, self.watch, event)

        def watch(self, engine, event):
            assert set(engine.state.metrics) <= set(dict(engine.state.metrics))
            if event != TrainEvents.FORWARD_STARTED:  # nothing may draw between the seed and the step
                torch.rand(9)

    seen = {
        "logging.progress_bar": "true",
        "logging.tensorboard.enabled": "true",
        "logging.log_dir": str(tmp_path / "logs"),
    }
    train(tmp_path / "run", {**RICH, **seen}, (Watcher,), stop=4)
    train(tmp_path / "run", RICH, stop=7)
    train(tmp_path / "run", {**RICH, **seen}, (Watcher, Drawer), stop=11)
    run = train(tmp_path / "run", RICH)
    assert len(list((tmp_path / "logs" / "tensorboard").iterdir())) == 2
    assert_same(outcome(run, with_generators=False), uninterrupted(RICH, with_generators=False))


# --- Another length --------------------------------------------------------------------------------------------------


def test_more_epochs_are_trained_by_the_schedules_of_the_new_length_which_is_said(tmp_path, capsys):
    done = train(tmp_path, RICH)
    weights = outcome(done)[1]
    Steps.taken.clear()
    longer = {**RICH, "training.epochs": 5}
    capsys.readouterr()
    run = train(tmp_path, longer, (Steps,))
    lr = build_schedules(run.config, steps_per_epoch=5).lr
    assert Steps.taken == [lr(step) for step in range(15, 25)]
    assert Steps.taken[0] > 10 * build_schedules(done.config, steps_per_epoch=5).lr(15)
    out = capsys.readouterr().out
    assert "resumed step 15 (iteration 15 of 25)" in out
    assert "  training.epochs was 3, is 5 now; schedules follow the new length\n" in out
    assert run.folder.status()["step"] == 25 and not same_bits(outcome(run)[1], weights)


def test_less_than_was_trained_is_refused_by_name(tmp_path):
    train(tmp_path, RICH, stop=11)
    before = contents(tmp_path)
    for key in ("training.epochs", "training.max_iters"):
        rule = r"^training.epochs \(or max_iters\) must leave at least the 11 iterations .* already, got "
        with pytest.raises(ConfigError, match=rule):
            train(tmp_path, {**RICH, key: 2})
    assert before == contents(tmp_path)


def test_more_iterations_than_max_iters_are_trained_when_it_is_raised(uninterrupted, tmp_path):
    values = {**RICH, "collapse.enabled": "false"}  # which reads at the end, wherever that is
    assert train(tmp_path, {**values, "training.max_iters": 10}).trainer.state.iteration == 10
    assert_same(outcome(train(tmp_path, {**values, "training.max_iters": 15})), uninterrupted(values))


def test_a_finished_run_says_so_and_touches_nothing(tmp_path, capsys):
    run = train(tmp_path, RICH)
    saved, _ = load_one(tmp_path)
    assert saved.reasons == ["epoch", "end"]
    before = contents(tmp_path)
    pretrain.main(["--config", str(tmp_path / "config.yaml")])
    assert f"run folder: {tmp_path} (was finished already)" in capsys.readouterr().out
    assert before == contents(tmp_path)
    Steps.taken.clear()  # from Python, where nobody has looked before
    again = train(tmp_path, RICH, (Steps,))
    assert again.trainer.state.iteration == 15 and Steps.taken == []
    assert_same(outcome(again), outcome(run))
