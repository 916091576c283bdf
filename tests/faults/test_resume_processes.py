"""Several processes stop and go on as one does."""

import ignite.distributed as idist
import numpy as np
import pytest
from helpers import largest_difference, logged, same_bits
from ignite.engine import Events
from PIL import Image
from processes import in_processes
from resuming import ALIKE, TWO, ask_at, outcome, train

from hjepa_engine.errors import DataError
from hjepa_engine.types import unwrap


def ask_on_one(run, iteration):
    """Only the second process is asked to stop."""
    if idist.get_rank() == 1:
        ask_at(run, iteration)


def weights(run):
    return {
        f"{name}.{key}": value.clone()
        for name, module in run.modules.items()
        for key, value in unwrap(module).state_dict().items()
    }


def stop(folder, values):
    def body():
        state = train_on_two(folder, values, 4).trainer.state
        return state.iteration, state.optimizer_step

    return body


def train_on_two(folder, values, iteration=None):
    asked = "asked" if idist.get_rank() == 1 else "another process was asked to stop"
    return train(folder, values, stop=iteration, ask=ask_on_one, reason=asked)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes leave behind that nobody stops."""
    folder = tmp_path_factory.mktemp("together")
    return in_processes(2, folder, lambda: outcome(train(folder / "run", TWO)))


def test_two_processes_stop_at_the_same_step_when_one_is_asked_and_go_on_with_the_same_bits(together, tmp_path):
    run = tmp_path / "run"
    assert in_processes(2, tmp_path, stop(run, TWO)) == [(4, 4), (4, 4)]
    resumed = in_processes(2, tmp_path, lambda: outcome(train(run, TWO)))
    for whole, one in zip(together, resumed, strict=True):
        assert one[0] == whole[0] and one[2:] == whole[2:] and same_bits(one[1], whole[1])
    assert len(together[0][0]["ranks"]) == 2 and any(name.startswith("ranks.1.") for name in together[0][1])


def test_one_process_goes_on_where_two_were_stopped(tmp_path, caplog):
    whole = in_processes(2, tmp_path, lambda: weights(train(tmp_path / "whole", ALIKE)))[0]
    in_processes(2, tmp_path, stop(tmp_path / "run", ALIKE))
    alone = train(tmp_path / "run", ALIKE)
    assert alone.trainer.state.iteration == 21
    assert "2 processes wrote the checkpoint, there are 1 now" in caplog.text
    assert largest_difference(weights(alone), whole) < 1e-5
    start = weights(train(tmp_path / "start", {**ALIKE, "training.max_iters": 1}))
    assert largest_difference(start, whole) > 1e-2


def test_a_log_interval_is_ended_by_another_number_of_processes_than_began_it(tmp_path):
    """Intervals end after steps 4, 7 and 8; the run is cut after step 6."""
    values = {**ALIKE, "training.max_iters": 9, "collapse.enabled": "false"}
    train(tmp_path / "whole", values)
    train(tmp_path / "one", values, stop=6)

    def body():
        train_on_two(tmp_path / "two", values, 6)
        train(tmp_path / "one", values)  # two go on where one was stopped

    in_processes(2, tmp_path, body)
    train(tmp_path / "two", values)
    whole = logged(tmp_path / "whole")
    assert any(record["step"] == 7 and "train/loss" in record for record in whole)
    for name in ("one", "two"):
        for record, found in zip(whole, logged(tmp_path / name), strict=True):
            assert found == pytest.approx(record, abs=1e-5), (name, record["step"])


class Wrong:
    """A metric that is wrong from iteration 9 on until the run is rolled back; only rank 0 has it."""

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    def write(self, engine):
        guard = engine.stateful_handlers()["CollapseGuard"]
        if idist.get_rank() == 0:
            engine.state.metrics["mine"] = float(engine.state.iteration >= 9 and not guard.rollbacks)


def test_two_processes_are_rolled_back_together_as_one_is(tmp_path):
    rule = "[{metric: mine, above: 0.5, readings: 1, action: rollback}]"
    values = {**ALIKE, "guard.rules": rule, "checkpoint.save_every_steps": 2}

    def body():
        run = train(tmp_path / f"of{idist.get_world_size()}", values, [Wrong])
        return weights(run), (run.trainer.state.iteration, run.guard.rollbacks, run.guard.lr_multiplier)

    (first, told), (second, also) = in_processes(2, tmp_path, body)
    assert told == also == (21, 1, 0.5) and same_bits(first, second)
    alone, also = body()
    assert also == told and largest_difference(alone, first) < 1e-5


@pytest.fixture
def damaged(tmp_path):
    """Options of a run over a folder in which 2 of 28 training images and 2 of 10 validation images are cut."""
    for seed, (split, number) in enumerate({"train": 28, "val": 10}.items()):
        for index, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (number, 24, 24, 3), np.uint8)):
            path = tmp_path / "set" / split / ("cat", "dog")[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            if index in (3, 6):
                path.write_bytes(path.read_bytes()[:900])
    return {**ALIKE, "data.dataset": "imagefolder", "data.data_path": tmp_path / "set"}


def test_two_processes_replace_and_count_damaged_images_as_one_does(tmp_path, damaged):
    def body():
        run = train(tmp_path / f"of{idist.get_world_size()}", {**damaged, "data.max_damaged": 0.2})
        return weights(run), [run.trainer.state.metrics[name] for name in ("data/damaged", "val/damaged", "train/loss")]

    (first, told), (second, also) = in_processes(2, tmp_path, body)
    assert same_bits(first, second) and told == also and told[:2] == [2, 2]
    alone, said = body()
    assert largest_difference(alone, first) < 1e-5 and said == pytest.approx(told, abs=1e-5)


@pytest.mark.parametrize(
    ("allowed", "says"),
    [
        (0.05, r"2 of 28 training images could not be read, more than data\.max_damaged 0\.05 allows; one of them: "),
        (0.1, r"2 of 10 validation images could not be read, more than data\.max_damaged 0\.1 allows; one of them: "),
    ],
)
def test_two_processes_end_together_where_more_images_are_damaged_than_allowed(tmp_path, damaged, allowed, says):
    def body():
        with pytest.raises(DataError, match=says) as raised:
            train(tmp_path / "run", {**damaged, "data.max_damaged": allowed})
        return str(raised.value)

    first, second = in_processes(2, tmp_path, body)
    assert first == second
