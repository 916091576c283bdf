"""Rules on metrics: when they come true, and what warnings, stops and rollbacks do to a run."""

import json
import logging
import math

import pytest
import torch
from helpers import NOISE, options, same_bits, weights_of
from ignite.engine import Events
from resuming import RICH, ask_at, assert_same, outcome, train

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.config.monitoring import GuardRule, default_rules
from hjepa_engine.errors import ConfigError, GuardStop, Preempted, Rollback
from hjepa_engine.handlers import CollapseGuard
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.recipes import pretrain
from hjepa_engine.run.guard_rules import RuleMonitor

# One rule


def verdicts(rule, values):
    """Numbers of the readings, from 0, at which a rule comes true; reading n is at step 10 n, iteration 100 n."""
    watch = RuleMonitor(rule)
    return [number for number, value in enumerate(values) if watch.update(value, 10 * number, 100 * number)]


def test_below_and_above_want_readings_in_a_row():
    assert verdicts(GuardRule("m", below=0.5, readings=3), [0.4, 0.4, 0.6, 0.4, 0.4, 0.4, 0.1]) == [5]
    assert verdicts(GuardRule("m", above=2.0, readings=1), [2.0, 2.1, 2.2, 1.0, 3.0]) == [1, 4]


def test_a_verdict_comes_once_until_a_right_reading():
    assert verdicts(GuardRule("m", below=0.5, readings=2), [0.1] * 6 + [0.9] + [0.1] * 3) == [1, 8]


def test_drop_looks_back_to_the_best_value():
    assert verdicts(GuardRule("m", drop=0.25, readings=1), [0.4, 0.8, 0.61, 0.59, 0.79, 0.5]) == [3, 5]


def test_a_spike_is_judged_by_the_median_of_right_values_once_there_are_five():
    rule = GuardRule("m", spike=3.0, readings=1)
    assert verdicts(rule, [1, 9, 1, 1]) == []
    # Limits are 9, 10.5 and 12: three times the medians 3, 3.5 and 4.
    assert verdicts(rule, [1, 2, 3, 4, 5, 9.0, 10.5, 12.1]) == [7]
    # What is wrong is not taken for normal by and by.
    watch = RuleMonitor(rule)
    for number, value in enumerate([1.0] * 20 + [50.0] * 30):
        watch.update(value, number, number)
    assert watch.history == [1.0] * 20 and watch.wrong == 30


def test_non_finite_values_count_for_their_own_rule_alone():
    values = [1.0, math.nan, math.inf, 1.0]
    assert verdicts(GuardRule("m", non_finite=True, readings=2), values) == [2]
    assert verdicts(GuardRule("m", above=0.0, readings=3), values) == []
    assert verdicts(GuardRule("m", spike=1.5, readings=1), [1.0] * 6 + [math.inf]) == []


def test_early_readings_are_compared_with_but_not_wrong():
    rule = GuardRule("m", drop=0.5, readings=1, after=30)
    assert verdicts(rule, [1.0, 0.2, 0.2, 0.2]) == [3]


@pytest.mark.parametrize(
    ("rule", "value", "says"),
    [
        (GuardRule("collapse/x", below=0.5, readings=1), 0.25, "collapse/x is 0.25, below 0.5, at step 7; a momentum"),
        (
            GuardRule("probe/knn", above=0, readings=1),
            0.25,
            "probe/knn is 0.25, above 0, at step 7; the encoder was better",
        ),
        (
            GuardRule("train/loss", non_finite=True, readings=1),
            math.nan,
            "train/loss is not finite, at step 7; a lower",
        ),
        (GuardRule("mine", above=0, readings=1), 1, "mine is 1, above 0, at step 7 (docs/health.md)"),
    ],
)
def test_the_sentence_says_what_was_seen_and_what_helps(rule, value, says):
    verdict = RuleMonitor(rule).update(value, 7, 7)
    assert verdict.text.startswith(says) and "\n" not in verdict.text and verdict.text.endswith("(docs/health.md)")


def test_the_default_rules_only_warn():
    assert {rule.action for rule in default_rules()} == {"warn"}


@pytest.mark.parametrize(
    "rule",
    ["{metric: a}", "{metric: a, below: 1, above: 2}", "{metric: a, drop: 1.5}", "{metric: a, below: 1, readings: 0}"],
)
def test_an_impossible_rule_is_one_line_that_names_it(rule):
    with pytest.raises(ConfigError, match=r"guard\.rules\[0\].*must") as error:
        load_config(None, [f"--guard.rules=[{rule}]"])
    assert "\n" not in str(error.value)


# Runs


def quick(tmp_path, **values):
    """Options of a run of 10 iterations in 2 epochs that logs and saves every step."""
    return {
        **NOISE,
        "run_dir": str(tmp_path / "run"),
        "logging.log_frequency": 1,
        "checkpoint.save_every_steps": 1,
        "collapse.enabled": "false",
        "probe.enabled": "false",
        **{name.replace("__", "."): value for name, value in values.items()},
    }


def guard_of(engine):
    return engine.stateful_handlers()["CollapseGuard"]


class Script:
    """Write a metric of its own: the values given, one per iteration; the last one stays."""

    def __init__(self, values, only_before_a_rollback=False):
        self.values, self.only_before = values, only_before_a_rollback

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    def write(self, engine):
        number = min(engine.state.iteration, len(self.values)) - 1
        is_over = self.only_before and guard_of(engine).rollbacks
        engine.state.metrics["mine"] = 1.0 if is_over else self.values[number]


def scripted(values, script, **more):
    run = pretrain.build(load_config(None, options(values)))
    Script(script, **more).attach(run.trainer)
    return run


def records(run):
    return [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]


def rates_of(run):
    return [record["train/lr"] for record in records(run) if "train/lr" in record]


def test_a_warning_is_given_once_and_changes_nothing(tmp_path, caplog):
    rule = "[{metric: mine, below: 0.5, readings: 2}]"
    with caplog.at_level(logging.WARNING):
        warned = scripted(quick(tmp_path, guard__rules=rule), [1, 1, 0, 0, 0])
        warned.fit()
    assert [record.message for record in caplog.records if "mine" in record.message] == [
        "mine is 0, below 0.5 for 2 readings in a row, at step 4 (docs/health.md)"
    ]
    plain = scripted(quick(tmp_path, run_dir=str(tmp_path / "plain"), guard__rules="[]"), [1, 1, 0, 0, 0])
    plain.fit()
    assert same_bits(weights_of(warned.modules), weights_of(plain.modules))


def test_a_stop_is_exit_code_5_and_its_reading_is_in_the_log(tmp_path):
    rule = "[{metric: mine, below: 0.5, readings: 2, action: stop}]"
    run = scripted(quick(tmp_path, guard__rules=rule), [1, 1, 1, 0, 0])
    with pytest.raises(GuardStop, match="at step 5"):
        run.fit()
    status = json.loads((run.folder.path / "status.json").read_text())
    assert (status["state"], status["exit_code"], run.trainer.state.iteration) == ("stopped", 5, 5)
    assert [record["mine"] for record in records(run) if "mine" in record] == [1, 1, 1, 0, 0]
    # What was wrong is not saved: step 4 was, with the first wrong reading.
    assert next(checkpoint.record.step for checkpoint in list_checkpoints(run.folder.checkpoint_path)) == 4


def test_a_metric_of_an_epochs_end_is_judged_when_everybody_has_read_it(tmp_path):
    rule = "[{metric: val/loss, above: 0, readings: 1, action: stop}]"
    run = pretrain.build(load_config(None, options(quick(tmp_path, guard__rules=rule))))
    with pytest.raises(GuardStop, match="val/loss"):
        run.fit()
    assert run.trainer.state.iteration == 5 and "val/loss" in records(run)[-1]


ROLLBACK = "[{metric: mine, below: 0.5, readings: 3, action: rollback}]"


def test_a_rollback_goes_on_from_before_the_first_wrong_reading_with_a_lower_rate(tmp_path, caplog):
    script = [1, 1, 1, 1, 0, 0, 0]
    values = quick(tmp_path, guard__rules=ROLLBACK, guard__lr_factor=0.25)
    run = scripted(values, script, only_before_a_rollback=True)
    with caplog.at_level(logging.WARNING):
        run.fit()
    assert "rolled back from step 7" in caplog.text and "step_00000004 (1 of at most 2)" in caplog.text
    assert (run.guard.rollbacks, run.guard.lr_multiplier, run.trainer.state.iteration) == (1, 0.25, 10)
    # The log has each step once; what was cut off is kept beside it.
    assert [record["step"] for record in records(run) if "mine" in record] == list(range(1, 11))
    cut = (run.folder.path / "metrics_before_rollback_1.jsonl").read_text().splitlines()
    assert [json.loads(line)["mine"] for line in cut if "mine" in line] == script
    # The same as a run that was stopped behind step 4 and started again with a quarter of the rate.
    other = {**values, "run_dir": str(tmp_path / "other")}
    stopped = scripted(other, [1])
    ask_at(stopped, 4)
    with pytest.raises(Preempted):
        stopped.fit()
    again = scripted(other, [1])
    again.trainer.add_event_handler(Events.STARTED, lambda: setattr(again.guard, "rollbacks", 1))
    again.fit()
    assert same_bits(weights_of(run.modules), weights_of(again.modules))
    assert rates_of(run) == rates_of(again) and max(rates_of(run)[4:]) <= 0.25e-3


def test_the_checkpoint_from_before_stays_while_something_is_suspect(tmp_path):
    """Two newest ones are kept; the third wrong reading comes when both are from behind the first."""
    rule = "[{metric: mine, below: 0.5, readings: 5, action: rollback}]"
    run = scripted(
        quick(tmp_path, guard__rules=rule, checkpoint__keep_best_n=0), [1, 1, 1, 0], only_before_a_rollback=True
    )
    places = []
    run.trainer.add_event_handler(
        Events.ITERATION_STARTED,
        lambda: places.append([c.record.step for c in list_checkpoints(run.folder.checkpoint_path)]),
    )
    run.fit()
    assert run.guard.rollbacks == 1
    at_seven = places[7]
    assert 3 in at_seven and len(at_seven) <= 4
    assert [c.record.step for c in list_checkpoints(run.folder.checkpoint_path)] == [10, 9]  # no longer afterwards


class Rarely(Script):
    """Write the metric at every fourth iteration only."""

    def write(self, engine):
        if engine.state.iteration % 4 == 0:
            super().write(engine)


RARE = "[{metric: mine, below: 0.5, readings: 1, action: rollback}]"


def rarely(values, script):
    run = pretrain.build(load_config(None, options(values)))
    Rarely(script, only_before_a_rollback=True).attach(run.trainer)
    return run


def test_what_was_saved_since_the_last_right_reading_is_not_trusted(tmp_path, caplog):
    """Something breaks in iteration 6; iteration 8 has the next reading, and only the two newest checkpoints are kept."""
    run = rarely(quick(tmp_path, guard__rules=RARE, checkpoint__keep_best_n=0), [1, 1, 1, 1, 1, 0])
    with caplog.at_level(logging.WARNING):
        run.fit()
    assert "rolled back from step 8 to" in caplog.text and "step_00000004 (1 of" in caplog.text
    assert run.guard.rollbacks == 1


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_a_restart_does_not_forget_what_to_go_back_to(tmp_path, stop):
    values = quick(tmp_path, guard__rules=ROLLBACK, checkpoint__keep_best_n=0)
    stopped = scripted(values, [1, 1, 1, 0], only_before_a_rollback=True)
    ask_at(stopped, stop - 1)
    with pytest.raises(Preempted):
        stopped.fit()
    run = scripted(values, [1, 1, 1, 0], only_before_a_rollback=True)
    run.fit()
    assert (run.guard.rollbacks, run.trainer.state.iteration) == (1, 10)


def test_a_crash_behind_a_rollback_does_not_forget_it(tmp_path, capsys):
    values = quick(tmp_path, guard__rules=ROLLBACK, checkpoint__save_every_steps=4)
    run = scripted(values, [1, 1, 1, 1, 0], only_before_a_rollback=True)

    def crash(engine):
        if run.guard.rollbacks:
            raise KeyboardInterrupt

    run.trainer.add_event_handler(Events.ITERATION_STARTED, crash)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    (newest, *_) = list_checkpoints(run.folder.checkpoint_path)
    assert (newest.record.iteration, newest.reasons) == (4, ["rollback"])
    status = json.loads((run.folder.path / "status.json").read_text())
    index = json.loads((run.folder.checkpoint_path / "index.json").read_text())
    assert status["checkpoint"] == str(newest.path) and index["latest"] == newest.record.name
    again = scripted(values, [1], only_before_a_rollback=True)
    again.fit()
    assert (again.guard.rollbacks, again.guard.lr_multiplier) == (1, 0.5)
    assert "rolled back 1 times before: learning rates are multiplied by 0.5" in capsys.readouterr().out
    assert records(again)[-2]["train/rollbacks"] == 1


def test_rules_that_are_gone_leave_the_learning_rates_of_a_rolled_back_run_lowered(tmp_path):
    values = quick(tmp_path, guard__rules=ROLLBACK)
    run = scripted(values, [1, 1, 1, 1, 0], only_before_a_rollback=True)
    ask_at(run, 8)
    with pytest.raises(Preempted):
        run.fit()
    again = scripted({**values, "guard.rules": "[]"}, [1])
    again.fit()
    assert again.guard.lr_multiplier == 0.5 and max(lr for lr in rates_of(again)[8:]) <= 0.5e-3


def test_a_run_from_the_checkpoint_of_a_rolled_back_one_has_rolled_back_nothing(tmp_path):
    first = scripted(quick(tmp_path, guard__rules=ROLLBACK), [1, 1, 1, 1, 0], only_before_a_rollback=True)
    first.fit()
    (newest, *_) = list_checkpoints(first.folder.checkpoint_path)
    values = quick(tmp_path, guard__rules=ROLLBACK, run_dir=str(tmp_path / "second"), training__epochs=3)
    second = scripted({**values, "checkpoint.resume": str(newest.path)}, [1])
    second.fit()
    assert (first.guard.rollbacks, second.guard.rollbacks) == (1, 0) and second.trainer.state.iteration == 15


@pytest.mark.parametrize("wrong", [-1, 0.5, True, None])
def test_a_number_of_rollbacks_that_is_none_is_refused(wrong):
    guard = CollapseGuard([])
    with pytest.raises(ValueError, match="rollbacks must be an integer of at least 0, got"):
        guard.load_state_dict({**guard.state_dict(), "rollbacks": wrong})


def test_a_disk_that_does_not_take_the_copy_of_the_log_does_not_end_the_run(tmp_path, caplog):
    run = scripted(quick(tmp_path, guard__rules=ROLLBACK), [1, 1, 1, 0], only_before_a_rollback=True)
    (run.folder.path / "metrics_before_rollback_1.jsonl").mkdir(parents=True)  # no file can be written there
    with caplog.at_level(logging.WARNING):
        run.fit()
    assert "was not kept as it was before the rollback" in caplog.text and run.guard.rollbacks == 1


class Service(JsonlWriter):
    """A writer with nothing to put back, like W&B's."""

    def __init__(self):
        self.steps, self.opened = [], 0

    def open(self, state):
        self.opened += 1

    def write(self, metrics, step, epoch):
        self.steps.append(step)

    def write_media(self, media, step, epoch):
        return

    def close(self):
        raise TimeoutError("the service does not answer")

    def state_dict(self):
        return {"id": 1}


def test_a_writer_with_nothing_to_put_back_stays_open_over_a_rollback(tmp_path):
    run = scripted(quick(tmp_path, guard__rules=ROLLBACK), [1, 1, 1, 0], only_before_a_rollback=True)
    run.logger.writers.writers.append(service := Service())
    run.fit()
    assert service.opened == 1 and service.steps[-1] == 10


def test_a_rule_on_a_metric_that_is_not_there_is_named_once(tmp_path, caplog):
    run = scripted(quick(tmp_path, guard__rules="[{metric: colapse/x, below: 1}]"), [1])
    with caplog.at_level(logging.WARNING):
        run.fit()
    assert "guard.rules: there is no metric colapse/x; known: " in caplog.text
    assert caplog.text.count("colapse/x") == 1


def test_rollbacks_are_bounded_and_counted_over_restarts(tmp_path):
    values = quick(tmp_path, guard__rules=ROLLBACK, guard__max_rollbacks=1)
    run = scripted(values, [1, 1, 1, 0])
    with pytest.raises(GuardStop, match="rolled back 1 times already"):
        run.fit()
    again = scripted(values, [1, 1, 1, 0])
    with pytest.raises(GuardStop, match="rolled back 1 times already"):
        again.fit()
    assert not (run.folder.path / "metrics_before_rollback_2.jsonl").exists()


def test_without_a_checkpoint_from_before_the_run_ends(tmp_path):
    run = scripted(quick(tmp_path, guard__rules=ROLLBACK), [0])
    with pytest.raises(GuardStop, match="holds no checkpoint from before iteration 1"):
        run.fit()


def test_what_a_rule_has_seen_survives_a_restart(tmp_path):
    rules = "[{metric: mine, below: 0.5, readings: 3}, {metric: train/loss, spike: 1.01, readings: 2}]"
    values = {**RICH, "guard.rules": rules, "logging.log_frequency": 1}

    class Mine(Script):
        def __init__(self):
            super().__init__([1, 1, 0, 0, 0, 1])

    whole = train(tmp_path / "whole", values, [Mine])
    train(tmp_path / "parts", values, [Mine], stop=4)
    assert_same(outcome(train(tmp_path / "parts", values, [Mine])), outcome(whole))


def test_outside_the_recipe_a_rollback_is_an_error_that_says_so(tmp_path):
    from helpers import linear_trainer, rows

    trainer, _ = linear_trainer()
    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, lambda: trainer.state.metrics.update({"mine": 0.0}))
    CollapseGuard([GuardRule("mine", below=0.5, readings=1, action="rollback")]).attach(trainer)
    with pytest.raises(Rollback, match="mine is 0") as error:
        trainer.run(rows([1.0, 1.0]))
    assert error.value.exit_code == 5 and error.value.before == 1


# Runs that really collapse, and healthy ones


STOP = "[{metric: collapse/target_std, drop: 0.75, readings: 2, action: stop}]"


@pytest.mark.slow
def test_a_run_whose_target_is_the_context_encoder_itself_is_caught_within_400_steps(tmp_path):
    values = {
        "run_dir": str(tmp_path),
        "model.ema.momentum": 0,
        "model.ema.momentum_end": 0,
        "collapse.every": 50,
        "collapse.images": 256,
        "guard.rules": STOP,
        "logging.progress_bar": "false",
        "logging.report": "false",
        "pictures.enabled": "false",
        "online_probe.every": None,
        "device": "cpu",
    }
    run = pretrain.build(load_config(pretrain.DEFAULT_CONFIG, options(values)))
    torch.manual_seed(0)
    with pytest.raises(GuardStop, match=r"collapse/target_std .* below its best"):
        run.fit()
    assert run.trainer.state.optimizer_step <= 400
