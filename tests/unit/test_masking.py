"""Multi-block masks, measured over 10,240 images on each of four grids."""

import math
import re
from functools import cache

import numpy as np
import pytest
import torch

from hjepa_engine.masking import MultiBlockMasks, blocks

GRIDS = [(8, 8), (14, 14), (16, 16), (12, 20)]
STEPS, BATCH = 160, 64
# |z| of an unbiased count stays below this in all of some 3,000 comparisons; the reference sampler's bias gives 50.
Z = 4.5

every_grid = pytest.mark.parametrize("grid", GRIDS, ids="{0[0]}x{0[1]}".format)


@cache
def draws(grid):
    """10,240 images: context (n, H, W) bool, targets (n, H, W) number of blocks on each patch, and the masks."""
    sampler = MultiBlockMasks(grid)
    contexts, targets, masks = [], [], []
    for step in range(STEPS):
        drawn = sampler.sample(BATCH, seed=3, step=step)
        context, target = np.zeros((BATCH, math.prod(grid)), bool), np.zeros((BATCH, math.prod(grid)), int)
        for image in range(BATCH):
            context[image, drawn.context_idx[image].numpy()] = True
            np.add.at(target[image], drawn.target_idx[image].flatten().numpy(), 1)
        contexts.append(context)
        targets.append(target)
        masks.append(drawn)
    return np.concatenate(contexts).reshape(-1, *grid), np.concatenate(targets).reshape(-1, *grid), masks


def z_scores(differences):
    """How far sums over independent images (n, ...) of zero-mean numbers are from 0, in standard deviations."""
    spread = np.sqrt(np.square(differences).sum(axis=0))
    return differences.sum(axis=0) / np.maximum(spread, 1e-9)


@every_grid
def test_every_patch_is_reached_as_context_and_as_target(grid):
    context, target, _ = draws(grid)
    assert len(context) >= 10_000
    # Not just once: the rarest patch is seen in one image out of fifty at least.
    assert context.mean(axis=0).min() > 0.02
    assert (target > 0).mean(axis=0).min() > 0.02


@every_grid
@pytest.mark.parametrize("axis", [1, 2], ids=["up-down", "left-right"])
def test_mirrored_patches_are_context_and_target_equally_often(grid, axis):
    for counts in draws(grid)[:2]:
        differences = counts.astype(float) - np.flip(counts, axis=axis)
        assert np.abs(z_scores(differences)).max() < Z


@every_grid
def test_last_row_and_column_are_reached_as_often_as_the_first(grid):
    for counts in draws(grid)[:2]:
        counts = counts.astype(float)
        for first, last in (
            (counts[:, 0].sum(axis=1), counts[:, -1].sum(axis=1)),
            (counts[:, :, 0].sum(axis=1), counts[:, :, -1].sum(axis=1)),
            (counts[:, 0, 0], counts[:, -1, -1]),
            (counts[:, 0, -1], counts[:, -1, 0]),
        ):
            assert abs(z_scores(first - last)) < 4
            assert last.mean() == pytest.approx(first.mean(), rel=0.15)


@every_grid
def test_no_context_patch_lies_in_any_target_block(grid):
    context, target, _ = draws(grid)
    assert not (context & (target > 0)).any()


@every_grid
def test_context_is_ascending_unique_and_equally_long_in_a_batch(grid):
    for masks in draws(grid)[2]:
        assert masks.context_idx.dtype == masks.target_idx.dtype == torch.int64
        assert masks.context_idx.shape[0] == BATCH and masks.context_idx.shape[1] >= 1
        assert (masks.context_idx.diff(dim=1) > 0).all()
        assert masks.context_idx.min() >= 0 and masks.context_idx.max() < math.prod(grid)


@every_grid
def test_targets_are_rectangles_of_the_reported_block_row_by_row(grid):
    for masks in draws(grid)[2]:
        height, width = masks.block
        rows, columns = masks.target_idx // grid[1], masks.target_idx % grid[1]
        top, left = rows[:, :, :1], columns[:, :, :1]
        place = torch.arange(height * width)
        assert masks.target_idx.shape == (BATCH, 4, height * width)
        assert (rows == top + place // width).all() and (columns == left + place % width).all()
        assert (top + height <= grid[0]).all() and (left + width <= grid[1]).all()


@every_grid
def test_block_shapes_keep_scale_and_aspect_to_within_rounding(grid):
    shapes = {masks.block for masks in draws(grid)[2]}
    assert len(shapes) > 2
    for height, width in shapes:
        low, high = height - 0.5, height + 0.5
        assert (high * (width + 0.5)) / math.prod(grid) >= 0.15 and (low * (width - 0.5)) / math.prod(grid) <= 0.2
        assert high / (width - 0.5) >= 0.75 and low / (width + 0.5) <= 1.5


@every_grid
def test_the_context_fills_the_context_block_first_and_then_what_is_nearest_to_it(grid):
    """In none of the steps a patch is seen that is farther from the context block than one that is free and not seen."""
    sampler, more, fewer = MultiBlockMasks(grid), 0, 0
    kept_more_often, ranks = [], []
    row, column = np.mgrid[: grid[0], : grid[1]]
    for step in range(STEPS):
        shape, number = sampler._draw_step(3, step)
        layouts = sampler._draw_layouts(shape, number, BATCH, 3, step, 0)
        top, left = layouts.tops[:, :1, None], layouts.lefts[:, :1, None]
        bottom, right = top + shape.context[0] - 1, left + shape.context[1] - 1
        ring = np.maximum.reduce([top - row, row - bottom, left - column, column - right]).clip(0).reshape(BATCH, -1)
        kept, target = (each[step * BATCH : (step + 1) * BATCH].reshape(BATCH, -1) for each in draws(grid)[:2])
        outermost = np.where(kept, ring, 0).max(axis=1, keepdims=True)
        free = target == 0
        assert (kept | ~free | (ring >= outermost)).all()
        more, fewer = more + (outermost == 0).sum(), fewer + (outermost > 0).sum()
        # Within the outermost ring every free patch is kept with the same probability ...
        chosen = free & (ring == outermost)
        number_chosen = (kept & chosen).sum(axis=1, keepdims=True)
        chance = number_chosen / chosen.sum(axis=1, keepdims=True)
        kept_more_often.append(np.where(chosen, kept - chance, 0.0))
        # ... so that the mean place among them, counted row by row, is the middle.
        place = np.cumsum(chosen, axis=1) - 1
        middle = (chosen.sum(axis=1) - 1) / 2
        ranks.append((place * (kept & chosen)).sum(axis=1) / number_chosen[:, 0] - middle)
    assert more > 500 and fewer > 500
    assert np.abs(z_scores(np.concatenate(kept_more_often))).max() < Z
    assert abs(z_scores(np.concatenate(ranks))) < 4


@every_grid
def test_thrown_away_is_the_share_of_visible_patches_that_are_not_kept(grid):
    sampler = MultiBlockMasks(grid)
    kept = seen = 0
    for step in range(20):
        shape, number = sampler._draw_step(3, step)
        layouts = sampler._draw_layouts(shape, number, BATCH, 3, step, 0)
        context = sampler._cells(layouts.context)
        assert (context.sum(axis=1) == math.prod(shape.context)).all()
        masks = draws(grid)[2][step]
        for image in range(BATCH):
            visible = set(np.flatnonzero(context[image])) - set(masks.target_idx[image].flatten().tolist())
            kept, seen = kept + len(visible & set(masks.context_idx[image].tolist())), seen + len(visible)
    assert sampler.thrown_away(BATCH, seed=3, steps=20) == pytest.approx(1 - kept / seen)
    # The reference sampler's is 36 % on 14 x 14 at 128 images and 56 % on 8 x 8 at 256.
    assert 0.05 < 1 - kept / seen < 0.25


SETTINGS = [*((grid, {}) for grid in GRIDS), ((4, 4), {"num_targets": 2, "target_scale": (0.25, 0.35)})]


def placement(tops, lefts, block, grid):
    """Of target blocks (images, M): the mean share that two have in common, and their frequencies by row and by column.

    Frequencies are of blocks on each row or column, and of blocks that begin there.
    """
    pairs = np.triu_indices(tops.shape[1], 1)
    shares, frequencies = [], []
    for first, size, length in zip((tops, lefts), block, grid, strict=True):
        shares.append((1 - np.abs(first[:, pairs[0]] - first[:, pairs[1]]) / size).clip(0))
        begins = np.bincount(first.ravel(), minlength=length)[: length - size + 1] / first.size
        frequencies += [np.convolve(begins, np.ones(size)), begins]
    return (shares[0] * shares[1]).mean(), frequencies


def edge_over_middle(frequency):
    middle = (len(frequency) - 1) // 2
    return (frequency[0] + frequency[-1]) / (frequency[middle] + frequency[-1 - middle])


@pytest.mark.parametrize(("grid", "arguments"), SETTINGS)
def test_targets_lie_as_if_each_was_placed_independently_and_uniformly(grid, arguments):
    """Beside blocks of the same shapes at the positions of a generator, over 38,400 images."""
    sampler, generator = MultiBlockMasks(grid, **arguments), np.random.default_rng(0)
    overlaps, ratios = [], []
    for step in range(300):
        masks = sampler.sample(128, 0, step)
        corners = masks.target_idx[:, :, 0].numpy()
        blocks = [(corners // grid[1], corners % grid[1])]
        places = [side - size + 1 for side, size in zip(grid, masks.block, strict=True)]
        blocks.append([generator.integers(0, number, corners.shape) for number in places])
        found = [placement(*each, masks.block, grid) for each in blocks]
        overlaps.append([each[0] for each in found])
        ratios.append([[edge_over_middle(frequency) for frequency in each[1]] for each in found])
    ours, independent = np.mean(overlaps, axis=0)
    assert abs(ours / independent - 1) < 0.05
    (ours, independent) = np.mean(ratios, axis=0)
    assert ((ours / independent > 0.92) & (ours / independent < 1.03)).all()
    # Blocks begin at the first and last possible row and column as often as in the middle, give or take.
    assert (ours[1::2] > 0.92).all()


@pytest.mark.parametrize(("grid", "arguments"), SETTINGS)
def test_few_layouts_are_drawn_again(grid, arguments):
    sampler, again = MultiBlockMasks(grid, **arguments), 0
    for step in range(100):
        shape, number = sampler._draw_step(0, step)
        layouts, first = (sampler._draw_layouts(shape, least, 128, 0, step, 0) for least in (number, 0))
        assert layouts.num_free(sampler.num_patches).min() >= number
        moved = ((layouts.tops != first.tops) | (layouts.lefts != first.lefts)).any(axis=1)
        assert (moved <= (first.num_free(sampler.num_patches) < number)).all()
        again += moved.sum()
    assert again <= 0.06 * 100 * 128


@pytest.mark.parametrize("grid", [*GRIDS, (4, 4)])
def test_no_layout_is_drawn_again_where_disjoint_targets_leave_k_patches(grid):
    aspects = np.linspace(0.75, 1.5, 200)
    num_patches, scale = math.prod(grid), 0.35 if grid == (4, 4) else 0.2
    largest = max(math.prod(MultiBlockMasks(grid)._target_shape(scale, aspect)) for aspect in aspects)
    keep = (num_patches - 2 * largest) / num_patches
    sampler = MultiBlockMasks(grid, 2, (0.15, scale), context_keep=(keep, keep))
    for step in range(50):
        shape, number = sampler._draw_step(0, step)
        assert number == num_patches - 2 * largest > 0
        layouts, first = (sampler._draw_layouts(shape, least, 128, 0, step, 0) for least in (number, 0))
        assert (layouts.tops == first.tops).all() and (layouts.lefts == first.lefts).all()


@every_grid
def test_context_keep_sets_the_share_of_the_grid_that_is_seen(grid):
    keep = (0.15, 0.25)
    sampler, other = MultiBlockMasks(grid, context_keep=keep), MultiBlockMasks(grid)
    lengths = []
    for step in range(STEPS):
        masks = sampler.sample(8, 3, step)
        check_layouts(sampler, masks)
        assert masks.block == other.sample(1, 3, step).block  # the share is drawn beside the shapes
        assert masks.context_idx.shape[1] == sampler.sample(3, 3, step, offset=50).context_idx.shape[1]
        lengths.append(masks.context_idx.shape[1])
    low, high = (round(share * math.prod(grid)) for share in keep)
    assert (min(lengths), max(lengths)) == (low, high)
    assert len(set(lengths)) == min(8, high - low + 1)
    assert np.mean(lengths) == pytest.approx((low + high) / 2, rel=0.05)


def test_the_share_of_the_reference_sampler_can_be_kept():
    sampler = MultiBlockMasks((16, 16), context_keep=(0.267, 0.267))
    assert {sampler.sample(2, 0, step).context_idx.shape[1] for step in range(20)} == {68}


def test_a_share_that_the_largest_blocks_do_not_leave_is_refused_with_the_largest_one_that_they_do():
    says = "context_keep must be at most 0.25 where 2 target blocks may be 2 x 3 patches of 4 x 4, got (0.2, 0.5)"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        MultiBlockMasks((4, 4), 2, (0.25, 0.35), context_keep=(0.2, 0.5))
    MultiBlockMasks((4, 4), 2, (0.25, 0.35), context_keep=(0.2, 0.25))


def test_a_context_block_of_few_patches_is_not_filled_up_beyond_its_median():
    sampler = MultiBlockMasks((14, 14), context_scale=(0.25, 0.25))
    lengths = {sampler.sample(1, 0, step).context_idx.shape[1] for step in range(50)}
    assert min(lengths) >= 1 and max(lengths) < 7 * 7


@every_grid
def test_one_block_is_placed_uniformly_and_covers_patches_as_geometry_says(grid):
    """With a context block that fills the grid and one target, no layout is ever drawn again."""
    sampler = MultiBlockMasks(grid, num_targets=1, target_scale=(0.18, 0.18), aspect_ratio=(1, 1), context_scale=(1, 1))
    masks = sampler.sample(10_000, seed=0)
    height, width = masks.block
    corners = torch.bincount(masks.target_idx[:, 0, 0], minlength=math.prod(grid)).view(grid)
    places = (grid[0] - height + 1, grid[1] - width + 1)
    assert corners[places[0] :].sum() == corners[:, places[1] :].sum() == 0
    expected = 10_000 / math.prod(places)
    chi_square = ((corners[: places[0], : places[1]] - expected).square() / expected).sum().item()
    degrees_of_freedom = math.prod(places) - 1
    assert abs(chi_square - degrees_of_freedom) < 4 * math.sqrt(2 * degrees_of_freedom)

    assert masks.context_idx.shape[1] == math.prod(grid) - height * width
    seen = torch.zeros(10_000, math.prod(grid)).scatter_(1, masks.context_idx, 1.0).mean(dim=0).view(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            over = sum(row - height < top <= row for top in range(places[0]))
            beside = sum(column - width < left <= column for left in range(places[1]))
            chance = 1 - over * beside / math.prod(places)
            assert seen[row, column].item() == pytest.approx(chance, abs=0.025)


@every_grid
def test_first_attempts_place_every_block_uniformly(grid):
    sampler = MultiBlockMasks(grid)
    shape, _ = sampler._draw_step(0, 0)
    tops, lefts, *_ = sampler._lay_out(shape, np.random.default_rng(0).random((20_000, 2 * 5)))
    for block, (height, width) in enumerate([shape.context] + [shape.target] * 4):
        for corner, length, side in ((tops, grid[0], height), (lefts, grid[1], width)):
            counts = np.bincount(corner[:, block], minlength=length - side + 1)
            assert len(counts) == length - side + 1
            assert np.abs(counts - 20_000 / len(counts)).max() < 5 * math.sqrt(20_000 / len(counts))


@every_grid
def test_images_do_not_depend_on_who_else_is_in_the_batch(grid):
    sampler = MultiBlockMasks(grid)
    for step in range(20):
        few, many = sampler.sample(16, 5, step), sampler.sample(256, 5, step)
        assert few.block == many.block
        assert torch.equal(few.context_idx, many.context_idx[:16])
        assert torch.equal(few.target_idx, many.target_idx[:16])


@every_grid
def test_slices_by_offset_make_up_the_whole_batch(grid):
    sampler = MultiBlockMasks(grid)
    whole = sampler.sample(24, 1, 7)
    slices = [sampler.sample(size, 1, 7, offset) for offset, size in ((0, 5), (5, 1), (6, 18))]
    assert torch.equal(torch.cat([part.context_idx for part in slices]), whole.context_idx)
    assert torch.equal(torch.cat([part.target_idx for part in slices]), whole.target_idx)
    assert {part.block for part in slices} == {whole.block}


@every_grid
def test_distribution_is_the_same_at_batch_16_and_256(grid):
    """Equal rows at equal steps say it exactly; here other images of the same steps are compared, by their means."""
    sampler = MultiBlockMasks(grid)
    small, large = np.zeros((0, 2)), np.zeros((0, 2))
    for step in range(40):
        few, many = sampler.sample(16, 9, step), sampler.sample(256, 9, step)
        assert few.context_idx.shape[1] == many.context_idx.shape[1]
        for name, masks in (("small", few), ("large", many)):
            row = masks.context_idx.double().mean(dim=1) / (math.prod(grid) - 1)
            spread = masks.target_idx[:, :, 0].double().std(dim=1) / math.prod(grid)
            table = torch.stack([row, spread], dim=1).numpy()
            if name == "small":
                small = np.concatenate([small, table])
            else:
                large = np.concatenate([large, table[16:]])
    error = np.sqrt(small.var(axis=0) / len(small) + large.var(axis=0) / len(large))
    assert (np.abs(small.mean(axis=0) - large.mean(axis=0)) < 4 * error).all()


@every_grid
def test_number_of_context_patches_depends_on_the_block_shapes_alone(grid):
    first, second = MultiBlockMasks(grid), MultiBlockMasks(grid)
    found = {}
    for step in range(STEPS):
        for seed in (3, 4):
            shape, expected = first._draw_step(seed, step)
            number = first.sample(2, seed, step).context_idx.shape[1]
            assert found.setdefault(shape, number) == number == expected
    # A fresh sampler that meets the shapes in another order finds the same numbers.
    for step in reversed(range(STEPS)):
        shape, number = second._draw_step(3, step)
        assert found[shape] == number
    assert len(set(found.values())) <= min(len(found), 32)


def test_masks_are_a_function_of_seed_and_step():
    sampler = MultiBlockMasks((14, 14))

    def drawn(seed, step, sampler=sampler):
        masks = sampler.sample(8, seed, step)
        return masks.block, masks.context_idx.tolist(), masks.target_idx.tolist()

    torch.manual_seed(0)
    np.random.seed(0)
    first = drawn(0, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert drawn(0, 0) == drawn(0, 0, MultiBlockMasks((14, 14))) == first
    assert drawn(1, 0)[1:] != first[1:]
    assert drawn(0, 1)[1:] != first[1:]
    # Seed and step are no summands of one number.
    assert drawn(1, 2)[1:] != drawn(2, 1)[1:]


def test_sampling_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    MultiBlockMasks((8, 8)).sample(4, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def check_layouts(sampler, masks):
    num_patches = sampler.num_patches
    for context, targets in zip(masks.context_idx.tolist(), masks.target_idx.flatten(1).tolist(), strict=True):
        assert len(context) == len(set(context)) > 0
        assert not set(context) & set(targets)
        assert min(context + targets) >= 0 and max(context + targets) < num_patches


def test_when_all_attempts_fail_stacked_targets_still_leave_k_patches(monkeypatch):
    monkeypatch.setattr(blocks, "_ATTEMPTS", 2)
    sampler = MultiBlockMasks((8, 8))
    stacked = 0
    for step in range(20):
        masks = sampler.sample(64, 0, step)
        check_layouts(sampler, masks)
        assert masks.context_idx.shape == (64, sampler._draw_step(0, step)[1])
        stacked += (masks.target_idx == masks.target_idx[:, :1]).all(dim=2).all(dim=1).sum().item()
    assert stacked > 20  # of 1,280: the fallback was at work


@pytest.mark.parametrize(
    ("grid", "arguments"),
    [
        ((2, 2), {"target_scale": (0.25, 0.25), "aspect_ratio": (1, 1)}),
        ((1, 8), {"target_scale": (0.1, 0.1), "aspect_ratio": (0.9, 1.1)}),
        ((3, 3), {"num_targets": 9, "target_scale": (0.1, 0.2), "aspect_ratio": (1, 1)}),
        ((6, 6), {"num_targets": 60}),
        ((4, 4), {}),
        ((4, 64), {"aspect_ratio": (0.1, 0.2)}),
        ((64, 3), {"aspect_ratio": (5, 10)}),
    ],
)
def test_tiny_crowded_and_lengthy_grids_keep_a_context(grid, arguments):
    sampler = MultiBlockMasks(grid, **arguments)
    for step in range(10):
        check_layouts(sampler, sampler.sample(16, 0, step))


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("grid", {"grid": (0, 8)}),
        ("grid", {"grid": (8, 65)}),
        ("num_targets", {"num_targets": 0}),
        ("target_scale", {"target_scale": (0.0, 0.2)}),
        ("target_scale", {"target_scale": (0.3, 0.2)}),
        ("target_scale", {"target_scale": (0.5, 1.1)}),
        ("target_scale", {"target_scale": (math.nan, 0.2)}),
        ("aspect_ratio", {"aspect_ratio": (-1.0, 1.0)}),
        ("aspect_ratio", {"aspect_ratio": (1.5, 0.75)}),
        ("context_scale", {"context_scale": (0.0, 1.0)}),
        ("context_scale", {"context_scale": (0.9, 1.5)}),
        # A block of the asked size and shape is higher or wider than the grid.
        ("target_scale", {"target_scale": (0.9, 0.9), "aspect_ratio": (1.4, 1.5)}),
        ("aspect_ratio", {"aspect_ratio": (0.1, 1.0), "target_scale": (0.5, 0.5)}),
        ("target_scale", {"grid": (2, 32)}),
        # The smallest context block may lie under the largest target.
        ("context_scale", {"context_scale": (0.1, 0.2)}),
        ("context_scale", {"target_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}),
        ("context_keep", {"context_keep": (0.0, 0.2)}),
        ("context_keep", {"context_keep": (0.2, 0.1)}),
        ("context_keep", {"context_keep": (0.2, 1.1)}),
        # Less than one patch, and more than the largest targets leave.
        ("context_keep", {"context_keep": (0.001, 0.2)}),
        ("context_keep", {"context_keep": (0.2, 0.6)}),
    ],
)
def test_impossible_settings_are_refused_by_name(argument, arguments):
    with pytest.raises(ValueError, match=argument) as caught:
        MultiBlockMasks(**{"grid": (8, 8), **arguments})
    assert "\n" not in str(caught.value)
