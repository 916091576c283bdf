"""Weights into modules: checked as a whole first, resized where patches or images have another size, then loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from hjepa_engine.errors import CheckpointError
from hjepa_engine.interop.meta import PREDICTOR_POSITIONS
from hjepa_engine.interop.positions import Grid, resized_positions, sincos_order
from hjepa_engine.interop.source import HEADS, Source, Weights, refuse
from hjepa_engine.models import ContextEncoder, Predictor, TargetEncoder
from hjepa_engine.types import unwrap
from hjepa_engine.utils.sharding import load_state

logger = logging.getLogger(__name__)

_PATCHES, _POSITIONS = "vit.patch_embed.proj.weight", "vit.pos_embed"


@dataclass(frozen=True)
class Plan:
    """Weights that fit, and where they go; nothing has changed yet."""

    table: str
    """What is loaded, resized and left out."""
    warnings: tuple[str, ...]
    """What keeps its initial weights, and what has no place."""
    changes: tuple[tuple[nn.Module, Weights], ...]
    notes: tuple[str, ...] = ()
    """Of the table: what was resized, left out or stands for something else."""

    def apply(self) -> str:
        """Load the weights, warn of what is not loaded, and return the table."""
        for module, weights in self.changes:
            load_state(module, weights, strict=False)
        if idist.get_rank() == 0:
            for warning in self.warnings:
                logger.warning("%s", warning)
        return self.table


def plan_weights(modules: nn.ModuleDict, source: Source, parts: Sequence[str] | None = None) -> Plan:
    """What of ``source`` goes into ``modules``.

    Args:
        modules: of a run.
        source: what was read.
        parts: names of modules; None: all that both sides have.

    Raises:
        CheckpointError: a part is not there, or does not fit; the first key that does not is named. A weight is NaN or
            infinite; its tensor is named.
    """
    lines = [f"weights from {source.where}{'' if source.is_own else f', {source.layout}'}:"]
    warnings: list[str] = []
    notes: list[str] = []
    changes: list[tuple[nn.Module, Weights]] = []
    copied = _lone_target(modules, source, parts)
    for part in parts if parts is not None else [name for name in modules if name in source.parts]:
        if part not in modules or part not in source.parts:
            raise CheckpointError(
                f"model.init_parts: {part!r} is not in both; the run has {', '.join(modules)}, "
                f"{source.where} has {', '.join(source.parts)}"
            )
        module = unwrap(modules[part])
        if not source.is_own and part == "predictor" and (why := _not_one_level(module, source)):
            if parts is not None:
                raise refuse(source.where, why)
            warnings.append(f"{source.where}: predictor starts with random weights: {why}")
            continue
        _check_finite(source, part)
        wanted, (offered, resized) = module.state_dict(), _resized(source, part, module)
        fitting, misfits = _fitting(source, part, wanted, offered)
        if misfits and not source.is_own:
            raise refuse(source.where, f"{misfits[0]}{_sizes(source, part)}")
        if not fitting:
            raise CheckpointError(f"model.init_from: no tensor of {part} in {source.where} fits")
        if isinstance(module, ContextEncoder):
            warnings += _check_encoder(source, module)
        surplus = [name for name in offered if name not in wanted]
        lines += [f"  {part:16} {len(fitting):4} of {len(wanted)} tensors", *(f"    {line}" for line in resized)]
        lines += [f"    not {line}" for line in misfits]
        lines += [f"    dropped {name}: it has no place here" for name in surplus]
        notes += resized
        if misfits:
            kept = ", ".join(line.partition(":")[0] for line in misfits)
            warnings.append(f"{source.where}: part of {part} keeps its initial weights: {kept}")
        if surplus:
            warnings.append(f"{source.where}: part of {part} has no place here, dropped: {', '.join(surplus)}")
        changes.append((module, fitting))
        if part == "context_encoder" and copied is not None:
            # It starts as an exact copy, and both began with the same weights.
            lines.append(f"  {'target_encoder':16} {len(fitting):4} of {len(wanted)} tensors, those of context_encoder")
            changes.append((copied, fitting))
    if not changes:
        raise CheckpointError(f"model.init_from: {source.where} has none of the modules {', '.join(modules)}")
    filled = [module for module, _ in changes]
    absent = [name for name in modules if name not in source.parts and unwrap(modules[name]) not in filled]
    if parts is None and absent:
        warnings.append(f"{source.where} has no {', '.join(absent)}: random weights")
    if parts is not None and "target_encoder" in parts and "context_encoder" in modules.keys() - set(parts):
        warnings.append(
            "model.init_parts: context_encoder starts with random weights, target_encoder is moved towards it"
        )
    lines += [f"  {note}" for note in source.notes]
    return Plan("\n".join(lines), tuple(warnings), tuple(changes), (*notes, *source.notes))


def _lone_target(modules: nn.ModuleDict, source: Source, parts: Sequence[str] | None) -> TargetEncoder | None:
    """The target encoder that has nothing of its own to be filled with; None: there is none."""
    target = unwrap(modules["target_encoder"]) if "target_encoder" in modules else None
    alone = "target_encoder" not in (source.parts if parts is None else parts)
    return target if alone and isinstance(target, TargetEncoder) else None


def _check_finite(source: Source, part: str) -> None:
    for name, tensor in source.parts[part].items():
        if not tensor.is_floating_point():
            continue
        # Formats of one byte have no isfinite, nor have tensors of more than 64 dimensions.
        flat = tensor.flatten()
        finite = torch.isfinite(flat if tensor.element_size() > 1 else flat.float())
        if not finite.all():
            name, number = source.file_name(part, name), int(finite.numel() - finite.sum())
            raise refuse(source.where, f"{name} has {number} weights of {finite.numel()} that are NaN or infinite")


def _fitting(source: Source, part: str, wanted: Weights, offered: Weights) -> tuple[Weights, list[str]]:
    """Tensors that fit, and lines on those that do not; of other projects' also those that have no place here."""
    fitting, misfits = {}, []
    for name, tensor in wanted.items():
        said = name if source.is_own else source.file_name(part, name)
        if name not in offered:
            misfits.append(f"{said}: missing" if source.is_own else f"{said} is missing")
        elif offered[name].shape != tensor.shape:
            there, here = tuple(offered[name].shape), tuple(tensor.shape)
            misfits.append(
                f"{said}: {there} there, {here} here" if source.is_own else f"{said} is {there}, here {here}"
            )
        else:
            fitting[name] = offered[name]
    if not source.is_own:
        misfits += [f"{source.file_name(part, name)} has no place here" for name in offered if name not in wanted]
    return fitting, misfits


def _resized(source: Source, part: str, module: nn.Module) -> tuple[Weights, list[str]]:
    """The weights of a part, those of patches and positions in the encoder's sizes, and what was resized."""
    weights, lines = dict(source.parts[part]), list[str]()
    weights.pop(PREDICTOR_POSITIONS, None)
    if not isinstance(module, ContextEncoder):
        if not source.is_own and not isinstance(module, Predictor):
            raise refuse(source.where, f"{part} of the run is a {type(module).__name__}, not a part of H-JEPA")
        return weights, lines
    patches, positions = weights.get(_PATCHES), weights.get(_POSITIONS)
    new = tuple(module.vit.patch_embed.patch_size)
    if patches is not None and patches.ndim == 4 and patches.shape[2:] != new:
        weights[_PATCHES] = resample_patch_embed(patches.float(), list(new))
        lines.append(f"resized {source.file_name(part, _PATCHES)}: {_by(patches.shape[2:])} to {_by(new)} pixels")
    old = source.grid or _grid_of(positions, module.grid)
    if positions is None or positions.ndim != 3 or old is None or old == module.grid:
        return weights, lines
    if positions.shape[1:] == (old[0] * old[1], module.embed_dim):
        weights[_POSITIONS] = resized_positions(positions, old, module.grid, module.arguments["pos_embed"] == "sincos")
        lines.append(f"resized {source.file_name(part, _POSITIONS)}: {_by(old)} to {_by(module.grid)} patches")
    return weights, lines


def _grid_of(positions: Tensor | None, here: Grid) -> Grid | None:
    """The patch grid of own weights, which do not say: the encoder's where it may be, else a square."""
    if positions is None or positions.ndim != 3:
        return None
    number = positions.shape[1]
    side = int(number**0.5)
    return here if number == here[0] * here[1] else (side, side)


def _check_encoder(source: Source, encoder: ContextEncoder) -> list[str]:
    """Refuse what the shapes do not tell: attention heads, and what the norms add; warnings where it is not known."""
    vit: Any = encoder.vit
    heads, eps = vit.blocks[0].attn.num_heads, vit.blocks[0].norm1.eps
    usual = HEADS.get(encoder.embed_dim)
    if source.num_heads not in (None, heads):
        raise refuse(source.where, f"the encoder has {source.num_heads} attention heads, here model.num_heads {heads}")
    if source.norm_eps not in (None, eps):
        raise refuse(
            source.where, f"the layer norms add {source.norm_eps:g}, here {eps:g}: --model.norm_eps {source.norm_eps:g}"
        )
    if source.num_heads is None and usual not in (None, heads):
        return [f"{source.where} does not say how many attention heads it has; here {heads}, {usual} are usual"]
    return []


def _not_one_level(module: nn.Module, source: Source) -> str:
    """Why the predictor of I-JEPA cannot be this one; "": it can."""
    if not isinstance(module, Predictor):
        return f"the run's is a {type(module).__name__}"
    is_one = [level.pool for level in module.levels] == [1] and module.levels[0].depth > 0
    if not is_one or any(True for _ in module.level_blocks[0].children()):
        return "model.levels must be one level of features with pool 1, without blocks of its own (model.num_hierarchies 1)"
    table, grid = source.parts["predictor"].get(PREDICTOR_POSITIONS), source.grid
    name = f"predictor.{PREDICTOR_POSITIONS}"
    if table is None or grid is None:
        return f"{name} is missing"
    if table.ndim != 3 or sincos_order(table[0], grid) != "own":
        return f"{name} is not the sine-cosine table of {_by(grid)} patches that positions are computed by here"
    return ""


def _sizes(source: Source, part: str) -> str:
    if part == "predictor":
        embed = source.parts[part].get("embed.weight")
        width = embed.shape[0] if embed is not None and embed.ndim == 2 else "unknown"
        return (
            f"; its predictor has model.predictor.width {width}, model.predictor.depth {_depth(source, part, 'blocks')}"
        )
    weights = source.parts.get("target_encoder", {})
    patches = weights.get(_PATCHES)
    if patches is None or patches.ndim != 4:
        return ""
    depth = _depth(source, "target_encoder", "vit.blocks")
    return (
        f"; its encoder has model.embed_dim {patches.shape[0]}, model.depth {depth}, model.patch_size {patches.shape[3]}, "
        f"data.in_chans {patches.shape[1]}"
    )


def _depth(source: Source, part: str, blocks: str) -> int:
    start = f"{blocks}."
    return len({name.removeprefix(start).split(".")[0] for name in source.parts[part] if name.startswith(start)})


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
