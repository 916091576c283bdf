"""Names of logged metrics that more than one module uses. Imports nothing: a configuration is checked without torch."""

from __future__ import annotations

#: Groups: the part of a name before its slash.
TRAIN, VAL, PROBE, COLLAPSE, SYSTEM = "train/", "val/", "probe/", "collapse/", "system/"

TRAIN_LOSS, VAL_LOSS = "train/loss", "val/loss"
LR, WEIGHT_DECAY, EMA_MOMENTUM = "train/lr", "train/weight_decay", "train/ema_momentum"
GRAD_NORM, ROLLBACKS = "train/grad_norm", "train/rollbacks"
IMAGES_PER_S, ITERATION_MS, DATA_WAIT = "train/images_per_s", "train/iteration_ms", "train/data_wait"

#: Accuracies measured while a run goes on.
KNN, ONLINE_LINEAR = "probe/knn", "probe/online_linear"
#: Accuracy of the linear probe after the run, by what it was trained on.
FINAL_PROBES = {"trained": "probe/linear", "random": "probe/linear_random", "pixels": "probe/linear_pixels"}

ENCODERS = ("target", "context")
#: Collapse metrics that are measured of encoders, levels and training batches alike.
COLLAPSE_KEYS = ("std", "norm", "rank", "rank_share")
#: Outputs of ``hjepa_step`` that are measured on training batches, by their name in the metrics.
COLLAPSE_OUTPUTS = {"context": "context_tokens", "target": "target_tokens"}
RANK_ME, ALPHA_REQ, LIDAR, SPECTRUM = "rank_me", "alpha_req", "lidar", "spectrum"

#: How reports call metrics.
TITLES = {
    "collapse/target_rank_share": "Target rank share",
    "collapse/target_std": "Target std",
    "collapse/target_norm": "Target norm",
    "collapse/context_rank_share": "Context rank share",
    "collapse/context_std": "Context std",
    "collapse/batch_target_rank_share": "Target rank share, training batches",
    TRAIN_LOSS: "Training loss",
    VAL_LOSS: "Validation loss",
    KNN: "kNN accuracy",
    ONLINE_LINEAR: "Online linear accuracy",
    GRAD_NORM: "Gradient norm",
    LR: "Learning rate",
    IMAGES_PER_S: "Images per second",
}


def collapse_metric(encoder: str, key: str, level: int | str | None = None, batch: bool = False) -> str:
    r"""The name of a collapse metric.

    >>> collapse_metric("target", "std"), collapse_metric("context", "rank_share", level=1)
    ('collapse/target_std', 'collapse/context_rank_share_level_1')

    Args:
        encoder: ``target`` or ``context``.
        key: one of :data:`COLLAPSE_KEYS`, or :data:`RANK_ME`, :data:`ALPHA_REQ`, :data:`LIDAR`, :data:`SPECTRUM`.
        level: of the hierarchy, or a pattern of levels like ``(\d+)``.
        batch: measured on training batches instead of the fixed images.
    """
    return f"{COLLAPSE}{'batch_' if batch else ''}{encoder}_{key}{'' if level is None else f'_level_{level}'}"


def spectrum_encoder(name: str) -> str | None:
    """The encoder that a logged spectrum is of; None where ``name`` is no spectrum.

    >>> spectrum_encoder("collapse/target_spectrum"), spectrum_encoder("train/loss")
    ('target', None)
    """
    if name.startswith(COLLAPSE) and name.endswith(f"_{SPECTRUM}"):
        return name.removeprefix(COLLAPSE).removesuffix(f"_{SPECTRUM}")
    return None


def better(name: str) -> str | None:
    """``min`` or ``max``: which values of a metric are better; None where that cannot be said.

    >>> better("val/loss"), better("probe/knn"), better("collapse/target_rank"), better("train/lr")
    ('min', 'max', 'max', None)
    """
    if name.endswith("/loss"):
        return "min"
    return "max" if name.startswith((PROBE, COLLAPSE)) and not name.endswith(f"_{ALPHA_REQ}") else None
