"""What is read off features: known answers, plain reference implementations, any way of cutting the samples."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hjepa_engine.config.schema import DataConfig, Level
from hjepa_engine.data import DatasetSplit, FixedImageSubset, build_loader, open_split
from hjepa_engine.data.datasets import DIGITS
from hjepa_engine.data.views import random_views
from hjepa_engine.errors import DataError
from hjepa_engine.levels import num_disjoint_cells, pool_sliding
from hjepa_engine.metrics.collapse import (
    FeatureStatistics,
    ViewStatistics,
    alpha_req,
    images_needed,
    rank_me,
    rounding_of,
    spectrum_rank,
)
from hjepa_engine.metrics.means import effective_rank
from hjepa_engine.models.encoder import ContextEncoder


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(*values, samples=40):
    """Centered samples (samples, D) whose singular values, divided by sqrt(samples), are ``values``."""
    columns = torch.linalg.qr(torch.cat([torch.ones(samples, 1).double(), noise(samples, len(values))], 1)).Q[:, 1:]
    turn = torch.linalg.qr(noise(len(values), len(values), seed=1)).Q
    return columns @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn * math.sqrt(samples)


def statistics_of(features, positions=1, **arguments):
    statistics = FeatureStatistics(features.shape[-1], positions, **arguments)
    statistics.add(features)
    return statistics


def reference(features, position_idx=None):
    """The same numbers by a loop over positions and one SVD of all samples."""
    features = features.double().clone()
    position_idx = torch.zeros(len(features), dtype=torch.long) if position_idx is None else position_idx
    for position in position_idx.unique():
        features[position_idx == position] -= features[position_idx == position].mean(dim=0)
    values = torch.linalg.svdvals(features) / math.sqrt(len(features))
    values = torch.cat([values, torch.zeros(features.shape[1] - len(values)).double()])
    degrees_of_freedom = len(features) - len(position_idx.unique())
    share = [value / values.sum().item() for value in values.tolist()]
    rank = math.exp(-sum(p * math.log(p) for p in share if p > 1e-9))
    most = min(features.shape[1], degrees_of_freedom)
    return values, {
        "std": math.fsum(math.sqrt(column.square().sum() / degrees_of_freedom) for column in features.T)
        / features.shape[1],
        "norm": math.sqrt(features.square().sum(dim=1).mean()),
        "rank": rank,
        "rank_share": (rank - 1) / (most - 1),
        "rank_me": math.exp(-sum((p + 1e-7) * math.log(p + 1e-7) for p in share)),
    }


def assert_equals_reference(statistics, features, position_idx=None, tolerance=1e-6):
    values, summary = reference(features, position_idx)
    assert statistics.summary() == pytest.approx(summary, rel=tolerance)
    assert torch.allclose(statistics.singular_values(), values, rtol=0, atol=tolerance * values[0].item())


# Known answers

SHAPES = {
    "isotropic": ([2.0] * 8, 8),
    "a line": ([3.0] + [0.0] * 7, 1),
    "a plane": ([3.0, 3.0] + [0.0] * 6, 2),
    "half": ([5.0] * 4 + [0.0] * 4, 4),
    # 2 ** (share of 1/2: 1, of 1/4: 2, twice 1/8: 3) = 2 ** (1/2 + 1/2 + 3/8 + 3/8)
    "halves": ([4.0, 2.0, 1.0, 1.0, 0, 0, 0, 0], 2**1.75),
}


@pytest.mark.parametrize(("spectrum", "rank"), SHAPES.values(), ids=SHAPES)
def test_rank_and_norm_of_a_known_spectrum(spectrum, rank):
    statistics = statistics_of(with_spectrum(*spectrum))
    summary = statistics.summary()
    assert summary["rank"] == pytest.approx(rank, rel=1e-6)
    assert summary["rank_share"] == pytest.approx((rank - 1) / 7, abs=1e-6)
    assert summary["rank_me"] == pytest.approx(rank, rel=2e-5)
    assert summary["norm"] == pytest.approx(math.sqrt(sum(value**2 for value in spectrum)))
    assert statistics.singular_values().tolist() == pytest.approx(spectrum, abs=1e-6)
    assert effective_rank(with_spectrum(*spectrum)) == pytest.approx(rank, rel=1e-6)


def test_std_is_that_of_a_dimension():
    features = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 16.0]])
    assert statistics_of(features).summary()["std"] == pytest.approx((2 + math.sqrt(12)) / 2)


@pytest.mark.parametrize("sigmas", [20, 1e4])
def test_a_mean_changes_nothing(sigmas):
    features = noise(300, 12) * torch.linspace(0.5, 2, 12)
    offset = sigmas * features.std() * torch.randn(12, generator=torch.Generator().manual_seed(1)).sign()
    plain, moved = FeatureStatistics(12), FeatureStatistics(12)
    for part in features.split(17):
        plain.add(part)
        moved.add(part + offset)
    assert moved.summary() == pytest.approx(plain.summary(), rel=1e-6)
    assert_equals_reference(moved, features)


def test_duplicated_rows_change_nothing():
    features = noise(50, 8)
    once, often = statistics_of(features), statistics_of(features.repeat(7, 1))
    assert torch.allclose(once.singular_values(), often.singular_values(), rtol=1e-9)
    for key in ("norm", "rank", "rank_me"):
        assert often.summary()[key] == pytest.approx(once.summary()[key], rel=1e-9)
    # unbiased: 50 and 350 samples, one mean each
    assert often.summary()["std"] == pytest.approx(once.summary()["std"] * math.sqrt(49 / 50 * 350 / 349))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_scale_changes_std_and_norm_and_no_rank(scale):
    one, scaled = statistics_of(noise(50, 8)).summary(), statistics_of(noise(50, 8) * scale).summary()
    for key in ("std", "norm"):
        assert scaled[key] == pytest.approx(one[key] * scale)
    for key in ("rank", "rank_share", "rank_me"):
        assert scaled[key] == pytest.approx(one[key])


def test_fewer_samples_than_dimensions_cannot_have_a_larger_rank():
    summary = statistics_of(noise(5, 16)).summary()
    assert 3 < summary["rank"] <= 4 and 0.6 < summary["rank_share"] <= 1


@pytest.mark.parametrize("samples", [0, 1])
def test_no_sample_and_a_single_one_say_nothing(samples):
    expected = {"std": 0.0, "norm": 0.0, "rank": 1.0, "rank_share": 0.0, "rank_me": 1.0}
    assert statistics_of(noise(samples, 4)).summary() == expected


def test_one_dimension_has_rank_one():
    summary = statistics_of(noise(100, 1)).summary()
    assert summary["rank"] == 1 and summary["rank_share"] == 0 and summary["std"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_nan_and_no_error(value):
    features = noise(20, 4)
    features[3, 2] = value
    statistics = statistics_of(features)
    assert all(math.isnan(found) for found in statistics.summary().values())
    assert math.isnan(alpha_req(statistics.singular_values()))
    views = ViewStatistics(4)
    views.add(features.view(2, 10, 4))
    assert math.isnan(views.lidar())


@pytest.mark.parametrize("sizes", [(0, 1), (3, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        FeatureStatistics(*sizes)


# Any way of cutting the samples


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.sampled_from([0.0, 20.0]))
def test_streamed_equals_the_whole(cuts, offset):
    features = noise(sum(cuts) + 10, 6) * torch.tensor([5.0, 2, 1, 1, 0.5, 0.01]) + offset
    statistics = FeatureStatistics(6)
    for part in features.split([*cuts, 1, 9]):
        statistics.add(part)
    assert statistics.samples == len(features)
    assert_equals_reference(statistics, features)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 2**31))
def test_positions_come_in_any_order_and_number(cuts, seed):
    number = sum(cuts) + 10
    position_idx = torch.randint(5, (number,), generator=torch.Generator().manual_seed(seed))
    features = noise(number, 6, seed=seed) + 30 * noise(7, 6, seed=1)[position_idx]  # positions 5 and 6 have no sample
    statistics = FeatureStatistics(6, positions=7)
    for part, positions in zip(features.split([*cuts, 1, 9]), position_idx.split([*cuts, 1, 9]), strict=True):
        statistics.add(part, positions)
    assert_equals_reference(statistics, features, position_idx)


def test_maps_are_centered_at_each_position():
    maps = noise(30, 4, 6) + 50 * noise(4, 6, seed=1)
    whole, named = FeatureStatistics(6, 4), FeatureStatistics(6, 4)
    for part in maps.split([1, 20, 9]):
        whole.add(part)
        named.add(part, torch.arange(4).expand(len(part), 4))
    position_idx = torch.arange(4).repeat(30)
    assert_equals_reference(whole, maps.flatten(0, 1), position_idx)
    assert_equals_reference(named, maps.flatten(0, 1), position_idx)
    assert whole.degrees_of_freedom == 120 - 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_of_every_type(dtype):
    features = noise(200, 6).to(dtype)
    before = features.clone()
    statistics = FeatureStatistics(6, 2)
    for part in features.view(100, 2, 6).split(30):
        statistics.add(part)
    assert_equals_reference(statistics, features, torch.arange(2).repeat(100))
    assert torch.equal(features, before)


def test_samples_are_not_kept():
    statistics, sizes = FeatureStatistics(8, 3), []
    for number in (10, 1000):
        statistics.add(noise(number, 3, 8))
        held = [value for value in vars(statistics).values() if torch.is_tensor(value)]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
    assert sizes == [8 * (8 * 8 + 3 * 8 + 3)] * 2


def test_sums_survive_a_checkpoint():
    features, position_idx = noise(60, 6), torch.arange(60) % 5
    whole = FeatureStatistics(6, 5, computed_in=torch.bfloat16)
    whole.add(features[:40], position_idx[:40])
    resumed = FeatureStatistics.from_state_dict(whole.state_dict())
    kept = {name: value.clone() for name, value in whole.state_dict().items() if torch.is_tensor(value)}
    for statistics in (resumed, whole):
        statistics.add(features[40:], position_idx[40:])
        assert all(torch.equal(kept[name], kept[name].clone()) for name in kept)
    assert resumed.summary() == whole.summary() and resumed.rounding == whole.rounding == 2**-7


# Rounding is no variation


@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 1), (torch.float32, 8)])
def test_a_constant_with_rounding_noise_is_collapsed(dtype, units):
    rounded = units * torch.finfo(dtype).eps * (torch.rand(4096, 32, generator=torch.Generator().manual_seed(0)) - 0.5)
    constant = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    exact = (constant * (1 + rounded.double())).float()
    summary = statistics_of(exact, computed_in=dtype).summary()
    assert (summary["norm"], summary["rank"], summary["rank_share"], summary["rank_me"]) == (0, 1, 0, 1)
    assert summary["std"] < torch.finfo(dtype).eps * 3 * units
    assert statistics_of(exact.double()).summary()["rank"] > 20  # what it would be taken for


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_the_rounding_of_an_encoder_is_below_what_counts_as_variation(amp):
    torch.manual_seed(0)
    encoder = ContextEncoder("vit_tiny_patch16_224", 32, patch_size=8, embed_dim=48, depth=4, num_heads=4).eval()
    images = torch.randn(24, 3, 32, 32)
    with torch.no_grad():
        with torch.autocast("cpu", amp, enabled=amp is not None):
            rounded = encoder(images).double()
        exact = encoder.double()(images.double())
    error = torch.linalg.svdvals((rounded - exact).flatten(0, 1))[0] / math.sqrt(24 * 16)
    relative = error / exact.square().mean().sqrt()
    assert rounding_of(amp or torch.float32) / 100 < relative < rounding_of(amp or torch.float32)


# RankMe, alpha-ReQ, LiDAR


def test_rank_me_is_the_papers_formula():
    features = noise(500, 10) * torch.linspace(0.1, 3, 10)
    features = features - features.mean(dim=0)
    sigma = np.linalg.svd(features.numpy(), compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    expected = math.exp(-sum(value * math.log(value) for value in p))
    assert rank_me(torch.from_numpy(sigma)) == pytest.approx(expected, rel=1e-12)
    assert statistics_of(features).summary()["rank_me"] == pytest.approx(expected, rel=1e-6)
    assert rank_me(torch.zeros(5)) == 1.0 == spectrum_rank(torch.zeros(5))


@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.5])
def test_alpha_req_of_a_power_law_is_its_exponent(exponent):
    rank = torch.arange(1, 200, dtype=torch.float64)
    law = 7 * rank ** (-exponent / 2)
    assert alpha_req(law) == pytest.approx(exponent, rel=1e-9)
    law[:2], law[100:] = 1e3, 0.0  # what comes before and behind the fit
    assert alpha_req(law) == pytest.approx(exponent, rel=1e-9)
    assert alpha_req(law[:5]) == pytest.approx(exponent, rel=1e-9)


def test_alpha_req_is_a_weighted_fit():
    eigenvalues = torch.rand(30, generator=torch.Generator().manual_seed(0)).sort(descending=True).values.double()
    x, y = np.log(np.arange(3, 31)), np.log(eigenvalues[2:].numpy())
    slope = np.polyfit(x, y, 1, w=np.sqrt(1 / np.arange(3, 31)))[0]  # numpy squares its weights
    assert alpha_req(eigenvalues.sqrt()) == pytest.approx(-slope, rel=1e-9)


@pytest.mark.parametrize("spectrum", [[], [1.0], [1.0, 0.5], [1.0, 0.5, 0.2], [1.0, 0.5, 0.2, 0.0], [0.0] * 9])
def test_alpha_req_of_too_few_eigenvalues_is_infinite(spectrum):
    assert alpha_req(torch.tensor(spectrum)) == math.inf


def lidar_by_loops(views, delta=1e-4):
    """arXiv:2312.04000, section 4, over views (views, images, D)."""
    views = views.numpy()
    number, images, dim = views.shape
    means = views.mean(axis=0)
    center = means.mean(axis=0)
    between, within = np.zeros((dim, dim)), delta * np.eye(dim)
    for image in range(images):
        between += np.outer(means[image] - center, means[image] - center) / images
        for view in range(number):
            difference = views[view, image] - means[image]
            within += np.outer(difference, difference) / (images * number)
    values, vectors = np.linalg.eigh(within)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.clip(np.linalg.eigvalsh(whiten @ between @ whiten), 1e-300, None)
    share = spectrum / spectrum.sum()
    return math.exp(-(share * np.log(share)).sum())


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 3.0])
def test_lidar_is_the_papers_formula_however_images_are_cut(spread):
    views = noise(1, 60, 5) * torch.tensor([4.0, 2, 1, 1, 0.1]) + 20 + spread * noise(3, 60, 5, seed=1)
    statistics = ViewStatistics(5)
    for part in views.split([1, 30, 29], dim=1):
        statistics.add(part)
    assert statistics.lidar() == pytest.approx(lidar_by_loops(views), rel=1e-6)


def test_lidar_of_images_that_are_all_alike_is_one():
    statistics = ViewStatistics(16)
    row = 3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    statistics.add((row * (1 + 1e-7 * torch.randn(4, 50, 16))).float())
    assert statistics.lidar() == 1.0


def test_lidar_of_well_told_images_is_the_rank_between_them():
    images = with_spectrum(3.0, 3.0, 3.0, 0, 0, 0)
    statistics = ViewStatistics(6)
    statistics.add(images + 1e-6 * noise(4, 40, 6))
    assert statistics.lidar() == pytest.approx(3, rel=1e-3)


def test_lidar_sees_no_variation_where_that_of_views_drowns_it():
    images = with_spectrum(1.0, 1.0, 1.0, 1.0)
    views = images + torch.tensor([0.0, 0, 100, 100]) * noise(50, 40, 4)
    views[:, :, 2:] -= views.mean(dim=0)[:, 2:] - images[:, 2:]  # views differ, their means do not
    statistics = ViewStatistics(4)
    statistics.add(views)
    assert statistics.lidar() == pytest.approx(2, rel=0.01)


# Windows of a level


@pytest.mark.parametrize(("pool", "height", "width"), [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 3, 4), (9, 3, 5)])
def test_a_level_is_the_means_of_all_windows_of_its_size(pool, height, width):
    grid, features = (3, 5), noise(2, 15, 4)
    maps = features.view(2, 3, 5, 4)
    rows, columns = range(3 - height + 1), range(5 - width + 1)
    expected = [maps[:, r : r + height, c : c + width].flatten(1, 2).mean(dim=1) for r in rows for c in columns]
    assert torch.allclose(pool_sliding(features, grid, Level(pool)), torch.stack(expected, dim=1))
    assert num_disjoint_cells(grid, Level(pool)) == (3 // height) * (5 // width)


def test_the_coarsest_level_is_the_mean_of_the_image():
    features = noise(2, 15, 4)
    assert torch.allclose(pool_sliding(features, (3, 5), Level("image")), features.mean(dim=1, keepdim=True))
    assert num_disjoint_cells((3, 5), Level("image")) == 1


@pytest.mark.parametrize(
    ("dim", "samples", "images"), [(16, 36, 128), (1280, 256, 128), (1280, 4, 640), (16, 1, 2048), (1280, 1, 2560)]
)
def test_images_are_as_many_as_have_samples_enough(dim, samples, images):
    assert images_needed(dim, samples) == images


# The fixed set of images, and views of it

CONFIG = DataConfig(dataset="digits", image_size=20, num_workers=0)


def global_state():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("dataset", ["digits", "digit_pages", "fake"])
def test_the_set_is_evenly_spaced_and_equals_what_evaluation_sees(dataset):
    config = DataConfig(dataset=dataset, image_size=20, fake_size=60)
    source = open_split(config, "train")
    before = global_state()
    images = FixedImageSubset(config, source, 7, batch_size=3)
    batches = list(images)
    assert [len(batch["images"]) for batch in batches] == [3, 3, 1] and len(images) == 3
    starts = [number * len(source.images) // 7 for number in range(8)]
    assert all(start <= index < end for start, index, end in zip(starts, images.indices, starts[1:], strict=False))
    assert images.pixels.shape == (7, config.channels, 20, 20)
    again = torch.cat([batch["images"] for batch in FixedImageSubset(config, source, 7)])
    seen = torch.cat([batch["images"] for batch in batches])
    assert torch.equal(seen, again)
    assert global_state() == before
    if dataset != "digit_pages":  # whose pages are drawn when they are read
        whole = torch.cat([batch["images"] for batch in build_loader(config, source, 0, train=False)])
        assert torch.allclose(seen, whole[images.indices], atol=1e-6)
        assert images.labels.tolist() == [source.images[index][1] for index in images.indices]


@pytest.mark.parametrize(("count", "world_size"), [(10, 3), (2, 4), (10**6, 7)])
def test_shares_of_the_set_are_a_partition_without_an_empty_one(count, world_size):
    source = open_split(CONFIG, "train")
    shares = [
        FixedImageSubset(CONFIG, source, count, rank=rank, world_size=world_size).indices for rank in range(world_size)
    ]
    whole = FixedImageSubset(CONFIG, source, max(count, world_size)).indices
    assert sorted(index for share in shares for index in share) == whole and all(shares)
    assert len(whole) == min(max(count, world_size), len(source.images))


def test_labels_that_come_round_are_all_in_the_set():
    """Pages of digits have the classes 0 to 9 in turn, and every 50th page would be a zero."""
    source = open_split(DataConfig(dataset="digit_pages"), "train")
    classes = [index % 10 for index in FixedImageSubset(CONFIG, source, 128).indices]
    assert min(classes.count(label) for label in range(10)) >= 5


def test_a_set_has_at_least_one_image():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        FixedImageSubset(CONFIG, open_split(CONFIG, "train"), 0)


class Shelf:
    """Ten gray images, number i of brightness i; some cannot be read."""

    def __init__(self, damaged):
        self.damaged = damaged

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.damaged:
            raise OSError("truncated")
        return Image.new("L", (20, 20), index), index


def test_damaged_images_are_left_out_and_named():
    images = FixedImageSubset(CONFIG, DatasetSplit(Shelf({2, 5}), DIGITS, ((0.5,), (0.5,))), 10, batch_size=4)
    assert images.labels.tolist() == [0, 1, 3, 4, 6, 7, 8, 9] and len(images) == 2
    assert [batch["damaged"] for batch in images] == [["2: truncated", "5: truncated"], []]
    with pytest.raises(DataError, match="could not be read"):
        FixedImageSubset(CONFIG, DatasetSplit(Shelf(range(10)), DIGITS, ((0.5,), (0.5,))), 10).load()


def gradients(size=32):
    """Two images whose channels are the column and the row of each pixel's middle, from 0 to 1."""
    line = (torch.arange(size) + 0.5) / size
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size)]).expand(2, 2, size, size).clone()


def test_views_are_square_crops_inside_the_image_of_all_sizes_half_of_them_mirrored():
    images = gradients()
    before = global_state()
    views = random_views(images, 200, 3, "a", scale=(0.25, 0.8))
    assert global_state() == before
    assert len(views) == 200 and all(view.shape == images.shape for view in views)
    views = torch.stack(views).flatten(0, 1)
    width = (views[:, 0, 10, 20] - views[:, 0, 10, 10]) * 32 / 10  # of the crop; negative where mirrored
    height = (views[:, 1, 20, 10] - views[:, 1, 10, 10]) * 32 / 10
    assert torch.allclose(width.abs(), height, atol=1e-4)
    area = height.square()
    assert 0.25 - 1e-4 < area.min() < 0.28 and 0.77 < area.max() < 0.8 + 1e-4
    assert area.mean() == pytest.approx(0.525, abs=0.03)
    assert (width < 0).double().mean() == pytest.approx(0.5, abs=0.08)
    left = views[:, 0].amin(dim=(1, 2))
    middle_x, middle_y = views[:, 0].mean(dim=(1, 2)), views[:, 1].mean(dim=(1, 2))
    half = height / 2
    assert (middle_x - half > -0.01).all() and (middle_x + half < 1.01).all()
    assert (middle_y - half > -0.01).all() and (middle_y + half < 1.01).all()
    assert left.min() < 0.03 and views[:, 0].amax() > 0.97  # as far as the edges


def test_views_are_named_draws():
    images = gradients()
    first, same, other = (random_views(images, 3, *parts) for parts in ((0, 1), (0, 1), (0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0][0], first[0][1])
