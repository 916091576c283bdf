"""What each logged metric is, in one line. Imports nothing of torch: reports and pages read it."""

from __future__ import annotations

import re
from typing import NamedTuple

from hjepa_engine.metrics.names import COLLAPSE_KEYS, better


class Term(NamedTuple):
    """A metric, or a family of them.

    Args:
        name: with ``{l}`` for a level, ``{i}`` for a GPU, ``{encoder}`` for ``target``, ``context`` or a name of one's own.
        meaning: one sentence, with unit and range.
        source: the handler that writes it, or the recipe.
    """

    name: str
    meaning: str
    source: str

    def matches(self, metric: str) -> bool:
        """Whether a logged metric is one of these.

        >>> Term("train/loss_level_{l}", "", "").matches("train/loss_level_2")
        True
        """
        pattern = re.escape(self.name)
        for letter, values in {"l": r"\d+", "i": r"\d+", "encoder": r"[a-z0-9_]+?", "name": r"\w+"}.items():
            pattern = pattern.replace(re.escape(f"{{{letter}}}"), values)
        return re.fullmatch(pattern, metric) is not None

    @property
    def better(self) -> str:
        """``lower``, ``higher``, or nothing where that cannot be said."""
        return {"min": "lower", "max": "higher"}.get(better(self.name) or "", "")


_OF_A_STEP = "As without batch_, of the tokens that the step computed."

GLOSSARY = (
    Term("train/loss", "What is minimized, averaged over the log interval.", "MetricAverager"),
    Term("train/loss_level_{l}", "Distance of predictions and targets of one level, unweighted.", "MetricAverager"),
    Term("train/loss_{name}", "A regularizer (variance, covariance, sigreg), unweighted.", "MetricAverager"),
    Term(
        "train/distance",
        "Mean squared distance of views from their image's mean, with two_view_step.",
        "MetricAverager",
    ),
    Term("train/sigreg", "SIGReg of the views, small for standard normal ones, with two_view_step.", "MetricAverager"),
    Term("train/grad_norm", "L2 norm of all gradients before clipping.", "MetricAverager"),
    Term("train/lr", "Learning rate of the encoder and what levels share.", "ParamSchedule"),
    Term("train/lr_level_{l}", "Learning rate of a level's own parameters, with training.level_lrs.", "ParamSchedule"),
    Term("train/weight_decay", "Weight decay of matrices; biases have none.", "ParamSchedule"),
    Term("train/ema_momentum", "Share of the target encoder that an update keeps, from 0 to 1.", "TargetEncoderEMA"),
    Term("train/images_per_s", "Images of all processes per second.", "Throughput"),
    Term("train/iteration_ms", "Milliseconds of an iteration.", "Throughput"),
    Term("train/data_ms", "Milliseconds of waiting for the batch.", "Throughput"),
    Term("train/data_wait", "Share of the iteration spent waiting for the batch, from 0 to 1.", "Throughput"),
    Term("train/forward_ms", "Milliseconds of the step: encoders, predictor, losses.", "StepTiming"),
    Term("train/backward_ms", "Milliseconds of the backward pass.", "StepTiming"),
    Term("train/update_ms", "Milliseconds of clipping, optimizer and EMA.", "StepTiming"),
    Term("train/skipped_updates", "Updates dropped so far, once there are any.", "OptimizerStep"),
    Term("train/rollbacks", "Times the run went back to an earlier checkpoint, once there are any.", "CollapseGuard"),
    Term("val/loss", "The loss on held-out images, with the same masks every time.", "Validation"),
    Term("val/loss_level_{l}", "The same of one level.", "Validation"),
    Term("val/loss_{name}", "The same of a regularizer.", "Validation"),
    Term("val/distance", "The distance on held-out images, with two_view_step.", "Validation"),
    Term("val/sigreg", "SIGReg on held-out images, with two_view_step.", "Validation"),
    Term("val/damaged", "Validation images that could not be read.", "DamagedImages"),
    Term("data/damaged", "Training images that could not be read so far, once there are any.", "DamagedImages"),
    *(Term(f"collapse/batch_{{encoder}}_{key}", _OF_A_STEP, "BatchCollapse") for key in COLLAPSE_KEYS),
    Term(
        "collapse/{encoder}_std",
        "Standard deviation over fixed, unmasked images, averaged over dimensions; near 0: collapsed.",
        "CollapseMonitor",
    ),
    Term("collapse/{encoder}_norm", "Mean length of the centered features; near 0: collapsed.", "CollapseMonitor"),
    Term("collapse/{encoder}_rank", "In how many directions features vary, from 1 to D.", "CollapseMonitor"),
    Term(
        "collapse/{encoder}_rank_share",
        "The rank on a scale from 0 (a single direction) to 1 (all directions alike).",
        "CollapseMonitor",
    ),
    Term("collapse/{encoder}_rank_me", "RankMe: the rank with its paper's eps.", "CollapseMonitor"),
    Term("collapse/{encoder}_alpha_req", "Exponent of the eigenvalues' power law.", "CollapseMonitor"),
    Term(
        "collapse/{encoder}_lidar",
        "In how many directions images vary more than views of one image, from 1 to D.",
        "CollapseMonitor",
    ),
    Term("collapse/{encoder}_std_level_{l}", "The standard deviation of one level's cells.", "CollapseMonitor"),
    Term("collapse/{encoder}_norm_level_{l}", "The norm of one level's cells.", "CollapseMonitor"),
    Term("collapse/{encoder}_rank_level_{l}", "The rank of one level's cells.", "CollapseMonitor"),
    Term("collapse/{encoder}_rank_share_level_{l}", "The rank share of one level's cells.", "CollapseMonitor"),
    Term("probe/knn", "Accuracy of the nearest neighbors' vote on frozen features, from 0 to 1.", "OnlineProbe"),
    Term("probe/online_linear", "Accuracy of a linear head on frozen features, from 0 to 1.", "OnlineProbe"),
    Term("probe/linear", "Accuracy of the final linear probe of the trained encoder, from 0 to 1.", "pretrain.py"),
    Term("probe/linear_random", "The same of an encoder with random weights: a baseline.", "pretrain.py"),
    Term("probe/linear_pixels", "The same of raw pixels: a baseline.", "pretrain.py"),
    Term("system/gpu{i}_memory_allocated_gb", "Memory of live tensors, in 1e9 bytes.", "GpuStats"),
    Term("system/gpu{i}_memory_reserved_gb", "Memory that torch has taken from the GPU, in 1e9 bytes.", "GpuStats"),
    Term("system/gpu{i}_utilization", "Share of the time in which the GPU was at work, from 0 to 1.", "GpuStats"),
    Term("system/gpu{i}_power_w", "Power in watts.", "GpuStats"),
    Term("system/gpu{i}_temperature_c", "Temperature in degrees Celsius.", "GpuStats"),
    Term("system/process_memory_gb", "Resident memory of all processes of the run, in 1e9 bytes.", "GpuStats"),
    Term("system/host_memory_share", "Share of the fullest host's memory in use by anybody, from 0 to 1.", "GpuStats"),
    Term("system/cpu_share", "Share of the busiest host's cores in use by anybody, from 0 to 1.", "GpuStats"),
)


def explain(metric: str) -> Term | None:
    """The term of a logged metric; None for one of the user's own.

    >>> explain("collapse/target_rank_share_level_1").name
    'collapse/{encoder}_rank_share_level_{l}'
    """
    found = [term for term in GLOSSARY if term.matches(metric)]
    # The most literal one: a level's loss is no regularizer.
    return max(found, key=lambda term: len(re.sub(r"\{\w+\}", "", term.name)), default=None)
