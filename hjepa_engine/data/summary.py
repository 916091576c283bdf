"""What was read, in words: printed when a run starts."""

from __future__ import annotations

from collections import Counter

from hjepa_engine.data.layout import describe_kinds
from hjepa_engine.data.split import DatasetSplit

_MAX_CLASSES, _MAX_NOTES = 10, 8


def summarize(train: DatasetSplit, val: DatasetSplit) -> list[str]:
    """Lines: numbers of images and classes, what was left out, and what else a user should know."""
    lines = [f"data: {_images(train)}{_classes(train)} to train on, {_images(val)} to validate"]
    if train.contents.left_out:
        lines.append(f"  left out: {describe_kinds(Counter(train.contents.left_out))}")
    notes = list(dict.fromkeys([*train.contents.notes, *val.contents.notes]))
    lines += [f"  {note}" for note in notes[:_MAX_NOTES]]
    if len(notes) > _MAX_NOTES:
        lines.append(f"  and {len(notes) - _MAX_NOTES} more notes in data.json")
    return lines


def why_unlabeled(split: DatasetSplit) -> str:
    """Why a probe cannot use a split: it has no labels, or one class; empty: it can."""
    if split.num_classes == 1:
        return "there is one class, so that every prediction is right"
    if split.num_classes:
        return ""
    return next((note for note in split.contents.notes if note.startswith("no labels")), "the images have no labels")


def _images(split: DatasetSplit) -> str:
    number = len(split.images)
    return f"{number:,} {'image' if number == 1 else 'images'}"


def _classes(split: DatasetSplit) -> str:
    number = split.num_classes
    if not number:
        return " without labels"
    named = ", ".join(split.classes[:_MAX_CLASSES]) + (", ..." if number > _MAX_CLASSES else "")
    return f" of {number:,} {'class' if number == 1 else 'classes'} ({named})"
