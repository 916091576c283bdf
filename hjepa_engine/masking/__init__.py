"""Masks: which patches the context encoder sees and which ones are predicted."""

from hjepa_engine.masking.blocks import MultiBlockMasks
from hjepa_engine.masking.masks import Masks, MaskSource
from hjepa_engine.masking.random import RandomMasks

__all__ = ["MaskSource", "Masks", "MultiBlockMasks", "RandomMasks"]
