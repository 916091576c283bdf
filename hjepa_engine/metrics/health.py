"""What is known about collapse: the thresholds of guards, verdict and figures, and what usually helps. Without torch."""

from __future__ import annotations

from hjepa_engine.metrics.names import COLLAPSE, PROBE, TRAIN, VAL

#: Rank share (0 to 1) under which an encoder counts as collapsed: features vary in 1 + 0.02 (D - 1) directions.
COLLAPSED_SHARE = 0.02
#: Rank share that is a warning sign: few directions, though some encoders do well with them.
LOW_SHARE = 0.05
#: Part of its value at step 0 below which a rank share is a warning sign: healthy runs of the default keep about half.
FALLEN_SHARE = 0.3
#: Part of their std or norm at step 0 below which features count as constant, whatever their spectrum looks like: with
#: momentum 0, runs on digit pages and CIFAR-10 kept 0.12 and 0.16, healthy ones 0.7 or more.
COLLAPSED_SCALE = 0.2
#: The same, as a warning sign: a run that recovered from there kept 0.43.
LOW_SCALE = 0.5
#: Ratio of the rank shares on the fixed images and on training batches from which one of them must be wrong.
DISAGREEMENT = 3.0
#: Standard deviation across images, as a part of the features' norm, below which a figure calls them collapsed.
COLLAPSED_VARIATION = 0.05
#: A change of accuracy that is more than the noise of two probes on 1000 images.
ACCURACY_NOISE = 0.05
#: What an accuracy may lose of its best, which is the luckiest of many: healthy runs of the default lose 0.05.
ACCURACY_LOSS = 0.1
#: Part by which a loss must fall to count as falling.
LOSS_FALL = 0.1

#: Of the default guard rules. Part of its best that a std loses before a guard warns: the earliest sign of collapse.
STD_DROP = 0.75
#: Multiple of its median from which a loss is a spike.
LOSS_SPIKE = 5.0
#: Optimizer steps in which loss and rank of a new run settle: they are not held against their thresholds before.
SETTLING_STEPS = 500

#: The rules of the report's verdict in words.
VERDICT_RULES = (
    f"Collapsed: the rank share of an encoder is below {COLLAPSED_SHARE}, or the size (standard deviation or norm) of its "
    f"centered features is below {COLLAPSED_SCALE} of that at step 0. Watch: a rank share below {LOW_SHARE} or below "
    f"{FALLEN_SHARE} of that at step 0, a level's below {COLLAPSED_SHARE}, a size below {LOW_SCALE} of that at step 0, "
    f"fixed images and training batches whose rank shares differ by a factor of {DISAGREEMENT:g}, a kNN accuracy "
    f"{ACCURACY_NOISE} below the random encoder's or {ACCURACY_LOSS} below its own best, values that were not finite, a "
    f"collapsed rank share while the kNN accuracy is {ACCURACY_NOISE} above the random encoder's. Broken: the newest loss "
    "or rank share is not finite. Cannot tell: nothing was measured after step 0."
)

#: What usually helps, by the group of the metric that is wrong.
ADVICE = {
    COLLAPSE: "a momentum nearer to 1 (model.ema.momentum), a lower training.lr or a longer warm-up, and masks that hide "
    "more usually help",
    PROBE: "the encoder was better before: take an earlier checkpoint, or a lower training.lr, more weight decay or a "
    "shorter run",
    TRAIN: "a lower training.lr, training.clip_grad or a longer warm-up usually helps",
    VAL: "more augmentation, more training.weight_decay or a shorter run usually helps",
}


def advice_for(metric: str) -> str:
    """What usually helps where ``metric`` is wrong; empty where nothing is known.

    >>> advice_for("val/loss")
    'more augmentation, more training.weight_decay or a shorter run usually helps'
    """
    return next((advice for group, advice in ADVICE.items() if metric.startswith(group)), "")
