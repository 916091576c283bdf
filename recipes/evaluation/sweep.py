"""Many heads trained in one pass, the best setting chosen on held-out training labels, one head judged on test images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hjepa_engine import create_evaluator, create_trainer
from hjepa_engine.data import FeatureBatches, hold_out
from hjepa_engine.evaluator import for_each_output
from hjepa_engine.handlers import DataPosition, OptimizerStep, ParamSchedule
from hjepa_engine.models.heads import AttentiveHead, AttentiveHeads, LinearHeads
from hjepa_engine.recipes.evaluation.task import FALLBACK, Setting, Settings
from hjepa_engine.schedules import CosineScheduler
from hjepa_engine.steps import probe_heads_step
from hjepa_engine.utils.rng import derive_seed, preserve_rng_state

#: Optimizer steps of a pass's worth of settings, for each of ``probe.epochs``: few labels fill few batches.
_MIN_STEPS_PER_EPOCH = 10
#: Features of a batch that is only judged.
_JUDGED = 4096
#: Makes heads with these settings from the number of classes, and the optimizer of their parameters.
MakeHeads = Callable[[Sequence[Setting], int], tuple[nn.Module, Optimizer]]


class Samples(NamedTuple):
    """Features and labels of a split, or of a part of it."""

    features: Tensor
    """(n, ...), in memory or memory-mapped."""
    labels: Tensor
    """(n,)."""
    rows: Tensor | None = None
    """Indices (m,) of the samples that count; None: all."""

    def part(self, rows: Tensor) -> Samples:
        """Those of the samples that stand at ``rows``."""
        return self._replace(rows=rows if self.rows is None else self.rows[rows])

    @property
    def own_labels(self) -> Tensor:
        """Labels of the samples that count."""
        return self.labels if self.rows is None else self.labels[self.rows]


class Judged(NamedTuple):
    """What the chosen setting says of the test images."""

    setting: Setting
    predictions: Tensor
    """(n,), classes."""


def linear_heads(
    mean: Tensor, std: Tensor, settings: Sequence[Setting], num_classes: int
) -> tuple[nn.Module, Optimizer]:
    """Linear heads of features (B, F), and SGD with momentum 0.9; ``mean`` and ``std`` (F,) are of the features."""
    heads = LinearHeads(len(mean), num_classes, settings, mean, std)
    return heads, SGD(heads.parameters(), 1.0, momentum=0.9)


def attentive_heads(
    dim: int, num_heads: int, seed: int, settings: Sequence[Setting], num_classes: int
) -> tuple[nn.Module, Optimizer]:
    """Attentive heads with equal initial weights, and AdamW with a group for each."""
    with preserve_rng_state():
        made = []
        for _ in settings:
            torch.manual_seed(derive_seed(seed, "attentive probe"))
            made.append(AttentiveHead(dim, num_classes, num_heads))
    groups = [
        {"params": list(head.parameters()), "lr": setting.lr, "weight_decay": setting.weight_decay, "head": number}
        for number, (head, setting) in enumerate(zip(made, settings, strict=True))
    ]
    return AttentiveHeads(made), AdamW(groups)


def choose_and_judge(
    make: MakeHeads,
    grid: Sequence[Setting],
    train: Samples,
    test: Samples,
    num_classes: int,
    settings: Settings,
    seed: int,
    groups: int = 1,
) -> Judged:
    """Choose a setting on a held-out part of the training labels, train with it on all of them, judge the test images.

    Test labels are not read. Where the held-out part would have fewer samples than there are classes, it is too small to
    choose by: the setting is :data:`FALLBACK`, or of another grid its middle.

    Args:
        make: makes heads and their optimizer.
        grid: settings to choose from, trained in one pass.
        train: training samples.
        test: samples to judge.
        num_classes: number of classes.
        settings: of all tasks.
        seed: of the held-out part and the order.
        groups: samples that follow each other and belong together, as the patches of an image do: held out as one.
    """
    labels = train.own_labels
    if groups == 1:
        fit, held = hold_out(labels, settings.held_out, seed)
    else:
        images = torch.zeros(len(labels) // groups, dtype=torch.int64)
        patches = torch.arange(groups)
        fit, held = ((idx[:, None] * groups + patches).flatten() for idx in hold_out(images, settings.held_out, seed))
    if len(held) < len(labels.unique()):
        setting = Setting(*FALLBACK) if Setting(*FALLBACK) in grid else grid[len(grid) // 2]
    else:
        right = train.part(held).own_labels
        found = train_heads(make, grid, train.part(fit), train.part(held), num_classes, settings, seed, groups)
        # The first of equal ones, on every machine.
        setting = grid[int((found == right).sum(dim=1).argmax())]
    return Judged(setting, train_heads(make, [setting], train, test, num_classes, settings, seed, groups)[0])


def train_heads(
    make: MakeHeads,
    grid: Sequence[Setting],
    train: Samples,
    judged: Samples,
    num_classes: int,
    settings: Settings,
    seed: int,
    groups: int = 1,
) -> Tensor:
    """Train a head for each setting in one pass over ``train``; what each predicts of ``judged``: (G, n).

    Batches have ``probe.batch_size`` times ``groups`` samples. The engine and the handlers are those of pretraining; half a
    cosine leads from each learning rate to 0.
    """
    probe = settings.config.probe
    size = min(probe.batch_size * groups, len(train.own_labels))
    batches = FeatureBatches(train.features, train.labels, size, seed, rows=train.rows)
    heads, optimizer = make(grid, num_classes)
    modules = nn.ModuleDict({"heads": heads.to(settings.device)})
    epochs = max(probe.epochs, math.ceil(_MIN_STEPS_PER_EPOCH * probe.epochs / len(batches)))
    trainer = create_trainer(probe_heads_step, modules, settings.device)
    trainer.attach(OptimizerStep(optimizer), DataPosition(batches.sampler))
    for number, group in enumerate(optimizer.param_groups):
        is_own = partial(_is_group, number)
        schedule = CosineScheduler(group["lr"], 0.0, epochs, len(batches))
        trainer.attach(ParamSchedule(optimizer, "lr", schedule, select=is_own))
    trainer.run(batches, max_epochs=epochs)
    predictions: list[Tensor] = []
    evaluator = create_evaluator(probe_heads_step, modules, settings.device)
    ordered = FeatureBatches(judged.features, judged.labels, _JUDGED, shuffle=False, rows=judged.rows)
    for_each_output(evaluator, ordered, lambda output, batch: predictions.append(output["logits"].argmax(dim=2).cpu()))
    return torch.cat(predictions, dim=1)


def _is_group(number: int, group: dict[str, object]) -> bool:
    return group.get("head", 0) == number
