"""Figures of a run: masks, features, predictions, spectra."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ignite.distributed as idist

from hjepa_engine.config.schema import Level
from hjepa_engine.engine import Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.masking import Masks
from hjepa_engine.metrics.names import spectrum_encoder
from hjepa_engine.utils.eta import epoch_due
from hjepa_engine.visualization import figures
from hjepa_engine.visualization.drawing import save
from hjepa_engine.visualization.figure_data import (
    Spectrum,
    patch_colors,
    read_spectra,
    similarities,
    to_pixels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

#: Images of a batch that principal components and similarities are computed from, at most.
MAX_IMAGES = 64


class Pictures:
    """Draw figures of the batch at hand at the run's last iteration, and at epochs' ends if asked to.

    ``masks``: images with what is seen and what is predicted. ``features``: principal components of the target encoder's
    patch features as color. ``similarity``: of predictions with their own and with other images' targets. ``spectrum``:
    singular values over the run, where they were measured. Rank 0 draws, of its own share of the batch. A figure that
    cannot be drawn or written is named in one warning; nothing of the training depends on it.

    Listens to: ``TrainEvents.METRICS_READY``.
    Reads: ``engine.state.batch["images"]`` (B, C, H, W) and ``["masks"]``; ``engine.state.output[tokens]``
    (B, N, D), ``["predictions"]`` and ``["targets"]``, lists over levels of (B, M, cells, D); spectra in
    ``engine.state.media`` and in ``metrics.jsonl``; ``engine.state.optimizer_step``.
    Writes: ``<folder>/figures/<name>_<optimizer step>.png``, and the same to ``engine.state.media["figures/<name>"]``.
    Keys: ``pictures.*``.

    Args:
        folder: of the run.
        levels: of the hierarchy.
        grid: (H, W), the patch grid.
        stats: mean and standard deviation of each channel that images were normalized with.
        every: epochs between figures; None: only when the run ends.
        images: number of images in a figure.
        tokens: name of the step's output whose principal components are drawn; None: there is none.
    """

    def __init__(
        self,
        folder: Path,
        levels: Sequence[Level],
        grid: tuple[int, int],
        stats: tuple[Sequence[float], Sequence[float]],
        every: int | None = None,
        images: int = 4,
        tokens: str | None = "target_tokens",
    ) -> None:
        if images < 1 or (every is not None and every < 1):
            raise ValueError(f"images and every must be at least 1, got {images} and {every}")
        self.folder, self.levels, self.grid, self.stats = folder, tuple(levels), grid, stats
        self.every, self.images, self.tokens = every, images, tokens
        self._warned = False

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(TrainEvents.METRICS_READY, self.draw_if_due)

    def draw_if_due(self, engine: Trainer) -> None:
        """Draw if it is time to."""
        if idist.get_rank() == 0 and epoch_due(engine.state, self.every):
            self.draw(engine)

    def draw(self, engine: Trainer) -> None:
        """Draw all figures."""
        state = engine.state
        for name, make in {
            "masks": self._masks,
            "features": self._features,
            "similarity": self._similarity,
            "spectrum": self._spectrum,
        }.items():
            try:
                figure = make(state)
                if figure is not None:
                    path = self.folder / "figures" / f"{name}_{state.optimizer_step:08d}.png"
                    state.media[f"figures/{name}"] = save(figure, path)
            except Exception as error:  # a full disk, a batch or a step of another kind: the run is worth more
                if not self._warned:
                    reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"
                    if isinstance(error, KeyError):
                        reason = f"neither the batch nor the step's output has {error}"
                    logger.warning("no picture of %s: %s", name, reason)
                self._warned = True

    def _masks(self, state: Any) -> Figure:
        pixels = to_pixels(state.batch["images"][: self.images], self.stats)
        return figures.draw_masks(pixels, on_cpu(state.batch["masks"]), self.grid, self.levels)

    def _features(self, state: Any) -> Figure | None:
        if self.tokens is None:
            return None
        pixels = to_pixels(state.batch["images"][: self.images], self.stats)
        tokens = state.output[self.tokens][: max(MAX_IMAGES, self.images)]
        return figures.draw_features(pixels, patch_colors(tokens), self.grid)

    def _similarity(self, state: Any) -> Figure:
        masks, output = on_cpu(state.batch["masks"]), state.output
        some = Masks(masks.context_idx[:MAX_IMAGES], masks.target_idx[:MAX_IMAGES], masks.block)
        found = [
            similarities(prediction[:MAX_IMAGES], target[:MAX_IMAGES], some, level, self.grid[1])
            for prediction, target, level in zip(output["predictions"], output["targets"], self.levels, strict=True)
        ]
        return figures.draw_similarities(found, self.levels)

    def _spectrum(self, state: Any) -> Figure | None:
        spectra = read_spectra(self.folder / "metrics.jsonl", before=state.optimizer_step)
        for name, item in state.media.items():
            if (encoder := spectrum_encoder(name)) is not None:
                newest = Spectrum(state.optimizer_step, item.value["rank"], item.value["share"])
                spectra.setdefault(encoder, []).append(newest)
        return figures.draw_spectra(spectra) if spectra else None


def on_cpu(masks: Masks) -> Masks:
    """Masks whose tensors are on the CPU."""
    return Masks(masks.context_idx.cpu(), masks.target_idx.cpu(), masks.block)
