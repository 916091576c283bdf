"""The configuration: schema, validation, reading and writing."""

from hjepa_engine.config.loading import config_from, dump_config, load_config
from hjepa_engine.config.schema import Config, Level, resolve_levels

__all__ = ["Config", "Level", "config_from", "dump_config", "load_config", "resolve_levels"]
