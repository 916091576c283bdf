"""Two views of each image (LeJEPA, arXiv:2511.08544): embeddings of views agree, and are normally distributed.

    python recipes/examples/two_views.py [--training.epochs 20 ...]

No target encoder, no predictor, no stop-gradient: SIGReg alone keeps the embeddings from collapsing. Departures from the
paper: two global views instead of several of different sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

from hjepa_engine import Config
from hjepa_engine.data.views import random_views
from hjepa_engine.losses import sigreg
from hjepa_engine.models import ContextEncoder, encoder_arguments
from hjepa_engine.recipes import pretrain
from hjepa_engine.run.cli import run_command
from hjepa_engine.types import Batch, Outputs
from hjepa_engine.utils.distributed import gather_samples

DEFAULT_CONFIG = pretrain.DEFAULT_CONFIG.with_name("two_views.yaml")


def build_modules(config: Config, dim: int = 16) -> nn.ModuleDict:
    """``encoder`` as ``model`` in the configuration describes it, and a ``projector`` that is thrown away afterwards."""
    encoder = ContextEncoder(**encoder_arguments(config))
    width = 4 * encoder.embed_dim
    projector = nn.Sequential(nn.Linear(encoder.embed_dim, width), nn.GELU(), nn.Linear(width, dim))
    return nn.ModuleDict({"encoder": encoder, "projector": projector})


def two_view_step(modules: nn.ModuleDict, batch: Batch, num_views: int = 2, sigreg_weight: float = 0.05) -> Outputs:
    """Squared distance of each view's embedding from the views' mean, plus SIGReg on every view."""
    images = batch["images"]
    seed = int(torch.randint(2**62, ()))  # of the generator that the run seeds at every step
    tokens = modules["encoder"](torch.cat(random_views(images, num_views, seed)))
    embeddings = modules["projector"](tokens.mean(dim=1)).float().unflatten(0, (num_views, len(images)))
    distance = (embeddings - embeddings.mean(dim=0)).square().mean()
    everywhere = gather_samples(embeddings.transpose(0, 1))  # SIGReg is about the whole batch, of all processes
    isotropy = torch.stack([sigreg(view) for view in everywhere.unbind(1)]).mean()
    loss = (1 - sigreg_weight) * distance + sigreg_weight * isotropy
    return {"loss": loss, "distance": distance, "sigreg": isotropy, "target_tokens": tokens[: len(images)]}


def main(argv: Sequence[str]) -> None:
    """Pretrain as the command line says."""
    pretrain.main(argv, DEFAULT_CONFIG, step=two_view_step, modules=build_modules)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
