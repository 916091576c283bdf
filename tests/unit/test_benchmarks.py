"""The benchmark of whole runs: what it calculates, and one run of it."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from ignite.engine import Events
from sources import ROOT
from timm.models.vision_transformer import Block

from hjepa_engine.recipes.benchmarks import memory, parts, products, scaling, sizes
from hjepa_engine.recipes.benchmarks import run as benchmark

TINY = ["--training.use_amp=false", "--data.batch_size=8"]


@pytest.fixture
def run(tmp_path):
    made = sizes.make("default", TINY, str(tmp_path))
    yield made
    made.preemption.close()


def test_the_parts_of_needed_memory_are_those_of_the_parameters_and_add_up(run):
    with memory.KeptActivations(run) as kept:
        run.trainer.run(run.data, max_iters=1)
    found = memory.needed(run, kept.megabytes)
    count = {name: sum(p.numel() for p in run.modules[name].parameters() if p.requires_grad) for name in run.modules}
    trained = 4e-6 * (count["context_encoder"] + count["predictor"])
    assert found["weights_mb"] == found["gradients_mb"] == pytest.approx(trained)
    assert found["moments_mb"] == pytest.approx(2 * trained)
    of_encoder = 4e-6 * sum(p.numel() for p in run.modules["context_encoder"].parameters())
    assert found["target_mb"] == pytest.approx(of_encoder)
    assert found["activations_mb"] > 0
    assert found["needed_mb"] == pytest.approx(sum(found[part] for part in memory.PARTS))


def test_a_block_keeps_what_the_calculation_for_many_gpus_says():
    block, kept = Block(64, 4, qkv_bias=True), dict[int, int]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(torch.randn(2, 50, 64, requires_grad=True))
    stack = scaling._stack([block])
    assert output.requires_grad and stack.kept(small=4) == pytest.approx(sum(kept.values()) / (2 * 50), rel=0.03)
    assert stack.parameters == sum(parameter.numel() for parameter in block.parameters())


def test_the_calculation_of_states_and_traffic_is_that_of_the_documentation():
    stack = scaling.Stack(4, 64, 256, 50_000)
    model = scaling.Model(stack, stack._replace(depth=2), 200_000, 300_000, 196, 79.0, 4, 34.0)
    ddp, fsdp = (scaling.cost(model, scaling.Machine(), strategy, 8, batch=64) for strategy in ("ddp", "fsdp"))
    assert ddp.fixed == pytest.approx((20 * 0.3 + 4 * 0.2) / 1e3)
    assert fsdp.fixed == pytest.approx(((16 * 0.3 + 4 * 0.2) / 8 + 12 * 0.05) / 1e3)
    assert ddp.exchanged == pytest.approx(7 / 8 * 8 * 0.3 / 1e3)
    assert fsdp.exchanged == pytest.approx(7 / 8 * (12 * 0.3 + 4 * 0.2) / 1e3)
    assert (ddp.micro, ddp.steps) == (8, 1) and ddp.computing == fsdp.computing
    small = scaling.cost(model, scaling.Machine(memory=1.2e-2), "fsdp", 8, batch=64)
    assert small.micro * small.steps == 8 and small.steps > 1
    assert small.exchanged == pytest.approx(small.steps * fsdp.exchanged)
    assert scaling.cost(model, scaling.Machine(memory=1e-3), "ddp", 8, batch=64).micro == 0


def test_kept_activations_are_what_a_step_keeps_without_its_weights(run):
    layer = torch.nn.Linear(3, 5)
    run.trainer.modules["layer"] = layer
    run.trainer.step = lambda modules, batch: {"loss": layer(torch.ones(7, 3)).exp().sum()}
    with memory.KeptActivations(run) as kept:
        run.trainer.step(run.modules, {})
    assert kept.megabytes == pytest.approx(4e-6 * (7 * 3 + 7 * 5))  # the layer's input, and exp's output
    assert run.trainer.step is kept.step


def test_a_batch_is_halved_until_it_fits():
    of_two = {"activations_mb": 20.0, "needed_mb": 120.0}  # 100 MB, and 10 for each image
    assert memory.fitting_batch(of_two, 32, free=1000.0) == 32
    assert memory.fitting_batch(of_two, 32, free=600.0) == 16
    assert memory.fitting_batch(of_two, 32, free=165.0) == 1
    assert memory.fitting_batch(of_two, 32, free=160.0) == 0


def test_the_peak_of_memory_counts_from_the_moment_it_was_made():
    peak = memory.PeakMemory(torch.device("cpu"))
    before = peak.megabytes()
    block = torch.ones(25_000_000)
    assert 90 < peak.megabytes() - before < 130
    del block
    assert peak.megabytes() - before > 90
    if sys.platform == "linux":
        assert memory.PeakMemory(torch.device("cpu")).megabytes() - before < 50


def test_matrix_products_are_counted_with_their_operations():
    layer, inputs = torch.nn.Linear(3, 5), torch.ones(7, 3)
    with products.MatrixProducts() as found:
        layer(inputs).sum().backward()
    assert found.flops == 2 * 7 * 3 * 5 * 2  # forward, and the weight's gradient


def test_the_peak_of_a_gpu_is_the_published_one_and_of_a_cpu_the_measured_one():
    assert products.published_peak("NVIDIA H100 80GB HBM3", torch.bfloat16).flop_per_s == 989e12
    assert products.published_peak("NVIDIA H100 PCIe", torch.float32).flop_per_s == 51e12
    assert products.published_peak("NVIDIA A100-SXM4-80GB", torch.float16).flop_per_s == 312e12
    assert products.published_peak("another", torch.float16) is None
    measured = products.peak_rate(torch.device("cpu"), torch.float32)
    assert measured.flop_per_s > 1e8 and measured.source == "measured, 2048 x 2048"


def test_the_bare_loop_trains_as_the_engine_does(tmp_path):
    """Weights after a step are equal bit for bit: both do the same work."""
    runs = [sizes.make("default", [*TINY, "--training.warmup_epochs=0"], f"{tmp_path}/{name}") for name in "ab"]
    batches = []
    engine = runs[0].trainer
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: batches.append(engine.state.batch))
    engine.run(runs[0].data, max_iters=1)
    first = {name: weight.clone() for name, weight in runs[1].modules.state_dict().items()}
    for group, other in zip(*(sizes.optimizer_of(run).param_groups for run in runs), strict=True):
        other["lr"], other["weight_decay"] = group["lr"], group["weight_decay"]
    parts.bare_loop(runs[1], batches, 1, iter(range(9)).__next__)
    trained = runs[0].modules.state_dict()
    for name, weight in runs[1].modules.state_dict().items():
        if not name.startswith("target_encoder"):  # whose momentum follows a schedule
            assert torch.equal(weight, trained[name]), name
    assert any(not torch.equal(weight, first[name]) for name, weight in trained.items())


def test_a_table_has_a_row_for_each_variant_and_compares_with_an_earlier_one():
    results = {"small": {"fp32": {"images_per_s": 30.0}, "bf16": {"images_per_s": 60.0, "mfu": 0.25}}}
    table = benchmark.markdown(results, benchmark.SPEED, "size | variant", {"small": {"fp32": {"images_per_s": 20.0}}})
    assert table.splitlines() == [
        "| size | variant | images/s | MFU | earlier images/s | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
        "| small | fp32 | 30.0 |  | 20.0 | 1.50 |",
        "| small | bf16 | 60.0 | 25% |  |  |",
    ]
    assert benchmark.markdown(results, benchmark.MEMORY, "size | variant", {}) == ""


@pytest.mark.slow
def test_times_of_all_parts_are_there(tmp_path):
    given = argparse.Namespace(cpu_time=True, compile=False, seconds=0.1, readings=True)
    found = benchmark.measure("default", {"tiny": TINY}, str(tmp_path), given)["tiny"]
    columns = {key for key, _ in (benchmark.SPEED | benchmark.PARTS).values()}
    assert columns <= set(found)
    assert 0 < found["mfu"] < 1 and found["bare_ms"] > 0 and found["masks_waited_ms"] < found["iteration_ms"]


@pytest.mark.slow
def test_the_benchmark_writes_figures_a_table_and_a_plot(tmp_path):
    program = [
        sys.executable,
        "recipes/benchmarks/run.py",
        "--sizes",
        "default",
        "--variants",
        "fp32",
        "--seconds",
        "1",
    ]
    subprocess.run([*program, "--output", str(tmp_path / "found.json")], cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())["results"]["default"]["fp32"]
    assert found["peak_mb"] > 0 and found["images_per_s"] > 0
    assert "| default | fp32 |" in (tmp_path / "found.md").read_text()
    assert (tmp_path / "found.png").stat().st_size > 1000
