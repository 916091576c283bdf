"""The embedded default learns, over seeds, by a margin that a broken objective does not reach. Slow: minutes each."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.config.monitoring import default_rules
from hjepa_engine.losses import smooth_l1
from hjepa_engine.recipes import pretrain

MARGIN = 0.30  # docs/results.md: more than 0.50 when all is well, less than 0.22 when something is broken


def accuracies(folder, *overrides, handlers=()):
    config = load_config(pretrain.DEFAULT_CONFIG, [f"run_dir={folder}", "logging.progress_bar=false", *overrides])
    run = pretrain.build(config)
    for handler in handlers:
        handler.attach(run.trainer)
    found = run.fit()
    print({name: round(100 * value, 1) for name, value in found.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_embedded_default_beats_a_random_encoder_and_raw_pixels(tmp_path, seed):
    rules = [asdict(replace(rule, action="stop")) for rule in default_rules()]
    found = accuracies(tmp_path / "run", f"seed={seed}", f"guard.rules={json.dumps(rules)}")  # no guard stops it
    assert found["trained"] > found["random"] + MARGIN
    assert found["trained"] > found["pixels"] + MARGIN


@pytest.mark.slow
def test_a_target_encoder_that_never_moves_does_not_reach_the_margin(tmp_path):
    found = accuracies(tmp_path / "run", "model.ema.momentum=1.0", "model.ema.momentum_end=1.0")
    assert found["trained"] == found["random"]


class EverythingIsContext:
    """Masks that hide nothing."""

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.FORWARD_STARTED, self.reveal)

    def reveal(self, engine):
        masks = engine.state.batch["masks"]
        everything = torch.arange(16).expand(len(masks.context_idx), -1)
        engine.state.batch["masks"] = masks._replace(context_idx=everything)


@pytest.mark.slow
def test_masks_that_hide_nothing_do_not_reach_the_margin(tmp_path):
    found = accuracies(tmp_path / "run", handlers=[EverythingIsContext()])
    assert found["trained"] < found["random"] + MARGIN


def of_another_image(prediction, target):
    """The loss against the targets of the batch's next image."""
    return smooth_l1(prediction, target.roll(1, dims=0))


@pytest.mark.slow
def test_targets_of_other_images_do_not_reach_the_margin(tmp_path):
    found = accuracies(tmp_path / "run", "loss.type=test_learning.of_another_image")
    assert found["trained"] < found["random"] + MARGIN
