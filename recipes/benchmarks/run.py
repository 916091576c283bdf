"""Measure pretraining as a whole: images per second, where a step's time goes, share of the matrix rate, memory.

    python recipes/benchmarks/run.py                              # the default run and a small model, a few minutes
    python recipes/benchmarks/run.py --sizes small ViT-S/16 --compile --output small.json
    python recipes/benchmarks/run.py --compare small.json         # the same sizes and variants, beside earlier figures

Variants of a size take turns in one process, so that other work on the machine meets them all. A size that does not fit into
memory is skipped. Written are OUTPUT (JSON), and a table (.md) and a plot (.png) beside it.

``matrix share``: time of the step's matrix products alone, of the same shapes and types and in the same run, over the time
of an iteration. ``needed`` memory: parameters, gradients, optimizer, target encoder, and what the backward pass keeps.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from ignite.engine import Events
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_engine import load_config
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.recipes.benchmarks.monitoring import OFF, QUIET
from hjepa_engine.recipes.common.run import Run
from hjepa_engine.recipes.pretrain import DEFAULT_CONFIG, build

_VIT = ["--data.image_size=224", "--model.patch_size=16", "--model.pos_embed=sincos", "--model.levels=[{pool: 1}]"]
_VIT += ["--masking.num_masks=4", "--masking.mask_scale=[0.15, 0.2]", "--model.activation_checkpointing=false"]


def _vit(name: str, width: int, depth: int, heads: int, batch: int) -> list[str]:
    return [
        *_VIT,
        *(f"--model.encoder_type=vit_{name}_patch16_224", f"--model.embed_dim={width}", f"--model.depth={depth}"),
        *(f"--model.num_heads={heads}", f"--data.batch_size={batch}", "--model.predictor.width=384"),
        *("--model.predictor.depth=6", "--model.predictor.num_heads=12"),
    ]


#: Options of each size, over the default run's.
SIZES: dict[str, list[str]] = {
    "default": [],
    "small": [  # 32 pixels, patches of 4, I-JEPA's masks
        *("--model.patch_size=4", "--model.embed_dim=192", "--model.depth=6", "--model.num_heads=6"),
        *("--model.levels=[{pool: 1}]", "--data.batch_size=256", "--masking.num_masks=4"),
        *("--masking.mask_scale=[0.15, 0.2]", "--model.predictor.width=96", "--model.predictor.depth=4"),
    ],
    "ViT-S/16": _vit("small", 384, 12, 6, 32),
    "ViT-B/16": _vit("base", 768, 12, 12, 32),
    "ViT-L/16": _vit("large", 1024, 24, 16, 32),
}
#: What varies within a size.
VARIANTS: dict[str, list[str]] = {
    "fp32": ["--training.use_amp=false"],
    "bf16": ["--training.use_amp=true"],
    "fp32 joint": ["--training.use_amp=false", "--model.predictor.targets=joint"],
    "bf16 joint": ["--training.use_amp=true", "--model.predictor.targets=joint"],
}
ROUNDS = 3


class MatrixProducts(TorchDispatchMode):
    """Count the matrix products of a step by operator, shapes and types."""

    NAMES = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the product and compute it."""
        if func._schema.name in self.NAMES:
            one, other = [part for part in args if isinstance(part, torch.Tensor)][-2:]
            self.found[(tuple(one.shape), tuple(other.shape), one.dtype, one.device)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Floating-point operations of one step."""
        return sum(2 * _size(one) * other[-1] * number for (one, other, *_), number in self.found.items())

    def seconds(self) -> float:
        """Time of them all, each shape at its best of five."""
        total = 0.0
        for (one, other, dtype, device), number in self.found.items():
            left, right = (torch.randn(shape, device=device).to(dtype) for shape in (one, other))
            total += number * min(_timed(lambda a=left, b=right: a @ b, device) for _ in range(5))  # type: ignore[misc]
        return total


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _timed(action: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def make(size: str, variant: str, folder: str, compiled: bool) -> Run:
    """A run without monitors, over images that lie in memory."""
    options = [*SIZES[size], *VARIANTS[variant], *OFF, *QUIET, f"--run_dir={folder}/{size.replace('/', '')}_{variant}"]
    config = load_config(DEFAULT_CONFIG, [*options, f"--training.compile={str(compiled).lower()}", "--device=auto"])
    if size == "default":
        return build(config)
    image = torch.randint(256, (3, *config.data.size), dtype=torch.uint8)
    images = [(image, 0)] * (64 * config.data.batch_size)
    return build(config, data=(images, images[: config.data.batch_size]))


def measure_memory(size: str, variant: str, folder: str) -> dict[str, float]:
    """Peak memory of a run in MB beside what it needs; called in a process of its own."""
    before = psutil.Process().memory_info().rss
    run = make(size, variant, folder, compiled=False)
    trained = sum(p.numel() * p.element_size() for p in run.modules.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in run.modules.parameters())
    own = {p.untyped_storage().data_ptr() for p in run.modules.parameters()}
    largest, step = [0], run.trainer.step

    def watched(modules: Any, batch: Any) -> Any:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = step(modules, batch)
        largest[0] = max(largest[0], sum(kept.values()))
        return outputs

    run.trainer.step = watched
    run.trainer.run(run.data, max_iters=4)
    if run.trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.trainer.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    # Weights, gradients, two moments of Adam.
    needed = weights + 3 * trained + largest[0]
    run.preemption.close()
    return {"needed_mb": needed / 1e6, "activations_mb": largest[0] / 1e6, "peak_mb": peak / 1e6}


def iterate(run: Run, number: int) -> float:
    """Train on; seconds per iteration, without what happens before the first and behind the last one."""
    times: list[float] = []
    handle = run.trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: times.append(time.perf_counter()))
    run.trainer.run(run.data, max_iters=run.trainer.state.iteration + number + 1)
    handle.remove()
    return (times[-1] - times[0]) / (len(times) - 1)


def measure(size: str, variants: list[str], seconds: float, compiled: bool, folder: str) -> dict[str, dict[str, float]]:
    """Figures of each variant of a size, in turns."""
    runs = {variant: make(size, variant, folder, compiled) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    found: dict[str, dict[str, float]] = {variant: {} for variant in variants}
    each: dict[str, float] = {}
    for variant, run in runs.items():
        products = MatrixProducts()
        if not compiled:  # a compiled step does not show its products
            with products:
                run.trainer.run(run.data, max_iters=1)
            found[variant] = {"matrix_s": products.seconds(), "gflop": products.flops / 1e9}
        each[variant] = iterate(run, 2)  # compilers and allocators are warm then
        each[variant] = iterate(run, 2)
    for _ in range(ROUNDS):
        for variant, run in runs.items():
            times[variant].append(iterate(run, max(2, round(seconds / ROUNDS / each[variant]))))
    for variant, run in runs.items():
        each[variant], result = statistics.median(times[variant]), found[variant]
        metrics = run.trainer.state.metrics
        result["images_per_s"] = run.config.data.batch_size / each[variant]
        result["iteration_ms"] = 1e3 * each[variant]
        result |= {name: metrics[f"train/{name}"] for name in ("forward_ms", "backward_ms", "update_ms", "data_ms")}
        if "matrix_s" in result:
            result["matrix_share"] = result.pop("matrix_s") / each[variant]
            result["gflop_per_s"] = result["gflop"] / each[variant]
        run.preemption.close()
    return found


def markdown(results: dict[str, Any], earlier: dict[str, Any]) -> str:
    """One row for each size and variant."""
    columns = {
        "images/s": ("images_per_s", ".1f"),
        "ms": ("iteration_ms", ".1f"),
        "forward": ("forward_ms", ".1f"),
        "backward": ("backward_ms", ".1f"),
        "update": ("update_ms", ".1f"),
        "data": ("data_ms", ".2f"),
        "matrix share": ("matrix_share", ".0%"),
        "GFLOP/s": ("gflop_per_s", ".0f"),
        "needed MB": ("needed_mb", ".0f"),
        "peak MB": ("peak_mb", ".0f"),
    }
    names = ["size", "variant", *columns, *(["earlier images/s", "ratio"] if earlier else [])]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for size, variants in results.items():
        for variant, found in variants.items():
            cells = [format(found[key], form) if key in found else "" for key, form in columns.values()]
            if earlier:
                before = earlier.get(size, {}).get(variant, {}).get("images_per_s")
                cells += [f"{before:.1f}", f"{found['images_per_s'] / before:.2f}"] if before else ["", ""]
            lines.append(f"| {size} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Images per second of each variant over that of its size's first one."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [
        (size, variant, found["images_per_s"]) for size, group in results.items() for variant, found in group.items()
    ]
    firsts = {size: next(iter(group.values()))["images_per_s"] for size, group in results.items()}
    axes.barh([f"{size}, {variant}" for size, variant, _ in rows], [rate / firsts[size] for size, _, rate in rows])
    axes.invert_yaxis()
    axes.set_xlabel("images per second, over the first variant")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["default", "small"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=20, help="time for each variant")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--compare", type=Path, help="an earlier OUTPUT")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with TemporaryDirectory() as folder:
        if given.memory_of:
            size, variant = given.memory_of
            print(json.dumps(measure_memory(size, variant, folder)))
            return
        results: dict[str, Any] = {}
        for size in given.sizes:
            memory = {variant: memory_of(size, variant) for variant in given.variants}
            fits = [variant for variant, found in memory.items() if found]
            if not fits:
                print(f"{size}: skipped, it does not fit into the memory that is free", flush=True)
                continue
            speed = measure(size, fits, given.seconds, given.compile, folder)
            results[size] = {variant: speed[variant] | memory[variant] for variant in fits}
            gc.collect()
    earlier = json.loads(given.compare.read_text(encoding="utf-8"))["results"] if given.compare else {}
    table = f"{machine()}{', compiled' if given.compile else ''}\n\n{markdown(results, earlier)}\n"
    print(table)
    given.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", encoding="utf-8")
    given.output.with_suffix(".md").write_text(table, encoding="utf-8")
    plot(results, given.output.with_suffix(".png"))


def memory_of(size: str, variant: str) -> dict[str, float]:
    """What :func:`measure_memory` finds in a process of its own; empty if the process ended for want of memory."""
    ended = subprocess.run(
        [sys.executable, __file__, "--memory-of", size, variant], capture_output=True, text=True, check=False
    )
    if not ended.returncode:
        return json.loads(ended.stdout.splitlines()[-1])
    if "out of memory" not in ended.stderr and ended.returncode != -9:
        raise SystemExit(ended.stderr)
    return {}


if __name__ == "__main__":
    main()
