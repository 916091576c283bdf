"""Train variants of a configuration over several seeds, and tabulate what each of them reaches.

    python recipes/ablation.py FILE --output DIR [--jobs 2] [--KEY VALUE ...]

FILE is YAML: ``base``, the path of a configuration, ``seeds``, a list, and ``variants``, configuration keys and values by
the name of each variant. They override keys of the command line, which are for all variants. Runs are run folders,
DIR/NAME_SEED; --jobs of them train at once, each in a process with its share of the cores. The same command goes on with
those that are not done; a failed one is named, and the others go on. A run that is there with another configuration is
refused: give another DIR. (One that is only to be longer goes on.)
DIR/ablation.md has the tables: the linear probe after each run, and how the readings that need no labels rank the runs;
DIR/ablation.png the curves of all runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from hjepa_engine.config import load_config, paths
from hjepa_engine.config.overrides import apply_overrides, overridden_keys
from hjepa_engine.config.parsing import dump_yaml, parse_yaml
from hjepa_engine.errors import ConfigError, RunError
from hjepa_engine.metrics.names import ONLINE_LINEAR
from hjepa_engine.run.cli import command_parser, run_command

if TYPE_CHECKING:
    from hjepa_engine.visualization.curves import Curve

#: What is drawn.
DRAWN = ("val/loss", "collapse/target_rank_share", "probe/knn", "probe/online_linear")


#: Keys that a command line cannot have for all runs, and why.
_NOT_GIVEN = {
    "seed": "seeds are those of FILE",
    "run_dir": "run folders lie in --output",
    "checkpoint.checkpoint_dir": "each run has a folder of its own",
    "checkpoint.resume": "the same command goes on with its runs",
    "probe.enabled": "the tables are of the probe",
}


class Plan(NamedTuple):
    """What is trained."""

    base: Path
    seeds: list[int]
    variants: dict[str, dict[str, Any]]
    """Configuration keys (``model.levels``) and values, by name."""
    overrides: list[str]
    """Keys and values of the command line, for all of them."""

    def arguments(self, variant: str) -> list[str]:
        """The command line of a variant."""
        return [*self.overrides, *overrides(self.variants[variant])]


@dataclass(frozen=True)
class Result:
    """A run that is done."""

    variant: str
    seed: int
    probe: dict[str, float]
    """Accuracies from 0 to 1: ``trained``, ``random``, ``pixels``."""
    minutes: float
    curves: dict[str, Curve]
    """Steps and values of each metric, where they are finite."""

    @property
    def readings(self) -> dict[str, float]:
        """The last value of each metric that needs no labels, by its name."""
        return {name: values[-1] for name, (_, values) in self.curves.items() if values and needs_no_labels(name)}


def read_plan(path: Path, given: Sequence[str] = ()) -> Plan:
    """Read FILE, and check the configuration of every variant.

    Args:
        path: FILE.
        given: keys and values of the command line.

    Raises:
        ConfigError: one line that says what is wrong.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    kinds = {"base": str, "seeds": list, "variants": dict}
    if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != kinds:
        raise ConfigError(f"{path} must have base (a path), seeds (a list), variants (a mapping) and nothing else")
    apply_overrides({}, given)  # what is wrong with these alone is not a variant's
    if refused := [key for key in overridden_keys(given) if key in _NOT_GIVEN]:
        raise ConfigError(f"--{refused[0]} must not be given: {_NOT_GIVEN[refused[0]]}")
    plan = Plan(path.parent / data["base"], data["seeds"], data["variants"], list(given))
    if not plan.seeds or not all(type(seed) is int and seed >= 0 for seed in plan.seeds):
        raise ConfigError(f"{path}: seeds must be integers of at least 0, got {plan.seeds}")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise ConfigError(f"{path}: seeds must be different ones, got {plan.seeds}")
    if not plan.base.is_file():
        raise ConfigError(f"{path}: base must be a configuration beside it, there is no {plan.base}")
    for name, keys in plan.variants.items():
        if not re.fullmatch(r"[\w.+-]+", str(name)) or not isinstance(keys, dict):
            raise ConfigError(f"{path}: variants must map names of letters, digits, . + - _ to mappings, see {name!r}")
        try:
            load_config(plan.base, plan.arguments(name))
        except ConfigError as error:
            raise ConfigError(f"{path}: variant {name}: {error}") from error
    return plan


def overrides(keys: Mapping[str, Any]) -> list[str]:
    """Keys and values as a command line.

    >>> overrides({"model.levels": [{"pool": 1}], "training.lr": 0.002})
    ['--model.levels=[{pool: 1}]', '--training.lr=0.002']
    """
    return [f"--{key}={dump_yaml(value, flow=True)}" for key, value in keys.items()]


def train(plan: Plan, folder: Path, jobs: int) -> list[Result]:
    """Train what is not done yet, ``jobs`` runs at once; results in the order of the variants.

    Runs that go on are told to save and leave (exit code 75) where this program is interrupted.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    # Seed by seed: a first comparison of all variants is there early.
    waiting = [(variant, seed) for seed in plan.seeds for variant in plan.variants]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    results = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                variant, seed = task = waiting.pop(0)
                # A run that is done ends at once; one that was done with another configuration is refused.
                command = [sys.executable, "-m", "hjepa_engine.recipes.pretrain", "--config", str(plan.base)]
                command += [*plan.arguments(variant), f"--seed={seed}", f"--run_dir={folder / name_of(task)}"]
                with (folder / f"{name_of(task)}.log").open("a", encoding="utf-8") as log:
                    running[task] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            time.sleep(0.1)
            for task, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[task]
                found = read_result(folder / name_of(task), *task) if code == 0 else None
                said = (
                    f"{100 * found.probe['trained']:.1f} %" if found else f"exit code {code}, see {name_of(task)}.log"
                )
                print(f"{name_of(task)}: {said}", flush=True)
                results += [found] if found else []
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return sorted(
        results, key=lambda result: (list(plan.variants).index(result.variant), plan.seeds.index(result.seed))
    )


def name_of(task: tuple[str, int]) -> str:
    """The folder of a run."""
    return "_".join(map(str, task))


def read_result(folder: Path, variant: str, seed: int) -> Result | None:
    """The result of a run; None where it is not done."""
    from hjepa_engine.report.reading import read_run  # torch is imported here: --help does without

    if not (folder / "status.json").is_file():
        return None
    run = read_run(folder)
    if run.state != "done" or "trained" not in run.probe:
        return None
    start, end = run.times or (0.0, 0.0)
    curves: dict[str, Curve] = {name: series.finite() for name, series in run.series.items()}
    return Result(variant, seed, run.probe, (end - start) / 60, curves)


def needs_no_labels(name: str) -> bool:
    """Whether a metric could choose among runs without labels.

    >>> needs_no_labels("val/loss"), needs_no_labels("collapse/target_rank"), needs_no_labels("probe/knn")
    (True, True, False)
    """
    return name.endswith("/loss") or bool(re.fullmatch(r"collapse/(context|target)_[a-z_]+", name))


def table(results: Sequence[Result]) -> str:
    """Markdown: the linear probe of each variant."""
    rows = ["| variant | linear probe | each seed | random encoder | minutes |", "| --- | --- | --- | --- | --- |"]
    for variant in dict.fromkeys(result.variant for result in results):
        own = [result for result in results if result.variant == variant]
        trained = [100 * result.probe["trained"] for result in own]
        spread = f" ± {stdev(trained):.1f}" if len(trained) > 1 else ""
        each = ", ".join(f"{value:.1f}" for value in trained)
        random = mean(100 * result.probe["random"] for result in own)
        minutes = mean(result.minutes for result in own)
        rows.append(f"| {variant} | {mean(trained):.1f}{spread} | {each} | {random:.1f} | {minutes:.1f} |")
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
    """The same in the course of a run, with the online linear probe: mean of the runs that have both readings, or None.

    Step 0 is left out: there is no checkpoint of it to choose.
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


def main(argv: Sequence[str]) -> None:
    """Train, then write and print the tables."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("file", type=paths.path_argument, metavar="FILE", help="base, seeds and variants")
    parser.add_argument("--output", type=paths.path_argument, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs that train at once (1)")
    parser.usage = "%(prog)s [options] FILE --output DIR [--KEY VALUE ...]"
    known, given = parser.parse_known_args(argv)
    if known.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {known.jobs}")
    plan = read_plan(known.file, given)
    try:
        known.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {known.output} cannot be made: {error.strerror}") from error
    results = train(plan, known.output, known.jobs)
    if not results:
        raise RunError("no run came to its end")
    given_line = " ".join(f"`{word}`" for word in (known.file.name, *given))
    text = "\n\n".join([given_line, table(results), *correlation_table(results)]) + "\n"
    (known.output / "ablation.md").write_text(text, encoding="utf-8")
    draw(results, known.output / "ablation.png")
    print(f"\n{text}\n{known.output / 'ablation.md'}")
    missing = len(plan.seeds) * len(plan.variants) - len(results)
    if missing:
        raise RunError(f"{missing} runs did not come to their end")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
