"""Initial weights of linear layers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

STD = 0.02

Init = Literal["xavier", "trunc_normal"]


def init_weights(module: nn.Module, init: Init) -> None:
    """Draw the weights of all linear layers anew, and set their biases to 0.

    Args:
        module: whose layers.
        init: see :func:`init_layer`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_layer(layer, init)


def init_layer(layer: nn.Linear | nn.Conv2d, init: Init) -> None:
    """Draw a layer's weights anew, and set its bias to 0.

    Args:
        layer: a linear map; one of patches, a convolution, with ``trunc_normal`` alone.
        init: ``xavier``: uniform, with a variance of 2 / (inputs + outputs) (Glorot and Bengio, 2010; MAE,
            arXiv:2111.06377); ``trunc_normal``: of standard deviation 0.02, whatever the width (I-JEPA, arXiv:2301.08243).
            The two are close at a width of a thousand; where it is 64, the second one is a sixth of the first.
    """
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        trunc_normal(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def trunc_normal(tensor: Tensor) -> Tensor:
    """Fill ``tensor`` from a normal distribution of standard deviation 0.02, cut off at twice that.

    torch's bounds are absolute: its default of 2 would be 100 standard deviations, and rounding makes some draws just that.
    """
    return nn.init.trunc_normal_(tensor, std=STD, a=-2 * STD, b=2 * STD)
