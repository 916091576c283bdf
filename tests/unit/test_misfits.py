"""Sizes that do not fit each other: one line that names the key, the rule and the value."""

import ignite.distributed as idist
import pytest
from helpers import tiny_config

from hjepa_engine.data import build_loader, open_split
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.models import build_modules
from hjepa_engine.recipes.common.build import build_data

OWN_SIZES = {f"model__{name}": None for name in ("patch_size", "embed_dim", "depth", "num_heads")}


@pytest.mark.parametrize("term", ["variance", "covariance", "sigreg"])
def test_a_regularizer_needs_two_images(term, monkeypatch):
    weight = {f"loss__{term}_weight": 0.1}
    with pytest.raises(
        ConfigError, match=rf"^data\.batch_size must be at least 2 where loss\.{term}_weight is above 0"
    ):
        build_data(tiny_config(data__batch_size=1, **weight))
    build_data(tiny_config(data__batch_size=2, **weight))
    build_data(tiny_config(data__batch_size=1))
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    build_data(tiny_config(data__batch_size=2, **weight))  # one in each process: they are looked at together


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__num_heads": 3}, r"^model\.num_heads must divide model\.embed_dim \(16\), got 3$"),
        (
            {**OWN_SIZES, "data__image_size": 32, "model__num_heads": 5},
            r"^model\.num_heads must divide model\.embed_dim \(its own\) of vit_tiny_patch16_224, got 5$",
        ),
        (
            {**OWN_SIZES, "data__image_size": 32, "model__embed_dim": 64},
            r"^model\.num_heads must divide model\.embed_dim \(64\) of vit_tiny_patch16_224, got its own$",
        ),
        (
            {**OWN_SIZES, "data__image_size": 40},
            r"^data\.image_size must be a multiple of the patch size 16 x 16, got 40 x 40 \(model\.encoder_type vit_tiny",
        ),
        (
            {**OWN_SIZES, "data__image_size": 8},
            r"^data\.image_size must be a multiple of the patch size 16 x 16, got 8 x 8",
        ),
        (
            {"model__predictor__num_heads": 5},
            r"^model\.predictor\.width must be a multiple of 4 and of num_heads \(5\)",
        ),
    ],
)
def test_sizes_of_the_encoder_that_do_not_fit_are_named_by_their_keys(changes, says):
    with pytest.raises(ConfigError, match=says):
        build_modules(tiny_config(**changes))


def test_a_split_that_is_too_small_is_named(monkeypatch):
    data = tiny_config(data__fake_size=7).data
    with pytest.raises(DataError, match=r"^the train split has 7 images, data.batch_size must be at most that, got 8$"):
        build_loader(data, open_split(data, "train"), 0, train=True)
    data = tiny_config(data__fake_size=1).data
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    with pytest.raises(
        DataError, match=r"^the train split has 1 image, there are 2 processes: each needs one in every"
    ):
        build_loader(data, open_split(data, "train"), 0, train=True)
