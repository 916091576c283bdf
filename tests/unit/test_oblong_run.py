"""Whole runs over images that are not square, and over other numbers of channels."""

import json

import numpy as np
import pytest
import torch
from helpers import mostly_slow, tiny_config

from hjepa_engine import load_encoder
from hjepa_engine.recipes.pretrain import build

EVERYTHING = {
    "collapse.images": 16,
    "collapse.every": 4,
    "collapse.batch_every": 1,
    "online_probe.every": 1,
    "online_probe.train_images": 20,
    "online_probe.val_images": 20,
    "pictures.enabled": True,
    "data.random_affine": 0.2,
    "data.color_jitter": 0.2,
    "probe.epochs": 2,
}


def test_a_run_over_oblong_images_masks_measures_draws_and_exports(tmp_path):
    run = build(tiny_config(**EVERYTHING, **{"run_dir": str(tmp_path), "data.image_size": [16, 32]}))
    run.fit()
    encoder = load_encoder(tmp_path)
    assert encoder.grid == (4, 8) and encoder(torch.rand(1, 3, 16, 32)).shape[1] == 32
    assert {"masks", "features", "similarity"} <= {path.name.split("_")[0] for path in (tmp_path / "figures").iterdir()}
    assert load_encoder(tmp_path, "latest", img_size=(32, 8)).grid == (8, 2)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("collapse/target_rank" in line for line in metrics)


@pytest.mark.parametrize("channels", mostly_slow([1, 2, 5], (5,)))
def test_a_run_over_arrays_of_any_number_of_bands_draws_and_exports(tmp_path, channels):
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(16):
                pixels = np.random.default_rng(number).random((channels, 24, 24), dtype=np.float32)
                np.save(folder / f"{number}.npy", pixels)
    data = {"data.dataset": "imagefolder", "data.data_path": str(tmp_path / "data"), "data.in_chans": channels}
    run = build(tiny_config(**EVERYTHING | data | {"run_dir": str(tmp_path / "run"), "data.color_jitter": 0.0}))
    run.fit()
    assert run.config.data.mean == [pytest.approx(0.5, abs=0.02)] * channels
    assert load_encoder(tmp_path / "run")(torch.rand(1, channels, 24, 24)).shape == (1, 36, 16)
    assert "masks" in {path.name.split("_")[0] for path in (tmp_path / "run" / "figures").iterdir()}
