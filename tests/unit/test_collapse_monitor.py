"""The collapse handlers in real runs: what they read is right, what is collapsed reads so, and training never notices."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from ignite.engine import Events
from processes import in_processes
from resuming import ALIKE, RICH, assert_same, outcome, train
from test_collapse import lidar_by_loops, reference
from torch import nn

from hjepa_engine import create_evaluator, create_trainer, load_config
from hjepa_engine.checkpoint.folder import find_checkpoint
from hjepa_engine.checkpoint.storage import read_state
from hjepa_engine.config.schema import Level
from hjepa_engine.data import FixedImageSubset, open_split
from hjepa_engine.data.views import random_views
from hjepa_engine.handlers import BatchCollapse, CollapseMonitor
from hjepa_engine.masking import Masks
from hjepa_engine.metrics.means import effective_rank
from hjepa_engine.metrics.sampling import spread, stride_of
from hjepa_engine.models.encoder import ContextEncoder, TargetEncoder
from hjepa_engine.steps import feature_map_step

#: 3 epochs of 5 iterations; 144 patches, so that a few batches of eight have the 2304 tokens of a reading.
MEASURED = {
    **RICH,
    "data.batch_size": 8,
    "data.fake_size": 40,
    "data.image_size": 48,
    "model.num_hierarchies": None,
    "model.levels": "[{pool: 1}, {pool: 3, depth: 0.5}, {pool: image}]",
    "training.level_lrs": None,
    "masking.mask_scale": "[0.1, 0.15]",
    "masking.context_keep": "[0.36, 0.36]",  # 52 tokens of 144 in each image
    "collapse.every": 3,
    "collapse.images": 16,
    "collapse.batch_every": 2,
    "collapse.alpha_req": "true",
    "collapse.lidar_views": 3,
}
LEVELS = (Level(1), Level(3, depth=0.5), Level("image"))
#: Of both encoders; those of the levels follow.
KEYS = ("std", "norm", "rank", "rank_share", "rank_me", "alpha_req", "lidar")
OF_LEVELS = tuple(f"{key}_level_{level}" for level in range(3) for key in KEYS[:4])
NAMES = ("context", "target")


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def readings(folder, prefix="collapse/context_std"):
    """All that begins with ``collapse/`` in every record that has a key with this prefix, by step."""
    lines = [line for line in log_of(folder) if prefix in line]
    return {line["step"]: {n: v for n, v in line.items() if n.startswith("collapse/")} for line in lines}


class Tokens:
    """Keep the tokens of every iteration."""

    kept = []

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.keep)

    def keep(self, engine):
        output, masks = engine.state.output, engine.state.batch["masks"]
        target, context = output["target_tokens"].clone(), output["context_tokens"].clone()
        positions = torch.arange(target.shape[1]).expand(target.shape[:2])
        self.kept.append({"target": (target, positions), "context": (context, masks.context_idx)})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with both handlers, all that it leaves, and its tokens."""
    Tokens.kept = []
    run = train(tmp_path_factory.mktemp("measured") / "run", MEASURED, (Tokens,))
    return run, outcome(run), Tokens.kept


# What a run logs


def test_readings_come_before_the_first_step_at_window_ends_when_due_and_at_the_end(measured):
    found = readings(measured[0].folder.path)
    # Windows end at 2, 4, 5, 6, 8, 10, ...: due at 3, read at 4; due at 7, read at 8; due at 11, read at 12.
    assert list(found) == [0, 4, 8, 12, 15]
    wanted = {f"collapse/{name}_{key}" for name in NAMES for key in (*KEYS, *OF_LEVELS)}
    for step, values in found.items():
        assert {name for name in values if "batch" not in name} == wanted, step
        assert all(math.isfinite(value) for value in values.values())
    assert found[0] != found[4]


def test_spectra_are_logged_with_every_reading(measured):
    run, _, _ = measured
    lines = [line for line in log_of(run.folder.path) if "collapse/target_spectrum" in line]
    assert [line["step"] for line in lines] == [0, 4, 8, 12, 15]
    for line in lines:
        for name in NAMES:
            spectrum = line[f"collapse/{name}_spectrum"]
            assert spectrum["rank"] == list(range(1, 17)) and sum(spectrum["share"]) == pytest.approx(1, abs=1e-3)
            assert spectrum["share"] == sorted(spectrum["share"], reverse=True)


def windows(tokens, grid, size):
    """Means of all windows of ``size`` x ``size`` patches, by loops: (B, cells, D)."""
    maps = tokens.double().view(len(tokens), *grid, -1)
    corners = [(row, column) for row in range(grid[0] - size + 1) for column in range(grid[1] - size + 1)]
    return torch.stack([maps[:, r : r + size, c : c + size].mean(dim=(1, 2)) for r, c in corners], dim=1)


def by_hand(features):
    """The readings of features (B, positions, D), each position with a mean of its own, by one SVD of all samples."""
    return reference(features.flatten(0, 1), torch.arange(features.shape[1]).repeat(len(features)))


def test_a_reading_is_what_the_encoders_say_of_the_same_images(measured):
    run = measured[0]
    images = FixedImageSubset(run.config.data, open_split(run.config.data, "train", run.config.seed), 16)
    (batch,) = images
    of_images = [random_views(image[None], 3, run.config.seed, n) for n, image in enumerate(batch["images"])]
    views = [torch.cat(view) for view in zip(*of_images, strict=True)]
    last = readings(run.folder.path)[15]
    line = next(line for line in reversed(log_of(run.folder.path)) if "collapse/target_spectrum" in line)
    for name in NAMES:
        encoder = run.modules[f"{name}_encoder"].eval()
        with torch.no_grad():
            (tokens,) = encoder.features(batch["images"])
            (middle,) = encoder.features(batch["images"], depths=[0.5])
            means = torch.stack([encoder(view).mean(dim=1) for view in views])
        values, wanted = by_hand(tokens)
        rank = np.arange(3, 16)  # the last norm leaves 15 of 16 dimensions
        eigenvalues = values[2:15].square().numpy()
        wanted["alpha_req"] = -np.polyfit(np.log(rank), np.log(eigenvalues), 1, w=np.sqrt(1 / rank))[0]
        wanted["lidar"] = lidar_by_loops(means.double())
        maps = tokens, windows(middle, encoder.grid, 3), tokens.mean(dim=1, keepdim=True)
        for level, features in enumerate(maps):
            of_level = by_hand(features)[1]
            wanted |= {f"{key}_level_{level}": of_level[key] for key in KEYS[:4]}
        assert wanted.keys() == {*KEYS, *OF_LEVELS}
        assert {key: last[f"collapse/{name}_{key}"] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        shares = (values / values.sum()).tolist()
        assert line[f"collapse/{name}_spectrum"]["share"] == pytest.approx([*shares[:15], 0], rel=1e-3)


def taken(batches, name, needed):
    """Tokens and positions that make a reading, and how many batches they are from: whole ones, of the last ones a part."""
    tokens, positions, count = [], [], 0
    for number, batch in enumerate(batches, start=1):
        features, idx = batch[name]
        wanted = needed - sum(map(len, tokens))
        stride = max(1, idx.numel() // wanted)
        while math.gcd(stride, idx.shape[1]) > 1:
            stride += 1
        positions.append(
            torch.tensor([position for n, position in enumerate(idx.flatten().tolist()) if n % stride == 0])
        )
        tokens.append(torch.stack([row for n, row in enumerate(features.flatten(0, 1)) if n % stride == 0]))
        if sum(map(len, tokens)) >= needed:
            count = number
            break
    assert count
    return torch.cat(tokens), torch.cat(positions), count


def test_a_reading_on_batches_is_of_the_tokens_of_the_iterations_from_when_it_is_due(measured):
    run, _, kept = measured
    found = readings(run.folder.path, "collapse/batch_context_std")
    assert list(found) == [6, 14]  # due again from 8 on; 2 iterations are a log interval
    for first, step, iterations in ((1, 6, 6), (8, 14, 6)):
        for name in NAMES:
            tokens, positions, count = taken(kept[first - 1 :], name, 16 * 144)
            assert count == (2 if name == "target" else iterations)
            wanted = reference(tokens, positions)[1]
            given = {key: found[step][f"collapse/batch_{name}_{key}"] for key in KEYS[:4]}
            assert given == pytest.approx({key: wanted[key] for key in KEYS[:4]}, rel=1e-6)


# What is collapsed reads as collapsed


def encoders(change=lambda vit: None, amp=None):
    """A monitor of a pair of real encoders, both changed, and the features that it is going to see."""
    torch.manual_seed(0)
    context = ContextEncoder("vit_tiny_patch16_224", 48, in_chans=1, patch_size=8, embed_dim=32, depth=4, num_heads=4)
    with torch.no_grad():
        change(context.vit)
    modules = nn.ModuleDict({"context": context, "target": TargetEncoder.copy_of(context)})
    digits = FixedImageSubset(DIGITS, open_split(DIGITS, "train"), 64, batch_size=48)
    evaluator = create_evaluator(partial(feature_map_step, levels=LEVELS), modules, amp_dtype=amp)
    with torch.no_grad():
        tokens = torch.cat([context.eval()(batch["images"]) for batch in digits])
    return CollapseMonitor(evaluator, digits, alpha_req=True, lidar_views=4), tokens


DIGITS = load_config(None, ["--data.dataset=digits", "--data.image_size=48"]).data
NOTHING = {"norm": 0, "rank": 1, "rank_share": 0, "rank_me": 1, "alpha_req": math.inf, "lidar": 1}


def read(monitor):
    trainer = create_trainer(lambda modules, batch: {}, nn.ModuleDict())
    monitor.read(trainer)
    return {name.removeprefix("collapse/"): value for name, value in trainer.state.metrics.items()}


def constant(vit):
    """Whatever it sees, it says the bias of its last norm."""
    vit.norm.weight.zero_()
    vit.norm.bias.copy_(torch.randn(32))


def blind(vit):
    """It sees positions and no image."""
    vit.patch_embed.proj.weight.zero_()
    vit.pos_embed.normal_()


def one_dimension(vit):
    """All dimensions but one are constant."""
    vit.norm.weight[1:] = 0


AMP = pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])


@AMP
def test_a_random_encoder_reads_as_healthy(amp):
    found = read(encoders(amp=amp)[0])
    for name in NAMES:
        values = {key: found[f"{name}_{key}"] for key in KEYS}
        assert values["std"] > 0.3 and values["norm"] > 1.5 and values["rank"] > 8 and values["rank_me"] > 8
        assert values["rank_share"] > 0.2 and values["alpha_req"] < 5 and values["lidar"] > 4
        assert all(found[f"{name}_rank_share_level_{level}"] > 0.1 for level in range(3))
        assert all(found[f"{name}_std_level_{level}"] > 0.02 for level in range(3))


@AMP
@pytest.mark.parametrize("change", [constant, blind])
def test_an_encoder_whose_output_does_not_depend_on_the_image_reads_as_collapsed_in_every_metric(change, amp):
    monitor, tokens = encoders(change, amp)
    found = read(monitor)
    for name in NAMES:
        assert {key: found[f"{name}_{key}"] for key in NOTHING} == NOTHING
        assert found[f"{name}_std"] < 1e-2 if amp else found[f"{name}_std"] < 1e-5
        for level, shape in enumerate(LEVELS):
            of_level = {key: found[f"{name}_{key}_level_{level}"] for key in ("norm", "rank", "rank_share")}
            if change is constant and shape.depth < 1:  # it lies before the last norm, and still sees
                assert of_level["norm"] > 0.1 and of_level["rank_share"] > 0.1
            else:
                assert of_level == {key: NOTHING[key] for key in of_level}
    together = effective_rank(tokens.flatten(0, 1))
    # Without a mean for each position, what sees nothing but positions would pass for healthier than what sees images.
    assert together > 1.5 * effective_rank(encoders()[1].flatten(0, 1)) if change is blind else together < 1.01


def test_an_encoder_with_one_dimension_left_reads_as_rank_one():
    found = read(encoders(one_dimension)[0])
    healthy = read(encoders()[0])
    for name in NAMES:
        assert (
            found[f"{name}_rank"] == 1 and found[f"{name}_rank_share"] == 0 and found[f"{name}_alpha_req"] == math.inf
        )
        assert found[f"{name}_rank_me"] == pytest.approx(1, abs=1e-4) and found[f"{name}_lidar"] == pytest.approx(1)
        assert 0 < found[f"{name}_std"] < healthy[f"{name}_std"] / 10


def test_batches_of_a_collapsed_encoder_read_as_collapsed():
    positions = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))

    def step(modules, batch):
        tokens = positions.expand(100, 9, 4)
        return {"target_tokens": tokens, "context_tokens": tokens[:, :5]}

    trainer = create_trainer(step, nn.ModuleDict(), log_frequency=100)
    BatchCollapse().attach(trainer)
    trainer.run([{"masks": Masks(torch.arange(5).expand(100, 5), torch.zeros(100, 1, 1).long(), (1, 1))}] * 9)
    for name in NAMES:
        values = {key: trainer.state.metrics[f"collapse/batch_{name}_{key}"] for key in KEYS[:4]}
        assert values == {"std": pytest.approx(0, abs=1e-7), "norm": 0, "rank": 1, "rank_share": 0}


# Tokens of a batch


@pytest.mark.parametrize("shape", [(8, 144), (64, 36), (7, 49), (32, 97), (3, 12)])
@pytest.mark.parametrize("most", [1, 5, 100, 250, 500])
def test_a_part_of_a_batch_is_taken_evenly_from_positions_and_images(shape, most):
    batch, number = shape
    tokens = torch.arange(batch * number).view(batch, number, 1).double()
    positions = torch.arange(number).expand(batch, number)
    stride = stride_of(batch, number, most)
    found, found_positions = spread(tokens, positions, stride)
    picked = found.flatten().long()
    assert torch.equal(found_positions, picked % number) and len(picked.unique()) == len(picked)
    # The stride has no divisor in common with the number of positions: for 144 it is 5 instead of 2.
    assert most / 2.5 <= len(picked) < 2 * most or len(picked) == batch * number
    of_positions = torch.bincount(found_positions, minlength=number)
    of_images = torch.bincount(picked // number, minlength=batch)
    assert of_positions.max() - of_positions.min() <= 1
    assert of_images.max() - of_images.min() <= 1
    if batch % 2 == 0:  # two ranks take the same tokens
        halves = [
            spread(*halves, stride, rank)
            for rank, halves in enumerate(zip(tokens.chunk(2), positions.chunk(2), strict=True))
        ]
        for one, both in zip((found, found_positions), zip(*halves, strict=True), strict=True):
            assert torch.equal(torch.cat(both), one)


# Training never notices


def without_collapse(found):
    """An outcome but for what both handlers leave in it, all of it plain lists and tensors."""
    state, tensors, log, position = found
    state = json.loads(json.dumps(state))
    metrics = state["engine"]["metrics"]
    kept = [name for name in metrics["values"] if not name.startswith("collapse/")]
    weights = {name: tensor for name, tensor in tensors.items() if "BatchCollapse" not in name}
    lines = [{name: value for name, value in line.items() if not name.startswith("collapse/")} for line in log]
    lines = [line for line in lines if line.keys() - {"step", "epoch"}]
    return [metrics["values"][name] for name in kept], kept, weights, lines, position


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_run_that_is_measured_trains_to_the_bits_of_one_that_is_not(measured, tmp_path, accumulation_steps):
    values = {**MEASURED, "training.accumulation_steps": accumulation_steps}
    if accumulation_steps == 1:
        found = measured[1]
    else:
        values |= {"training.epochs": 2, "collapse.every": 4}
        run = train(tmp_path / "measured", values)
        found = outcome(run)
        assert list(readings(run.folder.path)) == [0, 4, 6]  # of optimizer steps, and at the end though not due
    plain = outcome(train(tmp_path / "plain", {**values, "collapse.enabled": "false"}))
    assert sum("collapse/batch_target_rank" in line for line in found[2]) >= 1
    assert not any(name.startswith("collapse/") for line in plain[2] for name in line)
    one, other = without_collapse(found), without_collapse(plain)
    assert one[:2] == other[:2] and one[3:] == other[3:]
    assert len(one[2]) > 150 and one[2].keys() == other[2].keys()
    assert all(torch.equal(one[2][name], other[2][name]) for name in one[2])


@pytest.mark.parametrize("stop", [4, 10])
def test_a_run_that_is_stopped_while_samples_are_collected_goes_on_with_the_same_readings(measured, tmp_path, stop):
    train(tmp_path / "run", MEASURED, stop=stop)
    saved = read_state(find_checkpoint(tmp_path / "run", "latest"))["ranks"][0]["handlers"]["BatchCollapse"]
    assert saved["due"] == (0 if stop == 4 else 8)
    assert saved["statistics"]["target"]["samples"] == 2304 and 1000 < saved["statistics"]["context"]["samples"] < 2304
    assert_same(outcome(train(tmp_path / "run", MEASURED)), measured[1])


def test_modes_are_as_before_after_a_reading_and_no_generator_was_drawn_from():
    monitor, _ = encoders()
    modules = monitor.evaluator.modules
    modules.train()
    modules["context"].vit.blocks[1].eval()  # a part that somebody has frozen
    before = {name: module.training for name, module in modules.named_modules()}
    state = torch.get_rng_state()
    read(monitor)
    assert {name: module.training for name, module in modules.named_modules()} == before
    assert len(set(before.values())) == 2 and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in modules.parameters())
    assert monitor.evaluator.state.output is None and monitor.evaluator.state.batch is None


# Several processes

#: 2 epochs of 7 iterations, the last two not trained; readings at 0, 4, 7, 12.
PARTED = {
    **ALIKE,
    "data.batch_size": 8,
    "data.fake_size": 56,
    **{key: MEASURED[key] for key in MEASURED if key.startswith(("collapse.", "data.image_size", "masking."))},
    "training.max_iters": 14,
}


def test_two_processes_read_what_one_does(tmp_path):
    def body():
        run = train(tmp_path / "two", PARTED)
        return {name: value for name, value in run.trainer.state.metrics.items() if name.startswith("collapse/")}

    first, second = in_processes(2, tmp_path, body)
    train(tmp_path / "one", PARTED)
    alone, together = ([readings(tmp_path / name)[step] for step in (0, 4, 7, 14)] for name in ("one", "two"))
    assert first == second and first.items() >= together[-1].items()
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            # Sums of gradients have another order, so that weights differ by rounding.
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    assert "collapse/batch_context_rank" in alone[2] and "collapse/batch_context_rank" in alone[3]
