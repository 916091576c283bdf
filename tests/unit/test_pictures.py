"""Pictures: what is drawn is what is there, in files and in every logger, and nothing of the training changes."""

import doctest
import json
import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from helpers import NOISE, mostly_slow, options, pretraining, same_bits, tiny_config

from hjepa_engine import load_config
from hjepa_engine.build import build_masks, build_schedules
from hjepa_engine.config.schema import Level, resolve_levels
from hjepa_engine.errors import ConfigError
from hjepa_engine.events import TrainEvents
from hjepa_engine.handlers import CollapseMonitor, Pictures
from hjepa_engine.levels import pool_target
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.loggers.media import Image, JsonValue
from hjepa_engine.masking import Masks, MultiBlockMasks
from hjepa_engine.recipes.pretrain import DEFAULT_CONFIG, build, main
from hjepa_engine.visualization import figures
from hjepa_engine.visualization.drawing import save, to_image
from hjepa_engine.visualization.figure_data import (
    Spectrum,
    dimmed,
    patch_colors,
    read_spectra,
    similarities,
    to_pixels,
)

ROOT = Path(__file__).parents[2]
GRID = (6, 6)
LEVELS = (Level(1), Level(2), Level("image"))
DRAWN = ["features", "masks", "similarity", "spectrum"]


def random_images(count=3, channels=3, size=24):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Images and masks


@pytest.mark.parametrize("stats", [((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), ((0.3,), (0.4,))])
def test_pixels_are_what_they_were_before_they_were_normalized(stats):
    images = random_images(channels=len(stats[0]))
    mean, std = (torch.tensor(values)[:, None, None] for values in stats)
    pixels = to_pixels((images - mean) / std, stats)
    assert pixels.shape == (3, 24, 24, 3)
    assert np.allclose(pixels, images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), atol=1e-6)


def patches_of(picture):
    """Pixels (H, W, 3) as (36, pixels of a patch)."""
    return picture.reshape(6, 4, 6, 4, 3).swapaxes(1, 2).reshape(36, -1)


def test_exactly_the_patches_that_are_not_listed_are_dimmed():
    pixels = to_pixels(random_images(1), ((0,), (1,)))[0]
    chosen = torch.tensor([0, 7, 35])
    same = (patches_of(dimmed(pixels, chosen, GRID)) == patches_of(pixels)).all(axis=1)
    assert np.flatnonzero(same).tolist() == chosen.tolist()
    gray = patches_of(dimmed(pixels, chosen, GRID))[~same].reshape(-1, 3)
    assert (gray[:, 0] == gray[:, 1]).all() and (gray[:, 0] == gray[:, 2]).all() and np.ptp(gray) < 0.13


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [LEVELS[:1], LEVELS, (Level("image"),)])
def test_a_row_of_the_masks_figure_shows_the_context_and_the_targets_of_its_image(channels, levels):
    masks = MultiBlockMasks(GRID, num_targets=2).sample(5, seed=3)
    pixels = to_pixels(random_images(3, channels), ((0,) * channels, (1,) * channels))
    figure = figures.draw_masks(pixels, masks, GRID, levels)
    rows = [figure.axes[start : start + 2 + len(levels)] for start in range(0, len(figure.axes), 2 + len(levels))]
    assert len(rows) == 3
    for image, (whole, context, *targets) in enumerate(rows):
        assert (whole.images[0].get_array() == pixels[image]).all()
        for axes, expected in [
            (context, set(masks.context_idx[image].tolist())),
            *((axes, set(masks.target_idx[image].flatten().tolist())) for axes in targets),
        ]:
            shown = patches_of(np.asarray(axes.images[0].get_array()))
            same = set(np.flatnonzero((shown == patches_of(pixels[image])).all(axis=1)).tolist())
            assert same == (set(range(36)) if axes is rows[image][-1] and levels[-1].pool == "image" else expected)


def test_blocks_are_outlined_and_cut_into_the_cells_that_the_level_pools():
    block = torch.tensor([[6 * row + column for row in (1, 2, 3) for column in (2, 3)]])  # 3 x 2 at row 1, column 2
    masks = Masks(torch.arange(6)[None], block[None], (3, 2))
    figure = figures.draw_masks(to_pixels(random_images(1), ((0,), (1,))), masks, GRID, LEVELS)
    found = []
    for axes in figure.axes[2:]:
        across, down = axes.collections
        (edge,) = {patch.get_bbox().bounds for patch in axes.patches}
        rows = [segment[0][1] for segment in across.get_segments()]
        columns = [segment[0][0] for segment in down.get_segments()]
        found.append((edge, rows, columns))
    assert found == [  # patches are 4 pixels wide, and pixel 0 is drawn from -0.5 to 0.5
        ((7.5, 3.5, 8.0, 12.0), [7.5, 11.5], [11.5]),
        ((7.5, 3.5, 8.0, 12.0), [11.5], []),  # of three rows, one is left for the second cell
        ((-0.5, -0.5, 24.0, 24.0), [], []),
    ]


# Features as color


def test_features_along_one_direction_are_shades_of_one_color_in_their_order():
    heights = torch.linspace(-1, 1, 8)[:, None, None].expand(8, 9, 1)
    direction = F.normalize(torch.tensor([1.0, -3.0, 2.0, 0.5]), dim=0)
    found = patch_colors(5 * noise(1, 9, 4) + heights * -direction)  # each place has a mean of its own
    assert found.explained == pytest.approx((1, 0, 0), abs=1e-6)
    red = found.colors[:, :, 0]
    # The largest loading, -3, counts as positive: red rises with the features' second dimension, and ends at 1 and 0.
    assert np.allclose(red, 0.5 + 0.5 * np.linspace(-1, 1, 8)[:, None], atol=1e-4)
    assert np.abs(found.colors[:, :, 1:] - 0.5).max() < 1e-2


def test_components_are_those_of_the_singular_value_decomposition():
    tokens = noise(16, 9, 12) * torch.linspace(3, 0.5, 12) + 10 * noise(1, 9, 12, seed=1)
    found = patch_colors(tokens)
    centered = (tokens - tokens.mean(0)).reshape(-1, 12).double()
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)
    assert found.explained == pytest.approx((values.square() / values.square().sum())[:3].tolist(), rel=1e-5)
    for component in range(3):
        drawn = 2 * torch.from_numpy(found.colors).reshape(-1, 3)[:, component] - 1
        inside = drawn.abs() < 1
        correlation = torch.corrcoef(torch.stack([drawn[inside], left[inside, component]]))[0, 1]
        assert abs(correlation) > 1 - 1e-5 and 0.95 < inside.float().mean() < 1


def test_colors_do_not_flip_from_one_figure_to_the_next():
    scale = torch.linspace(3, 0.3, 12)
    tokens = noise(32, 9, 12) * scale
    reference = patch_colors(tokens).colors
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    assert np.allclose(patch_colors(tokens[order]).colors, reference[order.numpy()], atol=1e-4)
    for seed in range(5):
        other = patch_colors(tokens + 0.02 * noise(32, 9, 12, seed=seed + 5)).colors
        assert np.abs(other - reference).mean() < 0.05


def test_a_collapsed_encoder_is_gray_and_said_to_be_collapsed():
    tokens = noise(1, 36, 16) + 1e-3 * noise(8, 36, 16, seed=1)  # differs between places, hardly between images
    found = patch_colors(tokens)
    assert found.variation == pytest.approx(1e-3, rel=0.2) and np.abs(found.colors - 0.5).max() < 0.02
    pixels = to_pixels(random_images(2), ((0,), (1,)))
    says = [text.get_text() for text in figures.draw_features(pixels, found, GRID).texts]
    assert any(re.search(r"by 0\.\d+ % of their norm: collapsed", text) for text in says)
    healthy = patch_colors(noise(8, 36, 16))
    assert not any("collapsed" in text.get_text() for text in figures.draw_features(pixels, healthy, GRID).texts)
    constant = patch_colors(torch.ones(4, 36, 2))
    assert (constant.colors == 0.5).all() and constant.explained == (0, 0, 0) and constant.variation == 0
    assert (patch_colors(torch.zeros(4, 36, 5)).colors == 0.5).all()


def test_each_patch_is_filled_with_its_color_beside_its_image():
    found = patch_colors(noise(9, 36, 16))
    pixels = to_pixels(random_images(9), ((0,), (1,)))
    shown = [axes.images[0].get_array() for axes in figures.draw_features(pixels, found, GRID).axes if axes.images]
    assert len(shown) == 18  # rows of eight and one, each with its colors below
    for image, number in enumerate([*range(8), 16]):
        colors = np.asarray(shown[number + (8 if image < 8 else 1)])
        assert (shown[number] == pixels[image]).all()
        assert (patches_of(colors).reshape(36, -1, 3) == found.colors[image][:, None]).all()


# Predictions and targets


def test_similarities_compare_with_other_images_at_the_same_place():
    # Two images with one block of one patch; a third one whose block is elsewhere.
    masks = Masks(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[[4]], [[4]], [[5]]]), (1, 1))
    targets = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=-1)[:, None, None]
    predictions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])[:, None, None]
    found = similarities(predictions, targets, masks, Level(1), 6)
    assert found.own == pytest.approx([1, 0, 1]) and sorted(found.others) == pytest.approx([0, 1])
    assert found.correct == 0.5  # the first is nearer to its own, the second to the other one's
    whole = similarities(predictions, targets, masks, Level("image"), 6)
    assert len(whole.others) == 6  # the place is the whole image: all pairs


@pytest.mark.parametrize("level", LEVELS)
def test_the_share_of_pairs_tells_seeing_from_knowing_the_place(level):
    masks = MultiBlockMasks(GRID, num_targets=2).sample(8, seed=0)
    tokens = 3 * noise(1, 36, 16) + noise(8, 36, 16, seed=1)  # the place says more than the image
    targets = pool_target(tokens, masks, level)
    place_only = pool_target(tokens.mean(0, keepdim=True).expand(8, -1, -1), masks, level)
    seeing, guessing, constant = (
        similarities(each, targets, masks, level, 6) for each in (targets, place_only, torch.ones_like(targets))
    )
    assert seeing.correct == 1 and seeing.own == pytest.approx(np.ones(len(seeing.own)))
    assert guessing.own.mean() > 0.8 and abs(guessing.correct - 0.5) < 0.2
    assert abs(constant.correct - 0.5) < 0.2


def test_one_image_alone_has_no_pairs_and_can_be_drawn():
    masks = MultiBlockMasks(GRID, num_targets=2).sample(1, seed=0)
    cells = noise(1, 2, masks.target_idx.shape[2], 8)
    found = similarities(cells, cells, masks, Level(1), 6)
    assert np.isnan(found.correct) and len(found.others) == 0
    title = figures.draw_similarities([found], LEVELS[:1]).axes[0].get_title(loc="left")
    assert "no pairs to compare" in title


def test_the_similarity_figure_has_a_panel_for_each_level():
    masks = MultiBlockMasks(GRID, num_targets=2).sample(8, seed=0)
    cells = noise(8, 2, masks.target_idx.shape[2], 8)
    found = [similarities(cells, cells, masks, Level(1), 6)] * 3
    titles = [axes.get_title(loc="left") for axes in figures.draw_similarities(found, LEVELS).axes]
    assert [title.splitlines()[0] for title in titles] == [
        "level 0, single patches", "level 1, 2 x 2 patches", "level 2, whole image"
    ]  # fmt: skip
    assert all("own target closer in 100 % of pairs" in title for title in titles)


# Spectra


def record(step, **media):
    return json.dumps(
        {"step": step, "epoch": 1, "time": 0.0, **{f"collapse/{name}": value for name, value in media.items()}}
    )


def test_spectra_are_read_back_from_a_runs_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    value = {"rank": [1, 2], "share": [0.7, 0.3]}
    lines = [record(0, target_spectrum=value), record(5, target_rank=2.0), record(5, target_spectrum=value),
             record(5, context_spectrum=value), record(9, target_spectrum=value)]  # fmt: skip
    path.write_text("\n".join(lines) + '\n{"step": 12, "collapse/target_spectrum": {"ra')  # cut short by a kill
    found = read_spectra(path)
    assert {name: [each.step for each in lines] for name, lines in found.items()} == {
        "target": [0, 5, 9],
        "context": [5],
    }
    assert found["context"] == [Spectrum(5, [1, 2], [0.7, 0.3])]
    assert [each.step for each in read_spectra(path, before=9)["target"]] == [0, 5]
    assert read_spectra(tmp_path / "none.jsonl") == {}


def test_spectra_are_lines_from_the_first_step_to_the_last_and_zeros_are_left_out():
    spectra = [Spectrum(step, [1, 2, 4], [0.5, 0.1 / (1 + step), 0.0]) for step in range(100)]
    panels = figures.draw_spectra({"context": spectra[:1], "target": spectra}).axes[:2]
    assert [axes.get_title(loc="left") for axes in panels] == ["context encoder", "target encoder"]
    one, many = ([line for line in axes.lines if len(line.get_xdata()) == 3] for axes in panels)
    assert len(one) == 1 and len(many) == 40
    assert many[0].get_ydata()[1] == 0.1 and many[-1].get_ydata()[1] == 0.1 / 100
    assert np.isnan(many[0].get_ydata()[2])
    assert len({line.get_color() for line in many}) == 40


# Files


def test_a_figure_is_saved_whole_with_the_pixels_that_loggers_get(tmp_path):
    image, again = (
        save(figures.draw_spectra({"target": [Spectrum(0, [1, 2], [0.7, 0.3])]}), tmp_path / folder / "a.png")
        for folder in ("new", "other")
    )
    assert image.path == tmp_path / "new" / "a.png" and [p.name for p in image.path.parent.iterdir()] == ["a.png"]
    assert (np.asarray(PIL.Image.open(image.path)) == image.pixels).all()
    assert image.pixels.shape[1] == 780 and len(np.unique(image.pixels.reshape(-1, 3), axis=0)) > 20
    assert again.path.read_bytes() == image.path.read_bytes()


def test_an_image_that_lies_in_a_file_already_is_not_stored_twice(tmp_path):
    pixels = np.zeros((2, 2, 3), np.uint8)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.open(None)
    writer.write_media({"a": Image(pixels, tmp_path / "figures" / "a.png"), "b": Image(pixels)}, 7, 1)
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["a"] == "figures/a.png" and [path.name for path in (tmp_path / "media").iterdir()] == ["b_00000007.png"]


def test_drawing_leaves_matplotlibs_settings_alone_and_starts_no_interface():
    import matplotlib

    def settings():
        return {
            name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"
        }  # reading chooses one

    before = settings()
    to_image(figures.draw_schedules({"x": {"": float}}, 5, 2))
    assert settings() == before and "matplotlib.pyplot" not in sys.modules


# The handler


def pictures(folder, config, **arguments):
    return Pictures(folder, resolve_levels(config), GRID, ((0.5,) * 3, (0.5,) * 3), **arguments)


class Spectra:
    """Puts a spectrum beside the metrics at every window's end, as ``CollapseMonitor`` does."""

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.write)

    def write(self, engine):
        value = {"rank": [1, 2], "share": [0.9, 0.1]}
        engine.state.media["collapse/target_spectrum"] = JsonValue(value)


def figures_in(folder):
    return sorted(path.name for path in (folder / "figures").glob("*"))


def lines_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("order", mostly_slow([0, 1], (1,)))
def test_a_run_draws_at_its_last_iteration_and_changes_no_weight(tmp_path, order):
    config = tiny_config(training__max_iters=7)
    drawing = pretraining(
        config,
        order=order,
        extra=[pictures(tmp_path, config), Spectra()],
        writers=[JsonlWriter(tmp_path / "metrics.jsonl")],
    ).run(max_iters=7)
    assert figures_in(tmp_path) == [f"{name}_00000007.png" for name in DRAWN]
    logged = {
        name: (line["step"], value) for line in lines_in(tmp_path / "metrics.jsonl") for name, value in line.items()
    }
    for name in DRAWN:
        step, path = logged[f"figures/{name}"]
        assert step == 7 and PIL.Image.open(tmp_path / path).format == "PNG"
    assert not (tmp_path / "media").exists()
    plain = pretraining(config).run(max_iters=7)
    assert same_bits(drawing.weights, plain.weights)


def test_figures_are_drawn_every_so_many_epochs_and_at_the_end(tmp_path):
    config = tiny_config(data__fake_size=16)
    pretraining(config, extra=[pictures(tmp_path, config, every=2, images=1)]).run(max_epochs=3)
    steps = [name.removeprefix("masks_") for name in figures_in(tmp_path) if name.startswith("masks_")]
    assert steps == ["00000004.png", "00000006.png"]
    assert not [name for name in figures_in(tmp_path) if name.startswith("spectrum")]  # none was measured


def test_the_spectrum_of_the_last_window_is_drawn_whoever_was_attached_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw_spectra", lambda spectra: drawn.append(spectra) or None)
    for name, extra in {"a": lambda p: [p, Spectra()], "b": lambda p: [Spectra(), p]}.items():
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config()
        writers = [JsonlWriter(folder / "metrics.jsonl")]
        pretraining(config, extra=extra(pictures(folder, config)), writers=writers).run(max_iters=4)
    assert [[each.step for each in spectra["target"]] for spectra in drawn] == [[2, 4], [2, 4]]


def test_a_folder_that_cannot_be_written_to_is_one_warning(tmp_path, caplog):
    (tmp_path / "figures").write_text("in the way")
    config = tiny_config()
    run = pretraining(config, extra=[pictures(tmp_path, config)]).run(max_iters=2)
    assert run.trainer.state.iteration == 2
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no picture of masks: FileExistsError: ")


def test_a_batch_of_another_kind_is_one_warning_and_no_picture(tmp_path, caplog):
    config = tiny_config()
    handler = pictures(tmp_path, config)
    run = pretraining(config, extra=[handler])
    handler.levels = LEVELS  # one more than the step has
    run.run(max_iters=2)
    assert len(caplog.messages) == 1 and "no picture of similarity: ValueError" in caplog.messages[0]
    assert [name.split("_")[0] for name in figures_in(tmp_path)] == ["features", "masks"]


@pytest.mark.parametrize("arguments", [{"images": 0}, {"every": 0}])
def test_impossible_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="images and every must be at least 1"):
        pictures(tmp_path, tiny_config(), **arguments)


REAL = {**NOISE, "model.num_hierarchies": 3, "probe.enabled": "false", "pictures.enabled": "true", "training.epochs": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"data.dataset": "digits", "data.image_size": 8, "data.batch_size": 64, "model.patch_size": 1,
         "training.max_iters": 2, "pictures.images": 2, "model.num_hierarchies": 1,
         "model.levels": "[{pool: 1, depth: 0.5}]"},
        {"model.levels": "[{pool: 1}, {pool: 4}, {pool: image}]", "training.use_amp": "true",
         "training.accumulation_steps": 2},
    ],
    ids=["gray images, one level", "three levels, bfloat16, accumulation"],
)  # fmt: skip
def test_the_recipes_run_draws_and_logs_its_pictures(tmp_path, changes):
    run = build(
        load_config(None, [*options({**REAL, **changes}), f"--run_dir={tmp_path}", "--training.warmup_epochs=0"])
    )
    assert any(isinstance(handler, CollapseMonitor) for handler in run.trainer.stateful_handlers().values())
    run.fit()
    step = run.trainer.state.optimizer_step
    assert figures_in(tmp_path) == [f"{name}_{step:08d}.png" for name in DRAWN]
    logged = [line for line in lines_in(tmp_path / "metrics.jsonl") if "figures/masks" in line]
    assert len(logged) == 1 and logged[0]["step"] == step
    assert (tmp_path / logged[0]["figures/masks"]).is_file()


# Preview


def table_in(text):
    """The rows of the preview's table, by what they are called."""
    header, *rest = [line for line in text.splitlines() if re.match(r"\s+(epoch|[\d.]+)\s+(step|\d+)\s", line)]
    names = re.split(r"\s{2,}", header.strip())
    return {re.split(r"\s{3}", line)[-1]: dict(zip(names, map(float, line.split()), strict=False)) for line in rest}


PREVIEW = {**NOISE, "training.epochs": 4, "training.warmup_epochs": 1, "model.ema.momentum_warmup_epochs": 0.5}


def test_the_preview_prints_the_schedules_and_masks_of_the_run_and_makes_nothing_else(tmp_path, capsys):
    words = [
        *options({**PREVIEW, "training.level_lrs": "[1e-3, 2e-4]", "pictures.images": 3}),
        f"--run_dir={tmp_path / 'run'}",
    ]
    main([*words, "--preview"])
    text = capsys.readouterr().out
    config = load_config(DEFAULT_CONFIG, words)
    schedules = build_schedules(config, 5)
    table = table_in(text)
    steps = {"start": 0, "end of warm-up": 4, "1/4": 5, "2/4": 10, "3/4": 15, "last step": 19}
    assert {name: row["step"] for name, row in table.items()} == steps
    for row in table.values():
        step = int(row["step"])
        assert row["epoch"] == step / 5
        expected = [
            schedules.lr(step),
            *schedules.level_lr(step),
            schedules.weight_decay(step),
            schedules.momentum(step),
        ]
        found = [row[name] for name in ("lr", "lr level 0", "lr level 1", "weight decay", "momentum")]
        assert found == pytest.approx(expected, rel=1e-5)
    drawn = [build_masks(config, GRID).sample(1, config.seed, step) for step in range(20)]
    visible = [each.context_idx.shape[1] for each in drawn]
    assert f"context: {min(visible)} to {max(visible)} (mean {np.mean(visible):.1f}) of 36 patches seen" in text
    cells = [each.target_idx[0].numel() for each in drawn]
    assert f"level 0, single patches: {min(cells)} to {max(cells)} (mean {np.mean(cells):.1f}) predicted in" in text
    assert "20 steps, 5 in an epoch" in text
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert made == ["run/preview/masks.png", "run/preview/schedules.png"]
    assert all(PIL.Image.open(tmp_path / path).size[0] > 500 for path in made)
    assert str(tmp_path / "run" / "preview" / "masks.png") in text


def test_the_masks_of_the_preview_are_those_of_the_first_step_on_its_images(tmp_path, monkeypatch):
    shown, seen = [], []
    draw = figures.draw_masks
    monkeypatch.setattr(figures, "draw_masks", lambda *words: shown.append(words) or draw(*words))
    words = [*options({**NOISE, "training.max_iters": 1, "probe.enabled": "false"}), f"--run_dir={tmp_path}"]
    main([*words, "--preview"])
    run = build(load_config(DEFAULT_CONFIG, words))
    run.trainer.add_event_handler(TrainEvents.FORWARD_COMPLETED, lambda: seen.append(run.trainer.state.batch))
    run.fit()  # in the folder of the preview, as if there had been none
    (pixels, masks, grid, _), batch = *shown, *seen
    assert np.allclose(pixels, to_pixels(batch["images"][:4], run.data.split.stats)) and grid == GRID
    assert torch.equal(masks.context_idx, batch["masks"].context_idx[:4])
    assert torch.equal(masks.target_idx, batch["masks"].target_idx[:4])


def test_the_preview_counts_the_steps_of_a_run_that_ends_early_in_an_epoch(tmp_path, capsys):
    changes = {**PREVIEW, "training.accumulation_steps": 2, "training.max_iters": 8}
    main([*options(changes), f"--run_dir={tmp_path}", "--preview"])
    text = capsys.readouterr().out
    assert "5 steps, 3 in an epoch" in text  # five batches: windows of 2, 2, 1; then 2 and 1
    assert table_in(text)["last step"]["step"] == 4


def test_a_preview_alters_nothing_of_a_run_in_its_folder(tmp_path, capsys):
    words = [*options({**NOISE, "training.epochs": 1, "probe.enabled": "false"}), f"--run_dir={tmp_path}"]
    main(words)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    main([*words, "--preview"])
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    after = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    assert {path.name for path in after} == {"masks.png", "schedules.png"}


@pytest.mark.parametrize(
    "wrong", ["--training.lrr=1", "--masking.mask_scale=[0.9, 1.0]", "--training.optimizer=adam", "--device=cuda:99"]
)
def test_a_preview_refuses_what_the_run_would_refuse_and_makes_nothing(tmp_path, wrong):
    with pytest.raises(ConfigError):
        main([*options(NOISE), f"--run_dir={tmp_path / 'run'}", wrong, "--preview"])
    assert list(tmp_path.iterdir()) == []


def test_a_preview_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="run cannot be written to: "):
        main([*options(NOISE), f"--run_dir={tmp_path / 'run'}", "--preview"])


def test_the_command_previews_with_exit_code_0(server, tmp_path):
    printed, said, code = server.call(*options(NOISE), "--run_dir=run", "--preview", folder=tmp_path)
    assert (code, said) == (0, "")
    assert printed.endswith("drawn: run/preview/schedules.png and run/preview/masks.png\n")


def test_the_example_of_the_documentation_runs():
    failures, attempted = doctest.testfile(str(ROOT / "docs" / "pictures.md"), module_relative=False)
    assert failures == 0 and attempted > 5
