"""A run: its parts, and how it is trained from its newest checkpoint to its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from hjepa_engine import Config
from hjepa_engine.data import shutdown_workers
from hjepa_engine.engine import Trainer
from hjepa_engine.handlers import Checkpointer, MetricsLogger, Preemption
from hjepa_engine.recipes.linear_probe import as_metrics, evaluate_encoder
from hjepa_engine.report import write_report_on_exit
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.run.lifecycle import record_outcome, start_run
from hjepa_engine.run.rollback import train_with_rollbacks
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import rank_zero


@dataclass
class Run:
    """A run whose parts are built and attached: add handlers to ``trainer``, then call :meth:`fit`."""

    config: Config
    trainer: Trainer
    data: torch.utils.data.DataLoader[dict[str, object]]
    val_data: torch.utils.data.DataLoader[dict[str, object]]
    logger: MetricsLogger
    folder: RunFolder
    checkpointer: Checkpointer
    preemption: Preemption

    @property
    def modules(self) -> nn.ModuleDict:
        """``context_encoder``, ``target_encoder`` and ``predictor``."""
        return self.trainer.modules

    @property
    def iterations(self) -> int:
        """Length of the whole run."""
        training = self.config.training
        return min(training.max_iters or sys.maxsize, training.epochs * len(self.data))

    def describe(self) -> str:
        """One line: data, encoder, levels, device, length."""
        encoder, data = unwrap(self.modules["target_encoder"]), self.config.data
        parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
        return (
            f"{data.dataset} in batches of {data.batch_size}; encoder of {parameters:.2f} M parameters on "
            f"{encoder.grid[0]} x {encoder.grid[1]} patches, {len(unwrap(self.modules['predictor']).levels)} levels; "
            f"{self.trainer.device}, {self.trainer.amp_dtype or torch.float32}; {self.iterations} iterations"
        )

    def fit(self) -> dict[str, float]:
        """Train from the newest checkpoint on; then, where ``probe.enabled``, judge the encoder with the linear probe.

        A run that is asked to stop is saved and raises ``Preempted``.
        """
        rank_zero(self.folder.lock)
        try:
            start_run(self.trainer, self.folder, len(self.data), self.iterations)
            writer = self.checkpointer.writer
            with (
                write_report_on_exit(self.folder),
                record_outcome(self.folder, self.trainer, writer, self.iterations) as results,
            ):
                results |= self._train_and_judge()
            return results
        finally:
            self.logger.close()
            self.preemption.close()
            shutdown_workers(self.data, self.val_data)
            self.folder.unlock()

    def _train_and_judge(self) -> dict[str, float]:
        config = self.config
        train_with_rollbacks(
            self._train,
            lambda: self.checkpointer.save_rolled_back(self.trainer),
            self.trainer,
            self.checkpointer.writer,
            config.guard,
            self.folder,
        )
        results: dict[str, float] = {}
        if config.probe.enabled:
            results = evaluate_encoder(
                config, self.modules["target_encoder"], self.folder.path, config.logging.progress_bar
            )
            self.logger.log_metrics(as_metrics(results))
        self.checkpointer.close()
        return results

    def _train(self) -> None:
        limit = self.config.training.max_iters
        shutdown_workers(self.data)  # a rollback has left them in the middle of an epoch
        self.trainer.run(self.data, self.config.training.epochs if limit is None else None, limit and self.iterations)
