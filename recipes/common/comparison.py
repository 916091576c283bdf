"""Variants and seeds side by side: what the linear probe found, and which readings rank them as it does."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from hjepa_engine.metrics.names import ONLINE_LINEAR

if TYPE_CHECKING:
    from hjepa_engine.visualization.curves import Curve

#: What is drawn.
DRAWN = ("val/loss", "collapse/target_rank_share", "probe/knn", "probe/online_linear")


@dataclass(frozen=True)
class Result:
    """A run that is done."""

    variant: str
    seed: int
    probe: dict[str, float]
    """Accuracies from 0 to 1: ``trained``, ``random``, ``pixels``."""
    minutes: float
    """What its iterations took together, without validation and probes."""
    curves: dict[str, Curve]
    """Steps and values of each metric, where they are finite."""

    @property
    def readings(self) -> dict[str, float]:
        """The last value of each metric that needs no labels, by its name."""
        return {name: values[-1] for name, (_, values) in self.curves.items() if values and needs_no_labels(name)}


def read_result(folder: Path, variant: str, seed: int) -> Result | None:
    """The result of a run; None where it is not done."""
    from hjepa_engine.report.reading import read_run  # torch is imported here: --help does without

    if not (folder / "status.json").is_file():
        return None
    run = read_run(folder)
    if run.state != "done" or "trained" not in run.probe:
        return None
    curves: dict[str, Curve] = {name: series.finite() for name, series in run.series.items()}
    micro_batches = run.config.training.accumulation_steps if run.config else 1
    minutes = micro_batches * minutes_of(*curves.get("train/iteration_ms", ((), ())))
    return Result(variant, seed, run.probe, minutes, curves)


def minutes_of(steps: Sequence[int], iteration_ms: Sequence[float]) -> float:
    """Minutes of one iteration in each step, of means over log intervals that end at ``steps``. Pauses do not count.

    >>> minutes_of([50, 100], [600.0, 1200.0])
    1.5
    """
    return sum((end - start) * ms for start, end, ms in zip((0, *steps), steps, iteration_ms, strict=False)) / 60e3


def needs_no_labels(name: str) -> bool:
    """Whether a metric could choose among runs without labels.

    >>> needs_no_labels("val/loss"), needs_no_labels("collapse/target_rank"), needs_no_labels("probe/knn")
    (True, True, False)
    """
    return name.endswith("/loss") or bool(re.fullmatch(r"collapse/(context|target)_[a-z_]+", name))


def table(results: Sequence[Result], seeds: Sequence[int]) -> str:
    """Markdown: the linear probe of each variant, and how it differs from the first one's with the same seed.

    Args:
        results: of one or more runs.
        seeds: those that were asked for; one without a result is a dash.
    """
    variants = list(dict.fromkeys(result.variant for result in results))
    trained = {(result.variant, result.seed): 100 * result.probe["trained"] for result in results}
    which = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    rows = [f"| variant | linear probe | {which} | from `{variants[0]}` | random encoder | minutes |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    for variant in variants:
        own = [result for result in results if result.variant == variant]
        values, first = ([trained.get((name, seed)) for seed in seeds] for name in (variant, variants[0]))
        found = [value for value in values if value is not None]
        spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
        each = ", ".join("-" if value is None else f"{value:.1f}" for value in values)
        changes = ", ".join(
            "-" if one is None or value is None else f"{value - one:+.1f}"
            for value, one in zip(values, first, strict=True)
        )
        random, minutes = mean(100 * result.probe["random"] for result in own), mean(result.minutes for result in own)
        rows.append(
            f"| {variant} | {mean(found):.1f}{spread} | {each} | {'' if variant == variants[0] else changes} "
            f"| {random:.1f} | {minutes:.1f} |"
        )
    return "\n".join(rows)


def rank_correlations(results: Sequence[Result]) -> dict[str, float]:
    """Spearman's rank correlation of each reading with the probe over all runs that have it, the strongest first."""
    found = {}
    for name in sorted({name for result in results for name in result.readings}):
        own = [result for result in results if name in result.readings]
        value = spearman([run.readings[name] for run in own], [run.probe["trained"] for run in own])
        if value is not None:
            found[name] = value
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def correlation_within(results: Sequence[Result], name: str) -> float | None:
    """Spearman's rank correlation of a reading with the online linear probe in the course of a run.

    Step 0 is left out: there is no checkpoint of it to choose.

    Returns:
        The mean over the runs that have both; None where none has.
    """
    found = []
    for result in results:
        steps, values = result.curves.get(name, ((), ()))
        pairs = [
            (values[number - 1], accuracy)
            for step, accuracy in zip(*result.curves.get(ONLINE_LINEAR, ((), ())), strict=True)
            if step and (number := bisect_right(steps, step))  # readings up to there
        ]
        if (value := spearman([pair[0] for pair in pairs], [pair[1] for pair in pairs])) is not None:
            found.append(value)
    return mean(found) if found else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None of fewer than three pairs, or where one side is constant."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # scikit-learn brings it

    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)


def correlation_table(results: Sequence[Result]) -> list[str]:
    """Markdown: a heading and the table of rank correlations; nothing where there are none."""
    if not (among := rank_correlations(results)):
        return []
    rows = ["| reading | among runs | within a run |", "| --- | --- | --- |"]
    for name, value in among.items():
        within = correlation_within(results, name)
        rows.append(f"| `{name}` | {value:+.2f} | {'' if within is None else f'{within:+.2f}'} |")
    return [f"Rank correlation with the probe, among {len(results)} runs and in the course of each:", "\n".join(rows)]


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the curves of all runs."""
    from hjepa_engine.visualization.curves import draw_runs
    from hjepa_engine.visualization.drawing import save

    variants = dict.fromkeys(result.variant for result in results)
    save(draw_runs({name: [run.curves for run in results if run.variant == name] for name in variants}, DRAWN), path)
