"""Monitoring sections of the configuration: logging, collapse, guards, probes, pictures."""

from __future__ import annotations

from typing import Literal

from hjepa_engine.config.fields import PathString, section, setting
from hjepa_engine.metrics.health import COLLAPSED_SHARE, LOSS_SPIKE, SETTLING_STEPS, STD_DROP
from hjepa_engine.metrics.names import COLLAPSE_OUTPUTS, TRAIN_LOSS, collapse_metric


@section()
class WandbConfig:
    """Weights & Biases."""

    enabled: bool = False
    """Write there too."""
    project: str = "hjepa"
    """Project of the run."""
    entity: str | None = None
    """User or team; the account's own by default."""
    tags: list[str] = setting(list)
    """Tags of the run."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """``auto``: offline where there is no API key."""


@section()
class TensorboardConfig:
    """TensorBoard event files."""

    enabled: bool = False
    """Write them."""


@section()
class LoggingConfig:
    """What is written where while a run goes on; ``metrics.jsonl`` always is."""

    experiment_name: str = "hjepa"
    """Name of the run, and of its folder by default."""
    log_dir: PathString | None = None
    """Folder of TensorBoard's and W&B's files; the run folder by default."""
    log_frequency: int = setting(50, ge=1)
    """Optimizer steps between two records; an epoch's end writes one too."""
    progress_bar: bool = True
    """Show progress on standard error."""
    system_metrics: bool = True
    """Log memory, load, power and temperature of GPUs, and memory and load of the host."""
    watch: Literal["none", "gradients", "parameters", "all"] = "none"
    """Log histograms of every trainable parameter, of its gradient, or of both."""
    watch_frequency: int = setting(500, ge=1)
    """Optimizer steps between two sets of histograms; a multiple of ``log_frequency``."""
    report: bool = True
    """Write ``report.html`` into the run folder when the run ends."""
    wandb: WandbConfig = setting(WandbConfig)
    tensorboard: TensorboardConfig = setting(TensorboardConfig)


@section()
class CollapseConfig:
    """How collapse is measured: docs/health.md says what the figures mean."""

    enabled: bool = True
    """Measure it."""
    every: int | None = setting(None, ge=1)
    """Optimizer steps between readings on the fixed set of images, each at the end of a log interval; by default 50 x
    images / images of an optimizer step, which keeps them at about 1 % of the run."""
    images: int | None = setting(None, ge=2)
    """Images of the fixed set; by default as many as have max(2 D, 2048) features at every level, at least 128."""
    batch_every: int = setting(200, ge=1)
    """Optimizer steps between readings on training batches, which need no forward pass of their own."""
    modules: dict[str, str] | None = None
    """Encoders that are measured on the fixed images, by their name in the metrics; by default ``context`` and ``target``:
    ``context_encoder`` and ``target_encoder``, where these modules are there, else ``target``: ``model.encoder``."""
    outputs: dict[str, str] = setting(COLLAPSE_OUTPUTS.copy)
    """Outputs of the step, tokens (B, N, D) or features (B, D), that are measured on training batches, by their name in the
    metrics."""
    alpha_req: bool = False
    """Measure alpha-ReQ too."""
    lidar_views: int = setting(0, ge=0)
    """Measure LiDAR too, on this many random views of each image, at least 2; 0: do not."""


@section(frozen=True)
class GuardRule:
    """When something is wrong with a logged metric, and what to do. One of the five conditions must be given."""

    metric: str
    """Name of the metric, as in ``metrics.jsonl``."""
    below: float | None = None
    """Wrong where the value is below this."""
    above: float | None = None
    """Wrong where the value is above this."""
    drop: float | None = setting(None, gt=0, lt=1)
    """Wrong where the value has lost this share of its best (largest) one."""
    spike: float | None = setting(None, gt=1)
    """Wrong where the value is this many times the median of the 20 before it."""
    non_finite: bool = False
    """Wrong where the value is NaN or infinite; it then counts for no other condition."""
    readings: int = setting(3, ge=1)
    """So many readings in a row must be wrong."""
    after: int = setting(0, ge=0)
    """Readings before this optimizer step are not wrong; later ones are compared with them all the same."""
    action: Literal["warn", "stop", "rollback"] = "warn"
    """``warn`` once per occurrence; ``stop`` the run (exit code 5); ``rollback`` to the newest checkpoint up to the last
    right reading, with a lower learning rate."""

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions that are given."""
        given = [name for name in ("below", "above", "drop", "spike") if getattr(self, name) is not None]
        return [*given, "non_finite"] if self.non_finite else given


def default_rules() -> list[GuardRule]:
    """Warnings that healthy runs do not get."""
    return [
        GuardRule(collapse_metric("target", "std"), drop=STD_DROP, readings=2),
        GuardRule(collapse_metric("target", "std", batch=True), drop=STD_DROP, readings=2),
        GuardRule(collapse_metric("target", "rank_share"), below=COLLAPSED_SHARE, readings=2, after=SETTLING_STEPS),
        GuardRule(TRAIN_LOSS, spike=LOSS_SPIKE, readings=2, after=SETTLING_STEPS),
    ]


@section()
class GuardConfig:
    """What happens when something goes wrong: docs/health.md has rules for common cases."""

    rules: list[GuardRule] = setting(default_rules)
    """On logged metrics; by default features that lose their variance or rank, and a spike of the loss, are warned of."""
    lr_factor: float = setting(0.5, gt=0, le=1)
    """Factor of all learning rates after a rollback."""
    max_rollbacks: int = setting(2, ge=1)
    """Rollbacks of a run; one more ends it (exit code 5)."""


@section()
class OnlineProbeConfig:
    """Probes of the target encoder while it is trained, on the mean patch token of labeled images of their own."""

    every: int | None = setting(None, ge=1)
    """Epochs between probes, one before the first step and one after the last besides; null: none."""
    train_images: int = setting(2000, ge=1)
    """Labeled images to learn from."""
    val_images: int = setting(1000, ge=1)
    """Labeled images, held out, to measure on."""
    neighbors: int = setting(20, ge=1)
    """Neighbors that vote in ``probe/knn``; all, where there are fewer."""
    temperature: float = setting(0.07, gt=0)
    """Of their weights exp(cosine similarity / temperature)."""
    linear_epochs: int = setting(20, ge=0)
    """Epochs of the linear head of ``probe/online_linear``, with batch size, rate and weight decay of ``probe``; 0: none."""


@section()
class PicturesConfig:
    """Figures in the run folder, also sent to every logger."""

    enabled: bool = True
    """Draw them when the run ends."""
    every: int | None = setting(None, ge=1)
    """Epochs between figures; null: only when the run ends."""
    images: int = setting(4, ge=1, le=16)
    """Images in a figure."""
