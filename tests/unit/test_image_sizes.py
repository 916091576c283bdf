"""Encoders of images that are not square, or of another size than they were trained on."""

import json

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from hjepa_engine import load_encoder
from hjepa_engine.errors import ExportError
from hjepa_engine.export import save_encoder
from hjepa_engine.models import ContextEncoder, TargetEncoder
from hjepa_engine.models.positions import sincos_2d

SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}


def encoder(img_size=16, kind=TargetEncoder, **more):
    torch.manual_seed(0)
    return kind("vit_tiny_patch16_224", img_size, **{"pos_embed": "learned", **SMALL, **more})


def exported(folder, **more):
    saved = encoder(**more)
    save_encoder(saved, folder / "encoder", {"encoder": saved.arguments, "stats": ((0.5,), (0.5,))})
    return saved


def test_an_image_may_be_higher_than_wide():
    model = encoder((32, 16))
    assert (model.grid, model.num_patches) == ((8, 4), 32)
    assert model(torch.rand(2, 1, 32, 16)).shape == (2, 32, 16)
    assert model.arguments["img_size"] == (32, 16) and encoder((16, 16)).arguments["img_size"] == 16


def test_an_encoder_of_oblong_images_is_exported_and_loaded(tmp_path):
    saved = exported(tmp_path, img_size=(32, 16))
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["encoder"]["img_size"] == [32, 16]
    images = torch.rand(2, 1, 32, 16)
    assert torch.equal(load_encoder(tmp_path)(images), saved.eval()(images))


@pytest.mark.parametrize("size", [8, 32, (16, 24), [24, 4]])
def test_learned_positions_are_interpolated_as_timm_does(tmp_path, size):
    saved, loaded = exported(tmp_path), load_encoder(tmp_path, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert loaded.grid == (height // 4, width // 4)
    expected = resample_abs_pos_embed(saved.vit.pos_embed, list(loaded.grid), (4, 4), num_prefix_tokens=0)
    assert torch.equal(loaded.vit.pos_embed, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded(torch.rand(2, 1, height, width)).shape == (2, height * width // 16, 16)


def test_fixed_positions_are_those_of_an_encoder_of_that_size(tmp_path):
    exported(tmp_path, pos_embed="sincos")
    loaded = load_encoder(tmp_path, img_size=(32, 16))
    assert torch.equal(loaded.vit.pos_embed[0], sincos_2d((8, 4), 16))
    assert not loaded.vit.pos_embed.requires_grad


def test_the_size_of_the_run_changes_nothing(tmp_path):
    saved, images = exported(tmp_path), torch.rand(2, 1, 16, 16)
    assert torch.equal(load_encoder(tmp_path, img_size=16)(images), saved(images))


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        (18, "img_size must be a multiple of the patch size 4 x 4, got 18 x 18"),
        ((16, 17), "img_size must be a multiple of the patch size 4 x 4, got 16 x 17"),
        (0, "img_size must be H and W, or one positive integer, got 0"),
        ((16,), r"img_size must be H and W, or one positive integer, got \(16,\)"),
        ("16", "img_size must be H and W, or one positive integer, got '16'"),
        (16.0, "img_size must be H and W, or one positive integer, got 16.0"),
    ],
)
def test_other_sizes_are_refused_in_one_line(tmp_path, size, rule):
    exported(tmp_path)
    with pytest.raises(ExportError, match=rule):
        load_encoder(tmp_path, img_size=size)


def test_an_encoder_of_ones_own_has_the_size_that_it_has(tmp_path):
    own = nn.Linear(2, 2)
    save_encoder(own, tmp_path / "encoder", {"module": "encoder"})
    with pytest.raises(ExportError, match="img_size must be null for an encoder of your own, Linear, got 32"):
        load_encoder(tmp_path, encoder=own, img_size=32)


def test_a_context_encoder_goes_on_learning_its_positions():
    model = encoder(kind=ContextEncoder)
    model.set_img_size(8)
    assert model.vit.pos_embed.requires_grad
