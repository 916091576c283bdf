"""Is the representation collapsing? The answer in words, from the logged figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from hjepa_engine.metrics.health import (
    ACCURACY_LOSS,
    ACCURACY_NOISE,
    ADVICE,
    COLLAPSED_SCALE,
    COLLAPSED_SHARE,
    DISAGREEMENT,
    FALLEN_SHARE,
    LOSS_FALL,
    LOW_SCALE,
    LOW_SHARE,
)
from hjepa_engine.metrics.names import (
    COLLAPSE,
    ENCODERS,
    GRAD_NORM,
    KNN,
    ONLINE_LINEAR,
    PROBE,
    ROLLBACKS,
    TITLES,
    TRAIN,
    TRAIN_LOSS,
    VAL_LOSS,
    collapse_metric,
)
from hjepa_engine.report.numbers import number, percent
from hjepa_engine.report.reading import Series

Level = Literal["healthy", "watch", "collapsed", "broken", "cannot tell"]

TARGET_SHARE, TARGET_STD = collapse_metric("target", "rank_share"), collapse_metric("target", "std")
BATCH_SHARE = collapse_metric("target", "rank_share", batch=True)
#: The metrics of the evidence, in its order; the levels' rank shares come behind the target encoder's.
_TARGET = (TARGET_SHARE, TARGET_STD, collapse_metric("target", "norm"))
_OTHERS = (
    *(collapse_metric("context", key) for key in ("rank_share", "std")),
    *(BATCH_SHARE, TRAIN_LOSS, VAL_LOSS, KNN, ONLINE_LINEAR),
)


@dataclass(frozen=True)
class Evidence:
    """The first, lowest, highest and newest finite value of a metric, with their optimizer steps."""

    name: str
    first: float
    first_step: int
    lowest: float
    lowest_step: int
    highest: float
    highest_step: int
    now: float
    now_step: int

    @property
    def title(self) -> str:
        """The metric in words."""
        return TITLES.get(self.name) or f"{TITLES[TARGET_SHARE]}, level {_level(self.name)}"


@dataclass(frozen=True)
class Verdict:
    """The answer, why, what usually helps, and the evidence behind it."""

    level: Level
    headline: str
    reasons: list[str]
    advice: list[str]
    evidence: list[Evidence]


def assess(series: Mapping[str, Series]) -> Verdict:
    """Assess a run by its logged metrics; :mod:`hjepa_engine.metrics.health` has the rules and thresholds.

    A low rank with a kNN accuracy clearly above the random encoder's is a warning sign, not collapse: some useful directions
    are left. Collapse metrics center features per patch position, so that features which depend on the position and not
    on the image count as collapsed.

    Args:
        series: all metrics of the run by name.
    """
    evidence = {name: found for name in _names(series) if (found := _evidence(name, series))}
    low_rank, constant, broken = _collapsed_ranks(evidence), _collapsed_scales(evidence), _broken(series)
    collapsed = low_rank + constant
    signs = {
        COLLAPSE: [
            *collapsed,
            *_low_ranks(evidence),
            *_low_scales(evidence),
            *_easy_targets(evidence),
            *_disagreement(evidence),
        ],
        PROBE: _falling_probe(evidence),
        TRAIN: _non_finite(series),
    }
    level: Level
    target = evidence.get(TARGET_SHARE)
    if broken:
        level, headline = "broken", "Values are not finite."
        signs = {TRAIN: broken, COLLAPSE: collapsed}
    elif low_rank and not constant and _probe_gain(evidence) > ACCURACY_NOISE:
        level, headline = "watch", "The rank is very low, though the kNN accuracy is still above a random encoder's."
    elif collapsed:
        level, headline = "collapsed", "The representation has collapsed."
    elif target is None or target.now_step <= 0:
        level, headline = "cannot tell", "Nothing was measured on the target encoder after step 0."
        signs = {"": ["Measuring needs collapse.enabled and a run of some steps."], **signs}
    elif any(signs.values()):
        level, headline = "watch", "Not collapsed, but there are warning signs."
    else:
        level, headline = "healthy", "No sign of collapse."
    reasons = [reason for found in signs.values() for reason in found]
    advice = [ADVICE[group] for group, found in signs.items() if found and group in ADVICE]
    return Verdict(
        level, headline, reasons + _rolled_back(series) + _summary(evidence), advice, list(evidence.values())
    )


def _names(series: Mapping[str, Series]) -> list[str]:
    levels = sorted(name for name in series if name.startswith(collapse_metric("target", "rank_share", level="")))
    return [*_TARGET, *levels, *_OTHERS]


def _level(name: str) -> str:
    return name.rpartition("_")[2]


def _evidence(name: str, series: Mapping[str, Series]) -> Evidence | None:
    steps, values = series.get(name, Series([], [])).finite()
    if not values:
        return None
    low, high = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    return Evidence(
        name, values[0], steps[0], values[low], steps[low], values[high], steps[high], values[-1], steps[-1]
    )


def _shares(evidence: Mapping[str, Evidence]) -> list[tuple[str, Evidence]]:
    """The rank share of each encoder that was measured."""
    found = [(encoder, evidence.get(collapse_metric(encoder, "rank_share"))) for encoder in ENCODERS]
    return [(encoder, share) for encoder, share in found if share]


def _broken(series: Mapping[str, Series]) -> list[str]:
    reasons = []
    for name in (TRAIN_LOSS, VAL_LOSS, *(collapse_metric(encoder, "rank_share") for encoder in ENCODERS)):
        steps, values = series.get(name, Series([], []))
        if values and not math.isfinite(values[-1]):
            last = len(list(takewhile(lambda value: not math.isfinite(value), reversed(values))))
            reasons.append(f"{name} has not been finite since step {steps[-last]}.")
    return reasons


def _collapsed_ranks(evidence: Mapping[str, Evidence]) -> list[str]:
    return [
        f"The {encoder} encoder's rank share is {number(share.now)} at step {share.now_step} "
        f"({number(share.first)} at step {share.first_step}): its features vary in little more than one direction."
        for encoder, share in _shares(evidence)
        if share.now < COLLAPSED_SHARE
    ]


def _collapsed_scales(evidence: Mapping[str, Evidence]) -> list[str]:
    return [
        f"The {encoder} encoder's centered features keep {percent(kept)} of their size at step 0: they are next to "
        "constant over images."
        for encoder in ENCODERS
        if (kept := _kept_scale(evidence, encoder)) is not None and kept < COLLAPSED_SCALE
    ]


def _low_ranks(evidence: Mapping[str, Evidence]) -> list[str]:
    reasons = [
        f"The {encoder} encoder's rank share has gone from {number(share.first)} to {number(share.now)} "
        f"({percent(share.now / share.first if share.first else 0)} of its start)."
        for encoder, share in _shares(evidence)
        if share.now >= COLLAPSED_SHARE and (share.now < LOW_SHARE or share.now < FALLEN_SHARE * share.first)
    ]
    for name, share in evidence.items():
        if "_level_" in name and share.now < COLLAPSED_SHARE:
            reasons.append(f"Level {_level(name)} of the target encoder has a rank share of {number(share.now)}.")
    return reasons


def _low_scales(evidence: Mapping[str, Evidence]) -> list[str]:
    return [
        f"The {encoder} encoder's centered features keep {percent(kept)} of their size at step 0: they differ less between "
        "images than they did."
        for encoder in ENCODERS
        if (kept := _kept_scale(evidence, encoder)) is not None and COLLAPSED_SCALE <= kept < LOW_SCALE
    ]


def _easy_targets(evidence: Mapping[str, Evidence]) -> list[str]:
    target, loss = evidence.get(TARGET_SHARE), evidence.get(TRAIN_LOSS)
    kept = _kept_scale(evidence, "target")
    rank_fell = target is not None and target.now < FALLEN_SHARE * target.first
    size_fell = kept is not None and kept < LOW_SCALE
    if loss is None or loss.now >= (1 - LOSS_FALL) * loss.first or not (rank_fell or size_fell):
        return []
    return [
        f"The loss fell from {number(loss.first)} to {number(loss.now)} while the {'rank' if rank_fell else 'size'} of the "
        "targets fell: targets with less information are easier to predict, which is how collapse begins."
    ]


def _disagreement(evidence: Mapping[str, Evidence]) -> list[str]:
    fixed, batch = evidence.get(TARGET_SHARE), evidence.get(BATCH_SHARE)
    if fixed is None or batch is None or min(fixed.now_step, batch.now_step) <= 0:
        return []
    low, high = sorted((max(fixed.now, 1e-3), max(batch.now, 1e-3)))
    if high < DISAGREEMENT * low or high < LOW_SHARE:
        return []
    return [f"Rank shares disagree: {number(fixed.now)} on the fixed images, {number(batch.now)} on training batches."]


def _falling_probe(evidence: Mapping[str, Evidence]) -> list[str]:
    probe = evidence.get(KNN)
    if probe is None:
        return []
    if probe.first_step == 0 and probe.now < probe.first - ACCURACY_NOISE:
        return [
            f"kNN accuracy is {number(probe.now)}, below the {number(probe.first)} of the random encoder at step 0."
        ]
    if probe.now < probe.highest - ACCURACY_LOSS:
        return [
            f"kNN accuracy has fallen from {number(probe.highest)} at step {probe.highest_step} to {number(probe.now)}."
        ]
    return []


def _non_finite(series: Mapping[str, Series]) -> list[str]:
    reasons = []
    for name in (TRAIN_LOSS, VAL_LOSS, GRAD_NORM):
        steps, values = series.get(name, Series([], []))
        bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if bad and math.isfinite(values[-1]):
            times = "once" if len(bad) == 1 else f"{len(bad)} times, last"
            reasons.append(f"{name} was not finite {times} at step {bad[-1]}.")
    return reasons


def _probe_gain(evidence: Mapping[str, Evidence]) -> float:
    probe = evidence.get(KNN)
    return probe.now - probe.first if probe and probe.first_step == 0 else 0.0


def _rolled_back(series: Mapping[str, Series]) -> list[str]:
    times = max(series.get(ROLLBACKS, Series([], [])).finite()[1], default=0)
    return [f"A guard has rolled the run back {int(times)} times, each with a lower learning rate."] if times else []


def _summary(evidence: Mapping[str, Evidence]) -> list[str]:
    """The main metrics in words, whatever they mean."""
    share, std, probe = (evidence.get(name) for name in (TARGET_SHARE, TARGET_STD, KNN))
    sentences = []
    if share and share.now_step > 0:
        spread = (
            f"; its features keep {percent(std.now / std.first)} of their standard deviation"
            if std and std.first
            else ""
        )
        sentences.append(
            f"The target encoder's rank share is {number(share.now)} at step {share.now_step}: {number(share.first)} at "
            f"step {share.first_step}, lowest {number(share.lowest)} at step {share.lowest_step}{spread}."
        )
    if probe and probe.now_step > probe.first_step:
        start = " (random encoder)" if probe.first_step == 0 else f" at step {probe.first_step}"
        sentences.append(
            f"kNN accuracy went from {number(probe.first)}{start} to {number(probe.now)}, best {number(probe.highest)} "
            f"at step {probe.highest_step}."
        )
    return sentences


def _kept_scale(evidence: Mapping[str, Evidence], encoder: str) -> float | None:
    """Part of the std or of the norm at step 0 that is left, whichever is less; None where neither was measured."""
    found = [evidence.get(collapse_metric(encoder, key)) for key in ("std", "norm")]
    shares = [
        each.now / each.first for each in found if each and each.first_step == 0 < each.now_step and each.first > 0
    ]
    return min(shares, default=None)
