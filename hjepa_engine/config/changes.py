"""How two configurations differ, and which keys may change when a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hjepa_engine.config.loading import config_from, dump_config, parse_yaml
from hjepa_engine.config.schema import Config

#: Keys, or sections (with a dot at the end), that may differ when a run goes on: they do not change what a step computes.
MAY_CHANGE = (
    "training.epochs",
    "training.max_iters",
    "training.early_stopping",
    "training.time_limit",
    "data.data_path",
    "data.download",
    "data.num_workers",
    "data.pin_memory",
    "data.max_damaged",
    "checkpoint.",
    "logging.",
    "collapse.",
    "guard.",
    "probe.",
    "online_probe.",
    "pictures.",
    "handlers",
    "run_dir",
    "device",
)


#: What else may differ when another run's checkpoint is the starting point: schedules and objective are computed anew.
MAY_CHANGE_ELSEWHERE = (
    *MAY_CHANGE,
    "training.lr",
    "training.min_lr",
    "training.level_lrs",
    "training.lr_schedule",
    "training.warmup_epochs",
    "training.weight_decay",
    "training.weight_decay_end",
    "training.clip_grad",
    "training.non_finite",
    "model.ema.",
    "loss.",
    "masking.",
)


#: A finished run goes on if one of these has changed.
LENGTH_KEYS = ("training.epochs", "training.max_iters", "training.early_stopping", "probe.")


class Change(NamedTuple):
    """A key of the configuration that is not what it was."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old}, is {self.new} now"


def plain_config(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists."""
    return dict(parse_yaml(dump_config(config)))


def config_changes(saved: Mapping[str, Any], config: Config) -> list[Change]:
    """Keys that differ between a saved plain configuration and the present one; keys that it lacks had their default."""
    old, new = (_flat(plain_config(each)) for each in (config_from(dict(saved)), config))
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat
