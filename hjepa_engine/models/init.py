"""Initial weights, as in I-JEPA (arXiv:2301.08243)."""

from __future__ import annotations

from torch import Tensor, nn

STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Draw the weights of all linear layers anew, and set their biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_layer(layer)


def init_layer(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw a layer's weights anew, and set its bias to 0."""
    trunc_normal(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def trunc_normal(tensor: Tensor) -> Tensor:
    """Fill ``tensor`` from a normal distribution of standard deviation 0.02, cut off at twice that.

    torch's bounds are absolute: its default of 2 would be 100 standard deviations, and rounding makes some draws just that.
    """
    return nn.init.trunc_normal_(tensor, std=STD, a=-2 * STD, b=2 * STD)
