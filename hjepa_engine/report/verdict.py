"""Is the representation collapsing? The answer in words, from the logged figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from hjepa_engine.report.markup import number
from hjepa_engine.report.reading import Series

Level = Literal["healthy", "watch", "collapsed", "broken", "cannot tell"]

#: Rank share (0 to 1) under which an encoder counts as collapsed: 1 + 0.02 (D - 1) directions tell images apart.
COLLAPSED_SHARE = 0.02
#: Rank share that is worth a look: few directions, though some encoders live with them.
LOW_SHARE = 0.05
#: What of its value at step 0 the rank share may fall to: healthy runs of the default configuration keep about half.
FALLEN_SHARE = 0.3
#: Features whose std or norm is so small a part of that at step 0 are next to constants, whatever the shape of their
#: spectrum: with momentum 0, runs on digit pages and CIFAR-10 kept 0.12 and 0.16, healthy ones 0.7 or more.
COLLAPSED_SCALE = 0.2
#: The same, worth a look: a run that came back from there kept 0.43.
LOW_SCALE = 0.5
#: Ratio between the rank shares on the fixed images and on training batches from which they disagree: one is wrong.
DISAGREEMENT = 3.0
#: A change of accuracy that is more than the noise of two readings of a probe on 1000 images.
ACCURACY_NOISE = 0.05
#: What an accuracy may lose of its best, which is the luckiest of many readings: healthy runs of the default lose 0.05.
ACCURACY_LOSS = 0.1
#: A loss that fell by this part counts as falling.
LOSS_FALL = 0.1

RULES = (
    f"Collapsed: the rank share of an encoder is below {COLLAPSED_SHARE}, or the size (standard deviation or norm) of its "
    f"centered features below {COLLAPSED_SCALE} of that at step 0. Watch: a rank share below {LOW_SHARE} or below "
    f"{FALLEN_SHARE} of that at step 0, a level below {COLLAPSED_SHARE}, a size below {LOW_SCALE} of that at step 0, fixed "
    f"images and training batches that disagree by a factor of {DISAGREEMENT:g}, a kNN accuracy {ACCURACY_NOISE} below the "
    f"random encoder's or {ACCURACY_LOSS} below its own best, values that were not finite, a collapsed rank share while the "
    f"kNN accuracy is {ACCURACY_NOISE} above the random encoder's. Broken: the newest loss or reading is not finite. "
    "Cannot tell: no reading after step 0."
)

NAMES = {
    "collapse/target_rank_share": "target rank share",
    "collapse/target_std": "target std",
    "collapse/target_norm": "target norm",
    "collapse/context_rank_share": "context rank share",
    "collapse/context_std": "context std",
    "collapse/batch_target_rank_share": "target rank share in training",
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "probe/knn": "kNN accuracy",
    "probe/online_linear": "online linear accuracy",
}


@dataclass(frozen=True)
class Evidence:
    """A metric from its first to its newest finite value."""

    name: str
    first: float
    first_step: int
    lowest: float
    lowest_step: int
    highest: float
    highest_step: int
    now: float
    now_step: int


@dataclass(frozen=True)
class Verdict:
    """The answer, why, and the figures that it rests on."""

    level: Level
    headline: str
    reasons: list[str]
    evidence: list[Evidence]


def assess(series: Mapping[str, Series]) -> Verdict:
    """Judge a run by what it has logged; :data:`RULES` are the rules, the constants above the thresholds.

    A low rank with a kNN probe clearly above the random encoder's is worth watching, not collapsed: some directions that
    matter are left. Features are centered at each place of the map, so that tokens which tell places apart and not images
    count as collapsed.

    Args:
        series: all metrics of the run by name.
    """
    evidence = {name: found for name in _names(series) if (found := _evidence(name, series))}
    broken, collapsed = _broken(series), _collapsed(evidence)
    notes = _signs(evidence) + _non_finite(series)
    gain = _probe_gain(evidence)
    target = evidence.get("collapse/target_rank_share")
    if broken:
        level, headline, reasons = "broken", "Values are not finite.", broken + collapsed
    elif collapsed and gain > ACCURACY_NOISE and not any("constant" in reason for reason in collapsed):
        level, headline = "watch", "The rank is very low, though the kNN probe still beats a random encoder."
        reasons = collapsed + notes
    elif collapsed:
        level, headline, reasons = "collapsed", "The representation has collapsed.", collapsed + notes
    elif target is None or target.now_step <= 0:
        level, headline = "cannot tell", "There is no reading of the target encoder after step 0."
        reasons = ["Readings need collapse.enabled and a run of some steps.", *notes]
    elif notes:
        level, headline, reasons = "watch", "Not collapsed, but not all is as it should be.", notes
    else:
        level, headline, reasons = "healthy", "No sign of collapse.", []
    summary = _rolled_back(series) + _summary(evidence)
    return Verdict(level, headline, [*reasons, *summary], list(evidence.values()))  # type: ignore[arg-type]


def _names(series: Mapping[str, Series]) -> list[str]:
    levels = sorted(name for name in series if name.startswith("collapse/target_rank_share_level_"))
    names = list(NAMES)
    return [*names[:3], *levels, *names[3:]]


def title_of(name: str) -> str:
    """A metric of the verdict in words."""
    return NAMES.get(name) or f"target rank share, level {name.rpartition('_')[2]}"


def _evidence(name: str, series: Mapping[str, Series]) -> Evidence | None:
    steps, values = series.get(name, Series([], [])).finite()
    if not values:
        return None
    low, high = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    return Evidence(
        name, values[0], steps[0], values[low], steps[low], values[high], steps[high], values[-1], steps[-1]
    )


def _broken(series: Mapping[str, Series]) -> list[str]:
    reasons = []
    for name in ("train/loss", "val/loss", "collapse/target_rank_share", "collapse/context_rank_share"):
        steps, values = series.get(name, Series([], []))
        if values and not math.isfinite(values[-1]):
            last = len(list(takewhile(lambda value: not math.isfinite(value), reversed(values))))
            reasons.append(f"{name} has not been finite since step {steps[-last]}.")
    return reasons


def _collapsed(evidence: Mapping[str, Evidence]) -> list[str]:
    reasons = []
    for encoder in ("target", "context"):
        share = evidence.get(f"collapse/{encoder}_rank_share")
        if share and share.now < COLLAPSED_SHARE:
            reasons.append(
                f"The {encoder} encoder's rank share is {number(share.now)} at step {share.now_step} "
                f"({number(share.first)} at step {share.first_step}): next to nothing but one direction is left."
            )
        if (kept := _kept_scale(evidence, encoder)) is not None and kept < COLLAPSED_SCALE:
            reasons.append(
                f"The {encoder} encoder's centered features keep {_percent(kept)} of their size at step 0: they are next to "
                "constant over images."
            )
    return reasons


def _signs(evidence: Mapping[str, Evidence]) -> list[str]:
    return [
        *_low_ranks(evidence),
        *_low_scales(evidence),
        *_easy_targets(evidence),
        *_disagreement(evidence),
        *_falling_probe(evidence),
    ]


def _low_ranks(evidence: Mapping[str, Evidence]) -> list[str]:
    reasons = []
    for encoder in ("target", "context"):
        share = evidence.get(f"collapse/{encoder}_rank_share")
        if share is None or share.now < COLLAPSED_SHARE:
            continue
        if share.now < LOW_SHARE or share.now < FALLEN_SHARE * share.first:
            reasons.append(
                f"The {encoder} encoder's rank share has gone from {number(share.first)} to {number(share.now)} "
                f"({_percent(share.now / share.first if share.first else 0)} of its start)."
            )
    for name, share in evidence.items():
        if "_level_" in name and share.now < COLLAPSED_SHARE:
            reasons.append(f"Level {name.rpartition('_')[2]} of the target has a rank share of {number(share.now)}.")
    return reasons


def _easy_targets(evidence: Mapping[str, Evidence]) -> list[str]:
    target, loss = evidence.get("collapse/target_rank_share"), evidence.get("train/loss")
    kept = _kept_scale(evidence, "target")
    rank_fell = target is not None and target.now < FALLEN_SHARE * target.first
    size_fell = kept is not None and kept < LOW_SCALE
    if loss is None or loss.now >= (1 - LOSS_FALL) * loss.first or not (rank_fell or size_fell):
        return []
    return [
        f"The loss fell from {number(loss.first)} to {number(loss.now)} while the {'rank' if rank_fell else 'size'} fell: "
        "targets get easier to predict by saying less, which is how collapse begins."
    ]


def _low_scales(evidence: Mapping[str, Evidence]) -> list[str]:
    reasons = []
    for encoder in ("target", "context"):
        kept = _kept_scale(evidence, encoder)
        if kept is not None and COLLAPSED_SCALE <= kept < LOW_SCALE:
            reasons.append(
                f"The {encoder} encoder's centered features keep {_percent(kept)} of their size at step 0: images differ "
                "less than they did."
            )
    return reasons


def _disagreement(evidence: Mapping[str, Evidence]) -> list[str]:
    fixed, batch = (evidence.get(f"collapse/{name}_rank_share") for name in ("target", "batch_target"))
    if fixed is None or batch is None or min(fixed.now_step, batch.now_step) <= 0:
        return []
    low, high = sorted((max(fixed.now, 1e-3), max(batch.now, 1e-3)))
    if high < DISAGREEMENT * low or high < LOW_SHARE:
        return []
    return [f"Rank shares disagree: {number(fixed.now)} on the fixed images, {number(batch.now)} on training batches."]


def _falling_probe(evidence: Mapping[str, Evidence]) -> list[str]:
    probe, reasons = evidence.get("probe/knn"), []
    if probe is None:
        return []
    if probe.first_step == 0 and probe.now < probe.first - ACCURACY_NOISE:
        reasons.append(
            f"kNN accuracy is {number(probe.now)}, below the {number(probe.first)} of the random encoder at step 0."
        )
    elif probe.now < probe.highest - ACCURACY_LOSS:
        reasons.append(
            f"kNN accuracy has fallen from {number(probe.highest)} at step {probe.highest_step} to {number(probe.now)}: "
            "take an earlier checkpoint."
        )
    return reasons


def _non_finite(series: Mapping[str, Series]) -> list[str]:
    reasons = []
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        steps, values = series.get(name, Series([], []))
        bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if bad and math.isfinite(values[-1]):
            times = "once" if len(bad) == 1 else f"{len(bad)} times, last"
            reasons.append(f"{name} was not finite {times} at step {bad[-1]}.")
    return reasons


def _probe_gain(evidence: Mapping[str, Evidence]) -> float:
    probe = evidence.get("probe/knn")
    return probe.now - probe.first if probe and probe.first_step == 0 else 0.0


def _rolled_back(series: Mapping[str, Series]) -> list[str]:
    times = max(series.get("train/rollbacks", Series([], [])).finite()[1], default=0)
    return [f"A guard has rolled the run back {int(times)} times, each with a lower learning rate."] if times else []


def _summary(evidence: Mapping[str, Evidence]) -> list[str]:
    """What the figures are, whatever they mean."""
    share, std, probe = (evidence.get(n) for n in ("collapse/target_rank_share", "collapse/target_std", "probe/knn"))
    sentences = []
    if share and share.now_step > 0:
        spread = (
            f"; its features keep {_percent(std.now / std.first)} of their standard deviation"
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
    """What is left of the std or of the norm at step 0, whichever is less; None where that was not measured."""
    readings = [evidence.get(f"collapse/{encoder}_{key}") for key in ("std", "norm")]
    shares = [
        each.now / each.first for each in readings if each and each.first_step == 0 < each.now_step and each.first > 0
    ]
    return min(shares, default=None)


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.01 else f"{100 * part:.2g} %"
