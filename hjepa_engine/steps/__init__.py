"""Pure step functions: modules and a batch in, a dict of tensors out."""

from hjepa_engine.steps.feature_maps import feature_map_step
from hjepa_engine.steps.hjepa import hjepa_step
from hjepa_engine.steps.linear_probe import feature_step, linear_probe_step
from hjepa_engine.steps.probe_heads import patch_pixels_step, probe_heads_step, readings_step
from hjepa_engine.steps.two_views import two_view_step

__all__ = [
    "feature_map_step",
    "feature_step",
    "hjepa_step",
    "linear_probe_step",
    "patch_pixels_step",
    "probe_heads_step",
    "readings_step",
    "two_view_step",
]
