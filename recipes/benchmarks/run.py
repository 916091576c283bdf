"""Measure pretraining as a whole: images per second, where a step's time goes, share of the matrix rate, memory.

    python recipes/benchmarks/run.py                              # the default run and a small model, some minutes
    python recipes/benchmarks/run.py --sizes small ViT-S/16 --compile --output small.json
    python recipes/benchmarks/run.py --compare small.json         # the same sizes and variants, beside earlier figures
    python recipes/benchmarks/run.py --growth --seconds 1         # what cost grows with
    python recipes/benchmarks/run.py --steady 2000                # resident memory over the default run

``--cpu-time`` measures processor time, for a machine that others use too. Variants of a size take turns in one process. If a
batch does not fit into memory, its half is tried; what does not fit at all is skipped. Written are OUTPUT (JSON), and a
table (.md) and a plot (.png) beside it; docs/performance.md says what its columns are.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.recipes.benchmarks.memory import (
    KeptActivations,
    fitting_batch,
    free_megabytes,
    memory_of,
    needed,
    resident_over,
)
from hjepa_engine.recipes.benchmarks.parts import (
    collapse_reading,
    overhead,
    save_stall,
    time_masks,
    update_costs,
)
from hjepa_engine.recipes.benchmarks.products import MatrixProducts, peak_rate
from hjepa_engine.recipes.benchmarks.sizes import GROWTH, SIZES, VARIANTS, Iterations, iterate, make

ROUNDS = 3
Results = dict[str, dict[str, dict[str, Any]]]
#: Columns of the two tables: where it is in the results, and its format.
SPEED = {
    "images/s": ("images_per_s", ".1f"),
    "ms": ("iteration_ms", ".1f"),
    "forward": ("forward_ms", ".1f"),
    "backward": ("backward_ms", ".1f"),
    "update": ("update_ms", ".1f"),
    "data": ("data_ms", ".2f"),
    "matrix share": ("matrix_share", ".0%"),
    "GFLOP/s": ("gflop_per_s", ".0f"),
    "MFU": ("mfu", ".0%"),
}
PARTS = {
    "bare loop, ms": ("bare_ms", ".1f"),
    "engine adds": ("overhead_ms", ".2f"),
    "masks": ("masks_ms", ".2f"),
    "waited": ("masks_waited_ms", ".2f"),
    "EMA": ("ema_ms", ".2f"),
    "optimizer": ("optimizer_ms", ".2f"),
    "save": ("save_ms", ".1f"),
    "reading, s": ("reading_s", ".2f"),
}
MEMORY = {
    "batch": ("batch_size", "d"),
    "weights": ("weights_mb", ".0f"),
    "target": ("target_mb", ".0f"),
    "gradients": ("gradients_mb", ".0f"),
    "moments": ("moments_mb", ".0f"),
    "activations": ("activations_mb", ".0f"),
    "needed MB": ("needed_mb", ".0f"),
    "tensors": ("tensors_mb", ".0f"),
    "peak": ("peak_mb", ".0f"),
    "process before": ("process_mb", ".0f"),
}


def measure(
    size: str, variants: dict[str, list[str]], folder: str, given: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Figures of each variant of a size, in turns."""
    clock = time.process_time if given.cpu_time else time.perf_counter
    compiled = f"--training.compile={str(given.compile).lower()}"
    runs = {
        name: make(size, [*options, compiled], f"{folder}/{name}", given.cpu_time) for name, options in variants.items()
    }
    samplers = {name: time_masks(run) for name, run in runs.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    each: dict[str, float] = {}
    for name, run in runs.items():
        if not given.compile:  # a compiled step does not show its products
            with MatrixProducts() as products:
                run.trainer.run(run.data, max_iters=1)
            peak = peak_rate(run.trainer.device, run.trainer.amp_dtype or torch.float32, clock)
            found[name] = {"matrix_s": products.seconds(clock), "gflop": products.flops / 1e9}
            found[name] |= {"peak_gflop_per_s": peak.flop_per_s / 1e9, "peak_source": peak.source}
        each[name] = iterate(run, 1, clock).mean  # compilers and allocators are warm then
        each[name] = iterate(run, 1, clock).mean
        samplers[name].times.clear()
    times: dict[str, list[Iterations]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(iterate(run, max(2, round(given.seconds / ROUNDS / each[name])), clock))
    for name, run in runs.items():
        result, metrics = found[name], run.trainer.state.metrics
        seconds, _, waited = (statistics.median(column) for column in zip(*times[name], strict=True))
        result |= {"images_per_s": run.config.data.batch_size / seconds, "iteration_ms": 1e3 * seconds}
        result |= {part: metrics[f"train/{part}"] for part in ("forward_ms", "backward_ms", "update_ms")}
        result |= {"data_ms": 1e3 * waited, "masks_waited_ms": 1e3 * statistics.median(samplers[name].times)}
        if "matrix_s" in result:
            result["matrix_share"] = result.pop("matrix_s") / seconds
            result["gflop_per_s"] = result["gflop"] / seconds
            result["mfu"] = result["gflop_per_s"] / result["peak_gflop_per_s"]
        result |= update_costs(run, clock) | {"save_ms": save_stall(run)}
        if given.readings:
            result["reading_s"] = collapse_reading(run, clock)
        result |= overhead(run, given.seconds, each[name], clock)
        run.preemption.close()
    return found


def grow(names: list[str], folder: str, seconds: float, clock: Callable[[], float]) -> Results:
    """Cost of the small size, in float32 and batches of 16, by what it grows with."""
    results: Results = {}
    for what in names or GROWTH:
        results[what] = {}
        for value, options in GROWTH[what].items():
            run = make("small", [*VARIANTS["fp32"], "--data.batch_size=16", *options], f"{folder}/{what}{value}")
            with KeptActivations(run) as kept:
                each = iterate(run, 1, clock).mean
            each = min(iterate(run, max(1, round(seconds / each)), clock).mean for _ in range(2))
            figures = needed(run, kept.megabytes) | {"iteration_ms": 1e3 * each}
            results[what][value] = figures | {"images_per_s": run.config.data.batch_size / each}
            run.preemption.close()
            run.data.close()
            print(f"{what} {value}: {1e3 * each:.0f} ms, {figures['needed_mb']:.0f} MB needed", flush=True)
    return results


def markdown(results: Results, columns: dict[str, tuple[str, str]], heads: str, earlier: Results) -> str:
    """One row for each size and variant; columns that are empty everywhere are left out.

    >>> print(markdown({"a": {"b": {"iteration_ms": 2.04}}}, SPEED, "size | variant", {}))
    | size | variant | ms |
    | --- | --- | --- |
    | a | b | 2.0 |
    """
    rows = [(size, variant, found) for size, group in results.items() for variant, found in group.items()]
    columns = {name: (key, form) for name, (key, form) in columns.items() if any(key in found for *_, found in rows)}
    if not columns:
        return ""
    names = [*heads.split(" | "), *columns, *(["earlier images/s", "ratio"] if earlier else [])]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for size, variant, found in rows:
        cells = [format(found[key], form) if key in found else "" for key, form in columns.values()]
        if earlier:
            before = earlier.get(size, {}).get(variant, {}).get("images_per_s")
            cells += [f"{before:.1f}", f"{found['images_per_s'] / before:.2f}"] if before else ["", ""]
        lines.append(f"| {size} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Images per second of each row over that of its group's first one."""
    from matplotlib.figure import Figure

    rows = [
        (f"{size}, {variant}", found["images_per_s"] / next(iter(group.values()))["images_per_s"])
        for size, group in results.items()
        for variant, found in group.items()
    ]
    figure = Figure((7, max(2.5, 0.3 * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(*(list(column) for column in zip(*rows, strict=True)))
    axes.invert_yaxis()
    axes.set_xlabel("images per second, over the first of the group")
    figure.savefig(path, dpi=120)


def measure_size(size: str, folder: str, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Memory and speed of the variants of a size that fit into memory, with the largest batch that does."""
    limit = [f"--data.batch_size={given.batch_size}"] if given.batch_size else []
    config = make(size, limit, f"{folder}/sizes{size.replace('/', '')}").config
    of_two = memory_of(size, [*VARIANTS[given.variants[0]], "--data.batch_size=2"]) if size.startswith("ViT") else {}
    batch = fitting_batch(of_two, config.data.batch_size, free_megabytes()) if of_two else config.data.batch_size
    variants = {name: [*VARIANTS[name], f"--data.batch_size={batch}"] for name in given.variants}
    memory: dict[str, dict[str, float]] = {}
    for name in variants if batch else ():
        memory[name] = memory_of(size, variants[name])
        print(
            f"{size}, {name}: {' MB, '.join(f'{key[:-3]} {mb:.0f}' for key, mb in memory[name].items())} MB", flush=True
        )
    fits = {name: variants[name] for name, found in memory.items() if found}
    if not fits:
        print(f"{size}: skipped, it does not fit into the memory that is free", flush=True)
        return {}
    if batch < config.data.batch_size:
        print(f"{size}: batches of {batch} instead of {config.data.batch_size}, which would not fit", flush=True)
    speed = {} if given.only_memory else measure(size, fits, f"{folder}/{size.replace('/', '')}", given)
    gc.collect()
    return {name: {"batch_size": batch, **speed.get(name, {}), **memory[name]} for name in fits}


def tables(results: Results, earlier: Results, growth: bool) -> str:
    """All tables that there are figures for."""
    if growth:
        return markdown(results, {name: SPEED[name] for name in ("images/s", "ms")} | MEMORY, "of | value", earlier)
    parts = [
        markdown(results, columns, "size | variant", earlier if columns is SPEED else {})
        for columns in (SPEED, PARTS, MEMORY)
    ]
    sources = {
        f"{found['peak_gflop_per_s']:.0f} GFLOP/s ({variant}; {found['peak_source']})"
        for group in results.values()
        for variant, found in group.items()
        if "peak_source" in found
    }
    parts += [f"MFU is over {', '.join(sorted(sources))}"] if sources else []
    return "\n\n".join(part for part in parts if part)


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["default", "small"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:4])
    parser.add_argument("--seconds", type=float, default=20, help="time for each variant")
    parser.add_argument("--batch-size", type=int, help="of all sizes")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of time")
    parser.add_argument("--only-memory", action="store_true", help="no times")
    parser.add_argument("--no-readings", dest="readings", action="store_false", help="without the collapse reading")
    parser.add_argument(
        "--growth", nargs="*", choices=list(GROWTH), help="what cost grows with (all by default), instead of sizes"
    )
    parser.add_argument(
        "--steady", type=int, metavar="STEPS", help="resident memory over these steps, instead of sizes"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--compare", type=Path, help="an earlier OUTPUT")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    results: Results = {}
    with TemporaryDirectory() as folder:
        if given.steady:
            every = max(1, given.steady // 20)
            found = [f"{mb:.0f}" for mb in resident_over(given.steady, every, folder)]
            print(f"{machine()}\nresident MB, every {every} steps: {', '.join(found)}")
            return
        clock = time.process_time if given.cpu_time else time.perf_counter
        if given.growth is not None:
            results = grow(given.growth, folder, min(given.seconds, 3), clock)
        for size in [] if given.growth is not None else given.sizes:
            if found_of_size := measure_size(size, folder, given):
                results[size] = found_of_size
    earlier = json.loads(given.compare.read_text(encoding="utf-8"))["results"] if given.compare else {}
    notes = f"{', compiled' if given.compile else ''}{', processor time' if given.cpu_time else ''}"
    table = f"{machine()}{notes}\n\n{tables(results, earlier, given.growth is not None)}\n"
    print(table)
    given.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", encoding="utf-8")
    given.output.with_suffix(".md").write_text(table, encoding="utf-8")
    if not given.only_memory and results:
        plot(results, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
