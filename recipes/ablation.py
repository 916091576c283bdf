"""Train variants of a configuration over several seeds, and tabulate what each of them reaches.

    python recipes/ablation.py FILE --output DIR [--variants NAME ...] [--seeds 0 1 2] [--jobs 2] [--KEY VALUE ...]

FILE is YAML: ``base``, the path of a configuration, ``seeds``, a list, and ``variants``, configuration keys and values by
the name of each variant. They override keys of the command line, which are for all variants. --variants chooses among
them, --seeds takes the place of the file's. Runs are run folders, DIR/NAME_SEED; --jobs of them train at once, each in a
process with its share of the cores. The same command goes on with those that are not done; a failed one is named, and the
others go on. A run that is there with another configuration is refused: give another DIR. (One that is only to be longer
goes on; where only keys of ``probe`` differ, the probe at its end is measured again.)
DIR/ablation.md has the tables of what was asked for: the linear probe after each run, and how the readings that need no
labels rank the runs; DIR/ablation.png the curves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hjepa_engine.config import load_config, paths
from hjepa_engine.config.changes import config_changes
from hjepa_engine.config.describe import format_value
from hjepa_engine.config.overrides import apply_overrides, overridden_keys
from hjepa_engine.config.parsing import dump_yaml, parse_yaml
from hjepa_engine.errors import ConfigError, RunError
from hjepa_engine.recipes.common.comparison import Result, correlation_table, draw, read_result, table
from hjepa_engine.run.cli import command_parser, run_command

#: Keys that neither a variant nor a command line can have, and why.
_NOT_GIVEN = {"seed": "seeds are those of FILE, or of --seeds", "run_dir": "run folders lie in --output"}
#: Keys that have their default value in all runs, and why.
_AS_IT_IS = {
    "checkpoint.checkpoint_dir": "each run has a folder of its own",
    "checkpoint.resume": "the same command goes on with its runs",
    "probe.enabled": "the tables are of the probe",
}
#: A run that was done with others of these is not measured again: its curves are of those.
_READINGS = ("online_probe.", "collapse.")


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


def read_plan(
    path: Path, given: Sequence[str] = (), variants: Sequence[str] | None = None, seeds: list[int] | None = None
) -> Plan:
    """Read FILE, and check the configuration of every variant that is asked for.

    Args:
        path: FILE.
        given: keys and values of the command line.
        variants: names of those that are asked for, in this order; None: all.
        seeds: in place of those of FILE; None: those.

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
    named = {str(name): keys for name, keys in data["variants"].items()}
    if unknown := [name for name in variants or () if name not in named]:
        raise ConfigError(f"--variants must be some of {', '.join(named)}, got {unknown[0]}")
    chosen = {name: named[name] for name in (named if variants is None else variants)}
    plan = Plan(path.parent / data["base"], data["seeds"] if seeds is None else seeds, chosen, list(given))
    whose = f"{path}: seeds" if seeds is None else "--seeds"
    if not plan.seeds or not all(type(seed) is int and seed >= 0 for seed in plan.seeds):
        raise ConfigError(f"{whose} must be integers of at least 0, got {plan.seeds}")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise ConfigError(f"{whose} must be different ones, got {plan.seeds}")
    if not plan.base.is_file():
        raise ConfigError(f"{path}: base must be a configuration beside it, there is no {plan.base}")
    for name, keys in plan.variants.items():
        if not re.fullmatch(r"[\w.+-]+", name) or not isinstance(keys, dict):
            raise ConfigError(f"{path}: variants must map names of letters, digits, . + - _ to mappings, see {name!r}")
        try:
            _check(plan, name)
        except ConfigError as error:
            raise ConfigError(f"{path}: variant {name}: {error}") from error
    return plan


def _check(plan: Plan, variant: str) -> None:
    arguments = plan.arguments(variant)
    for key in overridden_keys(arguments):
        if key in _NOT_GIVEN:
            raise ConfigError(f"{key} must not be given: {_NOT_GIVEN[key]}")
    for key, usual, value in config_changes({}, load_config(plan.base, arguments)):
        if key in _AS_IT_IS:
            raise ConfigError(f"{key} must be {format_value(usual)}, got {format_value(value)}: {_AS_IT_IS[key]}")


def refuse_other_readings(plan: Plan, folder: Path) -> None:
    """Refuse runs that are done and were measured otherwise on their way.

    Args:
        plan: what is asked for.
        folder: of the runs.

    Raises:
        ConfigError: there is one.
    """
    from hjepa_engine.run.folder import RunFolder  # torch is imported here: --help does without

    for variant in plan.variants:
        config = load_config(plan.base, plan.arguments(variant))
        for seed in plan.seeds:
            path = folder / name_of((variant, seed))
            run = RunFolder(replace(config, run_dir=str(path)))
            if (run.status() or {}).get("state") != "done":
                continue
            if other := [change for change in run.changes() if change.key.startswith(_READINGS)]:
                raise ConfigError(f"{path} was trained with other readings: {other[0]}; choose another --output")


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


def main(argv: Sequence[str]) -> None:
    """Train, then write and print the tables."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("file", type=paths.path_argument, metavar="FILE", help="base, seeds and variants")
    parser.add_argument("--output", type=paths.path_argument, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="those to train (all)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="in place of the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs that train at once (1)")
    parser.usage = "%(prog)s [options] FILE --output DIR [--KEY VALUE ...]"
    known, given = parser.parse_known_args(argv)
    if known.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {known.jobs}")
    plan = read_plan(known.file, given, known.variants, known.seeds)
    try:
        known.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {known.output} cannot be made: {error.strerror}") from error
    refuse_other_readings(plan, known.output)
    results = train(plan, known.output, known.jobs)
    if not results:
        raise RunError("no run came to its end")
    given_line = " ".join(f"`{word}`" for word in (known.file.name, *given))
    text = "\n\n".join([given_line, table(results, plan.seeds), *correlation_table(results)]) + "\n"
    (known.output / "ablation.md").write_text(text, encoding="utf-8")
    draw(results, known.output / "ablation.png")
    print(f"\n{text}\n{known.output / 'ablation.md'}")
    missing = len(plan.seeds) * len(plan.variants) - len(results)
    if missing:
        raise RunError(f"{missing} runs did not come to their end")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
