"""Random masks: single patches anywhere, counted over many images."""

import numpy as np
import pytest
import torch

from hjepa_engine.config.schema import Level
from hjepa_engine.masking import RandomMasks
from hjepa_engine.visualization.figures import draw_masks

GRID, PATCHES = (4, 6), 24


def test_every_patch_is_either_seen_or_predicted():
    masks = RandomMasks(GRID, (0.25, 0.25)).sample(50, seed=1, step=3)
    assert masks.context_idx.shape == (50, 6)
    assert masks.target_idx.shape == (50, 18, 1)
    assert masks.block == (1, 1)
    assert (masks.context_idx.diff(dim=1) > 0).all()
    together = torch.cat([masks.context_idx, masks.target_idx[:, :, 0]], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(PATCHES).expand(50, -1))


def test_every_patch_and_every_pair_of_patches_is_seen_equally_often():
    images = 20_000
    masks = RandomMasks(GRID, (0.25, 0.25)).sample(images, seed=0)
    seen = np.zeros((images, PATCHES))
    np.put_along_axis(seen, masks.context_idx.numpy(), 1, axis=1)
    share = 6 / 24
    assert np.abs(seen.mean(axis=0) - share).max() < 4.5 * (share * (1 - share) / images) ** 0.5
    pairs = (seen.T @ seen / images)[np.triu_indices(PATCHES, k=1)]
    both = 6 * 5 / (24 * 23)
    assert np.abs(pairs - both).max() < 4.5 * (both * (1 - both) / images) ** 0.5


def test_a_slice_of_the_batch_is_the_same_slice_of_the_whole_batch():
    sampler = RandomMasks(GRID, (0.2, 0.5))
    whole = sampler.sample(16, seed=5, step=2)
    part = sampler.sample(4, seed=5, step=2, offset=8)
    assert torch.equal(part.context_idx, whole.context_idx[8:12])
    assert torch.equal(part.target_idx, whole.target_idx[8:12])


def test_masks_are_a_function_of_seed_and_step():
    sampler = RandomMasks(GRID)
    drawn = sampler.sample(8, seed=1, step=0).context_idx
    assert torch.equal(sampler.sample(8, seed=1, step=0).context_idx, drawn)
    assert not torch.equal(sampler.sample(8, seed=1, step=1).context_idx, drawn)
    assert not torch.equal(sampler.sample(8, seed=2, step=0).context_idx, drawn)


def test_each_step_draws_one_number_of_visible_patches_from_the_range():
    sampler = RandomMasks((10, 20), (0.1, 0.45))
    counts = [sampler.sample(2, seed=0, step=step).context_idx.shape[1] for step in range(800)]
    assert sorted(set(counts)) == [20, 30, 40, 50, 60, 70, 80, 90]  # eight at most, evenly spaced
    assert min(counts.count(number) for number in set(counts)) > 60  # of 100 on average


@pytest.mark.parametrize("context_keep", [(0.001, 0.001), (0.01, 0.5), (0.5, 0.99)])
def test_ranges_that_hide_nothing_or_everything_are_refused_by_name(context_keep):
    with pytest.raises(ValueError, match="context_keep must keep 1 to 23 of 24 patches"):
        RandomMasks(GRID, context_keep)


@pytest.mark.parametrize("context_keep", [(0.0, 0.5), (0.5, 1.0), (0.6, 0.3), (float("nan"), 0.5)])
def test_ranges_that_are_none_are_refused_by_name(context_keep):
    with pytest.raises(ValueError, match="context_keep must satisfy 0 < low <= high < 1"):
        RandomMasks(GRID, context_keep)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="grid must be at least 1 x 1"):
        RandomMasks((0, 4))


def test_single_patches_are_outlined_where_they_are():
    masks = RandomMasks((8, 8)).sample(2, seed=0)
    figure = draw_masks(np.zeros((2, 32, 32, 3), np.float32), masks, (8, 8), [Level(depth=0)])
    for image in range(2):
        panel = figure.axes[3 * image + 2]  # image, context, level 0
        corners = {(edge.get_x(), edge.get_y()) for edge in panel.patches}
        assert {(edge.get_width(), edge.get_height()) for edge in panel.patches} == {(4, 4)}
        expected = {(4 * (patch % 8) - 0.5, 4 * (patch // 8) - 0.5) for patch in masks.target_idx[image, :, 0].tolist()}
        assert corners == expected
