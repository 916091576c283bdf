"""What a run says of its machine and of its time: GPUs and host, the parts of a step, the time left."""

import io
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import ignite.distributed as idist
import psutil
import pytest
import torch
from helpers import LinearModel, Terminal, linear_trainer, rows, tiny_config
from ignite.engine import Events
from processes import in_processes
from torch import nn

from hjepa_engine import TrainEvents, create_trainer
from hjepa_engine.handlers import GpuStats, OptimizerStep, ProgressBar, StepTiming, Throughput
from hjepa_engine.metrics.system import Gpu, visible_gpus
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.utils.clocks import CudaClock
from hjepa_engine.utils.eta import TimeRemaining

HOST = {"system/process_memory_gb", "system/host_memory_share", "system/cpu_share"}

# --- GPUs and host ----------------------------------------------------------------------------------------------------


class FakeNvml:
    """NVML of a machine with these boards by UUID, each a dict of what it can tell; it counts how often it is opened."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, boards, driver=True):
        self.boards, self.driver, self.opened = boards, driver, 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.boards:
            raise self.NVMLError("Not Found")
        return uuid

    def _read(self, handle, name):
        if not self.opened:
            raise self.NVMLError("Uninitialized")
        if name not in self.boards[handle]:
            raise self.NVMLError("Not Supported")
        return self.boards[handle][name]

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self._read(handle, "percent"), memory=7)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._read(handle, "milliwatts")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._read(handle, "celsius")


def gpu(number, uuid, allocated=0, reserved=0):
    return Gpu(number, uuid, lambda: (allocated, reserved))


def observed(handler, windows=1):
    """What a run of so many log intervals says of the system, and its trainer."""
    trainer, _ = linear_trainer()
    handler.attach(trainer)
    trainer.run(rows(*[(1, 0)] * windows), max_epochs=1)
    return {name: value for name, value in trainer.state.metrics.items() if name.startswith("system/")}


def of_gpus(values):
    return {name: value for name, value in values.items() if name.startswith("system/gpu")}


def test_every_visible_gpu_is_read_by_its_uuid_in_units_people_use():
    nvml = FakeNvml(
        {
            "GPU-aa": {"percent": 50, "milliwatts": 123_456, "celsius": 61},
            "GPU-bb": {"percent": 100, "milliwatts": 700_000, "celsius": 83},
            "GPU-cc": {"percent": 1, "milliwatts": 1, "celsius": 1},
        }
    )
    # As with CUDA_VISIBLE_DEVICES=1,0 of three: what NVML calls the first is torch's second, the third is not ours.
    ours = [gpu(0, "bb", 2_500_000_000, 4_000_000_000), gpu(1, "aa", 0, 1_000_000)]
    values = observed(GpuStats(lambda device: ours, nvml))
    assert of_gpus(values) == {
        "system/gpu0_memory_allocated_gb": 2.5,
        "system/gpu0_memory_reserved_gb": 4.0,
        "system/gpu0_utilization": 1.0,
        "system/gpu0_power_w": 700.0,
        "system/gpu0_temperature_c": 83.0,
        "system/gpu1_memory_allocated_gb": 0.0,
        "system/gpu1_memory_reserved_gb": 0.001,
        "system/gpu1_utilization": 0.5,
        "system/gpu1_power_w": 123.456,
        "system/gpu1_temperature_c": 61.0,
    }
    assert values.keys() - of_gpus(values).keys() == HOST


def test_what_a_gpu_does_not_tell_is_absent_and_nobody_is_warned(caplog, recwarn):
    caplog.set_level(logging.WARNING)
    nvml = FakeNvml({"MIG-aa": {"celsius": 40}})  # a slice of a GPU: NVML has no load or power of it
    assert of_gpus(observed(GpuStats(lambda device: [gpu(0, "aa")], nvml), windows=3)).keys() == {
        "system/gpu0_memory_allocated_gb",
        "system/gpu0_memory_reserved_gb",
        "system/gpu0_temperature_c",
    }
    assert not caplog.records and not recwarn.list


@pytest.mark.parametrize(
    "nvml", [FakeNvml({"GPU-aa": {"percent": 9}}, driver=False), FakeNvml({"GPU-zz": {"percent": 9}})]
)
def test_without_a_driver_or_the_gpu_in_nvml_torchs_allocator_is_still_read(nvml):
    values = of_gpus(observed(GpuStats(lambda device: [gpu(0, "aa", 3_000_000_000)], nvml)))
    assert values == {"system/gpu0_memory_allocated_gb": 3.0, "system/gpu0_memory_reserved_gb": 0.0}


def test_a_missing_nvml_package_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    values = of_gpus(observed(GpuStats(lambda device: [gpu(0, "aa", 3_000_000_000)])))
    assert values == {"system/gpu0_memory_allocated_gb": 3.0, "system/gpu0_memory_reserved_gb": 0.0}


def test_the_real_nvml_has_every_name_that_is_used():
    import pynvml

    used = {name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))}
    assert {name for name in used if not hasattr(pynvml, name)} == set()
    assert pynvml.NVML_TEMPERATURE_GPU == FakeNvml.NVML_TEMPERATURE_GPU
    assert issubclass(pynvml.NVMLError_NotSupported, pynvml.NVMLError)


def test_nvml_is_open_during_the_run_only_also_behind_one_that_failed():
    nvml, opened = FakeNvml({"GPU-aa": {"percent": 50}}), []
    trainer, _ = linear_trainer()
    handler = GpuStats(lambda device: [gpu(0, "aa")], nvml)
    handler.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: opened.append(nvml.opened))
    trainer.run(rows((1, 0)), max_epochs=1)
    assert (opened, nvml.opened) == ([1], 0)

    def fail():
        raise RuntimeError("broken")

    trainer.add_event_handler(TrainEvents.LOSS_READY, fail)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.run(rows((1, 0)), max_epochs=2)
    trainer.detach(fail)
    trainer.run(rows((1, 0)), max_epochs=3)
    assert nvml.opened == 0 and set(opened) == {1}


def test_an_nvml_that_breaks_while_the_run_goes_on_does_not_end_it():
    nvml = FakeNvml({"GPU-aa": {"percent": 50}})

    def lost():
        raise nvml.NVMLError("GPU is lost")

    nvml.nvmlShutdown = lost
    trainer, _ = linear_trainer()
    GpuStats(lambda device: [gpu(0, "aa")], nvml).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: nvml.boards["GPU-aa"].clear())
    trainer.run(rows((1, 0), (1, 0)), max_epochs=1)
    assert trainer.state.iteration == 2


def test_a_run_on_the_cpu_speaks_of_no_gpu_and_never_imports_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # they are there, and not the run's
    assert observed(GpuStats()).keys() == HOST


def test_one_process_speaks_for_all_visible_gpus_and_one_of_several_for_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(uuid=f"uuid-{place}"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: 10 + place)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda place: 20 + place)

    def seen(device):
        return [(found.number, found.uuid, found.memory()) for found in visible_gpus(torch.device(device))]

    assert seen("cuda") == [(n, f"uuid-{n}", (10 + n, 20 + n)) for n in range(3)]
    monkeypatch.setattr(idist, "get_world_size", lambda: 4)
    monkeypatch.setattr(idist, "get_rank", lambda: 3)  # the second process of the second machine
    assert seen("cuda:1") == [(3, "uuid-1", (11, 21))]
    assert seen("cpu") == []


def test_the_hosts_figures_are_those_of_psutil_and_count_child_processes():
    alone = observed(GpuStats())["system/process_memory_gb"]  # other children of the tests included
    child = subprocess.Popen(
        [sys.executable, "-c", "held = b'x' * 200_000_000; print('ready', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout.readline() == b"ready\n"
        values = observed(GpuStats())
    finally:
        child.communicate(b"\n")
    assert 0.2 < values["system/process_memory_gb"] - alone < 0.4
    assert values["system/host_memory_share"] == pytest.approx(psutil.virtual_memory().percent / 100, abs=0.2)
    assert 0 <= values["system/cpu_share"] <= 1
    assert observed(GpuStats())["system/process_memory_gb"] < alone + 0.1  # the child is gone


def test_processes_that_are_hidden_do_not_end_the_run(monkeypatch):
    """As where /proc is mounted with hidepid."""

    def denied(*args, **kwargs):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "children", denied)
    monkeypatch.setattr(psutil, "virtual_memory", denied)
    values = observed(GpuStats())
    assert values["system/process_memory_gb"] > 0 and "system/host_memory_share" not in values


def test_all_ranks_know_the_gpus_of_all_ranks(tmp_path):
    def body():
        rank = idist.get_rank()
        board = {"percent": 40 + rank} | ({} if rank else {"milliwatts": 5000})  # the second does not tell its power
        nvml = FakeNvml({f"GPU-{rank}": board})
        return observed(GpuStats(lambda device: [gpu(rank, str(rank), rank * 1_000_000_000)], nvml), windows=2)

    first, second = in_processes(2, tmp_path, body)
    assert first == second
    assert of_gpus(first) == {
        "system/gpu0_memory_allocated_gb": 0.0,
        "system/gpu0_memory_reserved_gb": 0.0,
        "system/gpu0_utilization": 0.4,
        "system/gpu0_power_w": 5.0,
        "system/gpu1_memory_allocated_gb": 1.0,
        "system/gpu1_memory_reserved_gb": 0.0,
        "system/gpu1_utilization": 0.41,
    }
    assert first["system/process_memory_gb"] > 1.2 * psutil.Process().memory_info().rss / 1e9  # of both


def test_a_run_logs_them_in_every_window_and_not_where_it_is_told_not_to(tmp_path):
    keys = {}
    for wanted in (True, False):
        config = tiny_config(
            run_dir=tmp_path / str(wanted),
            training__epochs=1,
            probe__enabled="false",
            collapse__enabled="false",
            logging__system_metrics=str(wanted).lower(),
        )
        build(config).fit()
        lines = [json.loads(line) for line in (tmp_path / str(wanted) / "metrics.jsonl").read_text().splitlines()]
        windows = [line for line in lines if "train/loss" in line]
        assert len(windows) == 3  # five steps, a window of two each
        keys[wanted] = [{name for name in line if name.startswith("system/")} for line in windows]
        for line in windows:
            parts = [line[f"train/{part}_ms"] for part in ("data", "forward", "backward", "update")]
            assert min(parts) > 0 and sum(parts) < line["train/iteration_ms"]
    assert keys == {True: [HOST] * 3, False: [set()] * 3}


# --- Parts of a step --------------------------------------------------------------------------------------------------


class FakeTime:
    """Seconds that pass when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class HandClock:
    """Of a step's parts, over a fake time."""

    def __init__(self, passed):
        self.now, self.is_known, self.wait = passed, lambda moment: True, lambda moment: None
        self.seconds = lambda first, second: second - first


def timed_run(attach_order, accumulation_steps=1, batches=4, max_epochs=1, log_frequency=2):
    """What two windows of a run say in which each part takes a time of its own, whoever is attached first."""
    passed = FakeTime()

    def step(modules, batch):
        passed.passes(0.003)
        return {"loss": (modules["model"](batch["x"])).mean()}

    class Backward(OptimizerStep):
        def step(self, engine):
            passed.passes(0.005)  # the backward pass
            super().step(engine)

    class Others:
        """What other handlers do at each event, in seconds."""

        def attach(self, engine):
            for event, seconds in (
                (Events.ITERATION_STARTED, 0.1),
                (TrainEvents.GRADIENTS_READY, 0.0005),
                (TrainEvents.OPTIMIZER_STEPPED, 0.007),
                (Events.ITERATION_COMPLETED, 0.2),
                (TrainEvents.LOG_INTERVAL_COMPLETED, 4.0),
            ):
                engine.add_event_handler(event, passed.passes, seconds)

    trainer = create_trainer(step, nn.ModuleDict({"model": LinearModel()}), log_frequency=log_frequency)
    optimizer = torch.optim.SGD(trainer.modules.parameters(), 0.1)
    handlers = [StepTiming(HandClock(passed)), Backward(optimizer, accumulation_steps), Others()]
    for place in attach_order:
        handlers[place].attach(trainer)
    seen = []
    trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, lambda engine: seen.append(dict(engine.state.metrics)))
    trainer.run(rows(*[(1, 0)] * batches), max_epochs=max_epochs)
    return seen


def split(values):
    return [values[f"train/{part}_ms"] for part in ("forward", "backward", "update")]


@pytest.mark.parametrize("attach_order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_a_step_is_split_into_forward_backward_and_update_in_any_order_of_attachment(attach_order):
    seen = timed_run(attach_order)
    assert "train/forward_ms" not in seen[0]  # the window is still open
    for values in seen[1:]:
        assert split(values) == pytest.approx([3.0, 5.0, 7.5])


def test_an_update_is_shared_by_the_iterations_of_its_accumulation_window():
    values = timed_run((0, 1, 2), accumulation_steps=2, batches=8, log_frequency=1)[3]
    assert split(values) == pytest.approx([3.0, 5.0, 3.75])


def test_every_window_and_every_epoch_begins_with_nothing():
    seen = timed_run((0, 1, 2), batches=3, max_epochs=2)  # windows of steps 1 and 2, 3, 4, 5 and 6
    assert [split(values) for values in seen[1:]] == [pytest.approx([3.0, 5.0, 7.5])] * 5


def test_a_run_that_failed_leaves_nothing_to_the_next_one():
    trainer, _ = linear_trainer(log_frequency=2)
    passed = FakeTime()
    StepTiming(HandClock(passed)).attach(trainer)

    def fail():
        passed.passes(100.0)
        raise RuntimeError("broken")

    trainer.add_event_handler(TrainEvents.GRADIENTS_READY, fail)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.run(rows((1, 0), (1, 0)), max_epochs=1)
    trainer.detach(fail)
    trainer.run(rows((1, 0), (1, 0)), max_epochs=2)
    assert split(trainer.state.metrics) == [0.0, 0.0, 0.0]


class FakeCudaEvent:
    """A CUDA event: a moment of a stream in which every event lies 2 ms behind the former, passed once waited for."""

    recorded, waits, done = 0, 0, 0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        FakeCudaEvent.recorded += 1
        self.place = FakeCudaEvent.recorded

    def query(self):
        return self.place <= FakeCudaEvent.done

    def synchronize(self):
        FakeCudaEvent.waits += 1
        FakeCudaEvent.done = max(FakeCudaEvent.done, self.place)

    def elapsed_time(self, end):
        assert self.query() and end.query(), "CUDA raises an error for events that are not over"
        return 2.0 * (end.place - self.place)


def test_a_gpu_is_waited_for_once_per_window_and_asked_only_for_what_is_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeCudaEvent)
    trainer, _ = linear_trainer(log_frequency=5)
    handler = StepTiming(CudaClock())
    handler.attach(trainer)
    waiting = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: waiting.append(len(handler._spans)))
    # Midway the GPU has caught up with the program: those spans are summed up without waiting.
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=4), lambda: setattr(FakeCudaEvent, "done", FakeCudaEvent.recorded)
    )
    trainer.run(rows(*[(1, 0)] * 5), max_epochs=1)
    assert waiting == [3, 6, 9, 3, 6]
    assert FakeCudaEvent.waits == 1
    assert split(trainer.state.metrics) == pytest.approx([2.0, 2.0, 2.0])


def test_the_clock_is_the_one_of_the_engines_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeCudaEvent)
    for device, clock in (("cpu", "HostClock"), ("cuda", "CudaClock")):
        trainer = create_trainer(lambda modules, batch: {"loss": torch.zeros(())}, nn.ModuleDict())
        trainer.device = torch.device(device)
        handler = StepTiming()
        handler.attach(trainer)
        trainer.add_event_handler(Events.EPOCH_STARTED, trainer.terminate)
        trainer.run(rows((1, 0)), max_epochs=1)
        assert type(handler.clock).__name__ == clock


@pytest.mark.parametrize("reading_first", [True, False])
def test_a_reading_at_an_intervals_end_counts_in_the_next_one_whoever_is_attached_first(monkeypatch, reading_first):
    passed, seen = FakeTime(), []
    monkeypatch.setattr("hjepa_engine.handlers.throughput.time", SimpleNamespace(perf_counter=passed))
    trainer, _ = linear_trainer()
    if not reading_first:
        Throughput().attach(trainer)
    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED(once=2), passed.passes, 3.0)
    if reading_first:
        Throughput().attach(trainer)
    trainer.add_event_handler(TrainEvents.FORWARD_STARTED, passed.passes, 1.0)
    trainer.add_event_handler(
        TrainEvents.ITERATION_FINALIZED, lambda engine: seen.append(engine.state.metrics["train/iteration_ms"])
    )
    trainer.run([{"x": torch.ones(1, 2), "images": torch.zeros(8, 1)}] * 3, max_epochs=1)
    assert seen == pytest.approx([1000.0, 1000.0, 4000.0])


# --- Time left --------------------------------------------------------------------------------------------------------


class Drive:
    """An estimate that is driven by hand: what lies between its calls, in seconds."""

    def __init__(self):
        self.passed = FakeTime()
        self.time = TimeRemaining(self.passed)

    def epoch(self, iterations, seconds, end=0.0, loading=0.0):
        self.passed.passes(loading)
        for _ in range(iterations):
            self.passed.passes(seconds)
            self.time.iteration()
        self.passed.passes(end)
        self.time.epoch_end()


def test_the_cost_between_epochs_is_not_spread_over_iterations():
    drive = Drive()
    drive.epoch(10, 1.0, end=50.0, loading=1000.0)  # what comes before the first batch comes once
    assert drive.time.estimate(0, 0) == 0.0
    assert drive.time.estimate(5, 0) == 5.0  # the last epoch is cut by max_iters: no validation follows
    assert drive.time.estimate(20, 2) == 20.0 + 100.0
    drive.epoch(10, 1.0, end=30.0)
    drive.epoch(10, 1.0, end=20.0)
    assert drive.time.estimate(10, 1) == 10.0 + (30.0 + 20.0) / 2  # of the newer two ends


def test_a_wait_for_the_first_batch_of_every_epoch_counts():
    drive = Drive()
    for _ in range(4):
        drive.epoch(10, 1.0, loading=6.0)
    assert drive.time.estimate(20, 2) == pytest.approx(2 * 16.0)


def test_a_slow_first_epoch_is_forgotten():
    drive = Drive()
    drive.epoch(10, 5.0, end=100.0)  # cold caches
    assert drive.time.estimate(30, 3) == 150.0 + 300.0
    drive.epoch(10, 1.0, end=10.0)
    assert drive.time.estimate(20, 2) == 20.0 + 20.0


def test_at_most_the_last_thousand_iterations_count():
    drive = Drive()
    for seconds in range(3000):
        drive.epoch(1, seconds)
    assert drive.time.estimate(1, 0) == sum(range(2500, 3000)) / 500


def test_nothing_is_known_before_the_first_iteration_of_a_process():
    drive = Drive()
    assert drive.time.estimate(100, 5) is None
    drive.passed.passes(2.0)
    drive.time.iteration()
    assert drive.time.estimate(100, 5) == 200.0  # the end of an epoch has not been seen


def test_a_run_that_resumes_behind_an_epochs_last_iteration_knows_its_validation_first():
    drive = Drive()
    drive.passed.passes(30.0)
    drive.time.epoch_end()
    assert drive.time.estimate(10, 1) is None
    assert drive.time.estimate(0, 1) == 30.0


def lines_of(monkeypatch, step_seconds, end_seconds, resume_at=0, stream=None, **length):
    """Progress of a run of epochs of four iterations, each as long as ``step_seconds(iteration)``."""
    passed, stream = FakeTime(), stream or io.StringIO()
    monkeypatch.setattr("hjepa_engine.handlers.progress_bar.time", SimpleNamespace(monotonic=passed))
    trainer, _ = linear_trainer(lr=1e-9)
    ProgressBar((), stream=stream).attach(trainer)
    trainer.add_event_handler(
        TrainEvents.FORWARD_STARTED, lambda engine: passed.passes(step_seconds(engine.state.iteration))
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, passed.passes, end_seconds)
    if resume_at:
        state = {"iteration": resume_at, "epoch_length": 4, "optimizer_step": resume_at}
        trainer.load_state_dict(trainer.state_dict() | state)
    trainer.run(rows(*[(1, 0)] * 4), **length)
    return stream.getvalue()


def left(text):
    return [line.split(", ")[-1] for line in text.splitlines()[:-1]]


def test_the_lines_of_a_run_with_a_cold_first_epoch_and_validation(monkeypatch):
    text = lines_of(monkeypatch, lambda i: 10.0 if i <= 4 else 1.0, 20.0, max_epochs=3)
    # 8 x 10 + 2 x 20 at first; then the second half, 4 x 1 + 20.
    assert left(text) == ["2:00 left", "24.0 s left", "0.0 s left"]


def test_the_lines_of_a_run_whose_last_epoch_is_cut(monkeypatch):
    text = lines_of(monkeypatch, lambda i: 1.0, 20.0, max_iters=10)
    assert left(text) == ["26.0 s left", "2.0 s left"]


def test_the_lines_of_a_resumed_run_know_this_process_only(monkeypatch):
    text = lines_of(monkeypatch, lambda i: 1.0, 20.0, resume_at=8, max_epochs=5)
    assert left(text) == ["48.0 s left", "24.0 s left", "0.0 s left"]


def test_a_run_that_is_put_back_starts_anew_with_bar_and_estimate(monkeypatch):
    passed, stream = FakeTime(), Terminal()
    monkeypatch.setattr("hjepa_engine.handlers.progress_bar.time", SimpleNamespace(monotonic=passed))
    trainer, _ = linear_trainer(lr=1e-9)
    bar = ProgressBar((), stream=stream)
    bar.attach(trainer)
    trainer.add_event_handler(TrainEvents.FORWARD_STARTED, passed.passes, 1.0)
    start, bars = trainer.state_dict() | {"iteration": 2, "epoch_length": 4}, []

    def put_back(engine):
        bars.append(bar._bar)
        if len(bars) == 3:
            raise RuntimeError("put back")

    trainer.add_event_handler(Events.ITERATION_COMPLETED, put_back)
    with pytest.raises(RuntimeError, match="put back"):
        trainer.run(rows(*[(1, 0)] * 4), max_epochs=2)
    trainer.load_state_dict(start)
    passed.passes(500.0)
    trainer.run(rows(*[(1, 0)] * 4), max_epochs=2)
    assert bars[0].disable  # closed, or it would stay on the screen
    assert "epoch 1/2    2.0 s, 1000 ms/it, 4.0 s left\n" in stream.getvalue()


def test_the_bar_shows_the_same_estimate(monkeypatch):
    text = lines_of(monkeypatch, lambda i: 1.0, 20.0, stream=Terminal(), max_epochs=2)
    assert "? left" in text  # before the first iteration
    assert "0.0 s left" in text
