"""Measure what monitoring costs a pretraining run, with everything that is on by default.

    OMP_NUM_THREADS=1 python recipes/benchmarks/monitoring.py                 # a ViT-S/16 takes minutes per core
    OMP_NUM_THREADS=1 python recipes/benchmarks/monitoring.py digit_pages     # the recipe's own intervals

Every monitor's handlers are timed while a run goes on; what comes once in so many steps is divided by their number. Then
runs with and without monitors take turns, and the medians are compared. docs/benchmarks.md quotes the output.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from ignite.engine import Events

from hjepa_engine import Config, load_config
from hjepa_engine.data import open_split
from hjepa_engine.engine import Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.handlers import CollapseMonitor, DamagedImages, OnlineProbe, StepTiming, Throughput
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.recipes.common.monitoring import build_monitors
from hjepa_engine.recipes.common.run import Run
from hjepa_engine.recipes.pretrain import DEFAULT_CONFIG, build

#: What is measured, with the steps that are timed one by one and the steps and rounds of the comparison.
CASES: dict[str, tuple[list[str], int, int, int]] = {
    "digit_pages, default intervals": (
        ["--collapse.every=null", "--collapse.batch_every=200", "--online_probe.every=null"],
        400,
        100,
        5,
    ),
    "digit_pages": ([], 400, 0, 0),
    "ViT-S/16 at 224, batches of 32": (
        [
            *("--data.dataset=fake", "--data.fake_size=4000", "--data.image_size=224", "--data.batch_size=32"),
            *("--model.encoder_type=vit_small_patch16_224", "--model.patch_size=16", "--model.embed_dim=384"),
            *("--model.depth=12", "--model.num_heads=6", "--model.pos_embed=sincos", "--model.levels=null"),
            "--model.num_hierarchies=3",
            *("--model.predictor.width=192", "--model.predictor.depth=6", "--model.predictor.num_heads=6"),
            *("--masking.num_masks=4", "--masking.mask_scale=[0.15, 0.2]", "--online_probe.every=null"),
            *("--collapse.every=null", "--collapse.batch_every=200"),
        ],
        4,
        0,
        0,
    ),
}
OFF = ["--collapse.enabled=false", "--logging.system_metrics=false", "--guard.rules=[]", "--online_probe.every=null"]
#: Without what happens only when a run ends, and without saving.
QUIET = [
    *("--device=cpu", "--logging.progress_bar=false", "--probe.enabled=false", "--pictures.enabled=false"),
    *("--logging.report=false", "--checkpoint.save_frequency=1000000", "--checkpoint.keep_best_n=0"),
]


def configured(options: list[str], folder: str) -> Config:
    """The default configuration with changes."""
    return load_config(DEFAULT_CONFIG, [*options, *QUIET, f"--run_dir={folder}"])


class Stopwatches:
    """Time every handler that is attached to a trainer from now on; the sum of each class is in ``seconds``."""

    def __init__(self, trainer: Trainer) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._add = trainer.add_event_handler
        trainer.add_event_handler = self.add_event_handler  # type: ignore[method-assign,assignment]

    def add_event_handler(self, event: Any, handler: Callable[..., Any], *args: Any) -> Any:
        """As the trainer's."""
        name = type(getattr(handler, "__self__", None)).__name__

        @functools.wraps(handler)
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = handler(*arguments)
            self.seconds[name] += time.perf_counter() - began
            return result

        return self._add(event, timed, *args)


def train(run: Run, iterations: int) -> float:
    """Train; seconds per iteration, without what happens before the first and behind the last one."""
    times: list[float] = []
    run.trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: times.append(time.perf_counter()))
    run.trainer.run(run.data, max_iters=iterations)
    return (times[-1] - times[0]) / (len(times) - 1)


def monitors_table(options: list[str], iterations: int) -> None:
    """Time of each monitor, and its share of the run at the default intervals."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(configured([*options, *OFF], folder))
        config, trainer = configured(options, folder), run.trainer
        windows, readings = Counter[str](), Counter[str]()
        images, val = open_split(config.data, "train"), open_split(config.data, "val")
        monitors = [Throughput(), *build_monitors(config, trainer, images, val, run.preemption, DamagedImages())]
        due = {type(monitor).__name__: monitor for monitor in monitors if hasattr(monitor, "due")}

        def count() -> None:
            for name, monitor in due.items():
                readings[name] += monitor.due != last[name]
                last[name] = monitor.due

        last = {name: monitor.due for name, monitor in due.items()}
        trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, count)
        trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, lambda: windows.update(["seen"]))
        stopwatches = Stopwatches(trainer)
        for monitor in monitors:
            monitor.attach(trainer)
            if isinstance(monitor, CollapseMonitor):
                next(iter(monitor.images))  # read once and then kept, which is no part of a reading
        began = time.perf_counter()
        train(run, iterations)
        whole = time.perf_counter() - began
        run.preemption.close()
    step = (whole - sum(stopwatches.seconds.values())) / iterations
    print(f"{1000 * step:.1f} ms per iteration without monitors, {iterations} iterations")
    print("monitor           ms each   once in iterations   share of the run")
    shares = []
    for monitor in monitors:
        name = type(monitor).__name__
        if name in due:
            every = monitor.every
            number = max(1, readings[name]) + isinstance(
                monitor, CollapseMonitor
            )  # which reads before the first step too
        elif isinstance(monitor, OnlineProbe):
            every = monitor.every * len(run.data)
            number = 1 + iterations // every
        elif isinstance(monitor, (StepTiming, Throughput)):
            number, every = iterations, 1
        else:
            number, every = windows["seen"], min(config.logging.log_frequency, len(run.data))
        each = stopwatches.seconds[name] / number
        shares.append(each / every / step)
        print(f"{name:15} {1000 * each:9.3f}   {every:18}   {100 * shares[-1]:14.3f} %")
    print(f"all of them {100 * sum(shares):52.3f} %")


def comparison(options: list[str], iterations: int, rounds: int) -> None:
    """Time per iteration with and without monitors, in runs that take turns; readings on fixed images are not among it."""
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, more in (("without", OFF), ("with", [])):
            with tempfile.TemporaryDirectory() as folder:
                run = build(configured([*options, *more], folder))
                times[name].append(train(run, iterations))
                run.preemption.close()
    ratios = [1 - bare / full for bare, full in zip(*times.values(), strict=True)]
    for name, values in times.items():
        low, middle, high = (1000 * pick(values) for pick in (min, statistics.median, max))
        print(f"{name:7} monitors: {middle:.2f} ms per iteration (of {rounds} rounds: {low:.2f} to {high:.2f})")
    low, middle, high = (100 * pick(ratios) for pick in (min, statistics.median, max))
    print(f"share of a round that monitors take: {middle:.1f} % (of {rounds} pairs: {low:.1f} to {high:.1f} %)")


def main(names: list[str]) -> None:
    """Print the tables of the named cases, of all by default."""
    print(machine())
    for name in names or CASES:
        options, iterations, compared, rounds = CASES[name]
        print(f"\n{name}: ", end="", flush=True)
        monitors_table(options, iterations)
        if rounds:
            comparison(options, compared, rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
