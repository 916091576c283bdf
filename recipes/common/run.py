"""A run: its parts, and how it is trained from its newest checkpoint to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from torch import nn

from hjepa_engine import Config
from hjepa_engine.build import build_model
from hjepa_engine.data import ImageLoader, describe_data, passed_splits
from hjepa_engine.data import describe as describe_splits
from hjepa_engine.data.contents import Description
from hjepa_engine.data.datasets import has_probe_split
from hjepa_engine.data.summary import summarize, why_unlabeled
from hjepa_engine.devices import process_group
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import ConfigError
from hjepa_engine.handlers import Checkpointer, CollapseGuard, MetricsLogger, Preemption
from hjepa_engine.recipes.common.gathering import ProbeData
from hjepa_engine.recipes.common.initial_weights import initial_weights
from hjepa_engine.recipes.common.monitoring import levels_of, warn_no_encoder, warn_no_labels
from hjepa_engine.recipes.common.probe import as_metrics, describe, evaluate_encoders
from hjepa_engine.recipes.common.rollback import train_with_rollbacks
from hjepa_engine.report import write_report_on_exit
from hjepa_engine.run.agreement import refuse_local_folders, refuse_other_configs
from hjepa_engine.run.folder import RunFolder, own_folders
from hjepa_engine.run.lifecycle import record_outcome, start_run
from hjepa_engine.run.measured import recall
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import gather_objects, rank_zero

Kind = TypeVar("Kind")
#: What ``build`` takes for data: map-style data sets to train on and to validate.
Datasets = tuple[Any, Any]


@dataclass
class Run:
    """A run whose parts are built and attached: add handlers to ``trainer``, then call :meth:`fit`."""

    config: Config
    trainer: Trainer
    data: ImageLoader
    val_data: ImageLoader
    folder: RunFolder
    handlers: list[Any]
    """All that are attached, in that order."""
    encoder: str | None = None
    """Name of the module that the linear probe reads; None: there is no probe."""
    initial_encoder: nn.Module | None = field(default=None, repr=False)
    """The encoder before training, for the probe's baseline; None: built again from the configuration."""

    @property
    def modules(self) -> nn.ModuleDict:
        """What the step works on, by name."""
        return self.trainer.modules

    @property
    def logger(self) -> MetricsLogger:
        """Takes metrics and media of your own."""
        return self.handler(MetricsLogger)

    @property
    def checkpointer(self) -> Checkpointer:
        """Saves the run."""
        return self.handler(Checkpointer)

    @property
    def guard(self) -> CollapseGuard:
        """Checks metrics against the configured rules."""
        return self.handler(CollapseGuard)

    @property
    def preemption(self) -> Preemption:
        """Stops and saves the run when it is asked to."""
        return self.handler(Preemption)

    @property
    def iterations(self) -> int:
        """Length of the whole run."""
        training = self.config.training
        return min(training.max_iters or sys.maxsize, training.epochs * len(self.data))

    def handler(self, cls: type[Kind]) -> Kind:
        """The first attached handler of a class.

        Raises:
            LookupError: there is none.
        """
        for handler in self.handlers:
            if isinstance(handler, cls):
                return handler
        raise LookupError(f"no {cls.__name__} is attached")

    def describe(self) -> str:
        """What was read, and one line: data, encoder, levels, device, length."""
        data, trainer = self.config.data, self.trainer
        model = unwrap(self.modules[self.encoder]) if self.encoder is not None else self.modules
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        parts = [f"{'encoder' if self.encoder else 'modules'} of {parameters:.2f} M parameters"]
        if grid := getattr(model, "grid", None):
            parts.append(f" on {grid[0]} x {grid[1]} patches")
        if levels := levels_of(self.modules):
            parts.append(f", {len(levels)} level{'' if len(levels) == 1 else 's'}")
        summary = "\n".join(summarize(self.data.split, self.val_data.split))
        return (
            f"{summary}\n{data.class_path or data.dataset} in batches of {data.batch_size}; {''.join(parts)}; "
            f"{trainer.device}, {trainer.amp_dtype or torch.float32}; {self.iterations} "
            f"iteration{'' if self.iterations == 1 else 's'}"
        )

    def fit(self) -> dict[str, float]:
        """Train from the newest checkpoint on; then, where ``probe.enabled``, measure the encoder with the linear probe.

        A run that is asked to stop is saved and raises ``Preempted``.
        """
        try:
            # What can be wrong with weights and data is found before anything is written.
            initialize = initial_weights(self.trainer.modules, self.folder)
            for loader in (self.data, self.val_data):
                loader.prepare()
            rank_zero(self.folder.lock)
            folders = {"run_dir": self.folder.path, "checkpoint.checkpoint_dir": self.folder.checkpoint_path}
            refuse_local_folders(folders)
            start_run(
                self.trainer,
                self.folder,
                epoch_length=len(self.data),
                iterations=self.iterations,
                initialize=initialize,
            )
            del initialize  # and the weights that it holds
            writer = self.checkpointer.writer
            with (
                write_report_on_exit(self.folder),
                record_outcome(self.trainer, self.folder, writer, iterations=self.iterations) as results,
            ):
                results |= self._train_and_probe()
            return results
        finally:
            self.logger.close()
            self.preemption.close()
            self.data.close()
            self.val_data.close()
            self.folder.unlock()

    def _train_and_probe(self) -> dict[str, float]:
        train_with_rollbacks(
            self._train, self.trainer, self.folder.path, guard=self.guard, checkpointer=self.checkpointer
        )
        results: dict[str, float] = {}
        if self.config.probe.enabled:
            results = self._probe()
            self.logger.log_metrics(as_metrics(results))
        self.checkpointer.close()
        return results

    def _probe(self) -> dict[str, float]:
        if self.encoder is None:
            warn_no_encoder("no linear probe", self.modules)
            return {}
        if why := why_unlabeled(self.data.split):
            warn_no_labels("no linear probe", why)
            return {}
        untrained = self.initial_encoder
        if untrained is None:
            untrained = build_model(self.config)[self.encoder]
        encoders = {"trained": self.modules[self.encoder], "random": untrained, "pixels": None}
        data: ProbeData | None = None
        if not has_probe_split(self.config.data):
            data = {"probe": self.data.split, "val": self.val_data.split}  # they are open already
        return evaluate_encoders(self.config, encoders, self.folder.path, self.config.logging.progress_bar, data)

    def _train(self) -> None:
        limit = self.config.training.max_iters
        self.data.close()  # a rollback has left them in the middle of an epoch
        self.trainer.run(self.data, self.config.training.epochs if limit is None else None, limit and self.iterations)


def with_passed_data(config: Config) -> Config:
    """The configuration of a run whose data sets are passed: it names no others."""
    return replace(config, data=replace(config.data, dataset="passed", class_path=None, init_args={}, in_memory=False))


def run_to_end(config: Config, build: Callable[[Config], Run], data: Datasets | None = None) -> None:
    """Train the run unless it is finished already, in all processes; print where it is and what the probe found.

    Args:
        config: of the run.
        build: makes its parts.
        data: what it is trained on; what the configuration names by default.
    """

    def describe_now() -> Description | None:
        if data is None:
            return describe_data(config.data, config.seed, own_folders(config))
        return describe_splits(**passed_splits(data))

    with process_group(config.device, config.distributed.timeout):
        config = recall(config if data is None else with_passed_data(config))
        refuse_other_configs(config)
        folder = RunFolder(config)
        finished = folder.finished_results(describe_now)
        if len(set(gather_objects(finished is None))) > 1:
            raise ConfigError(
                f"run_dir {folder.path} must be a folder that all processes share; some see a finished run"
            )
        results = finished
        if finished is None:
            run = build(config)
            if idist.get_rank() == 0:
                print(run.describe(), flush=True)
            results = run.fit()
        if idist.get_rank() == 0:
            print(f"\nrun folder: {folder.path}" + ("" if finished is None else " (was finished already)"))
            if (folder.path / "report.html").exists():
                print(f"report:     {folder.path / 'report.html'}")
            if results:
                print(describe(results, config))
