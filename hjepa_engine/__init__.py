"""hjepa-engine: an event-driven training engine for hierarchical joint-embedding predictive architectures."""

from pathlib import Path

# In an uninstalled checkout, handlers/ and recipes/ lie beside this package: find them under the installed names.
if (Path(__file__).parent.parent / "setup.cfg").is_file():
    __path__.append(str(Path(__file__).parent.parent))

from hjepa_engine._version import __version__
from hjepa_engine.config.loading import dump_config, load_config
from hjepa_engine.config.schema import Config
from hjepa_engine.engine import create_trainer
from hjepa_engine.evaluator import create_evaluator
from hjepa_engine.events import TrainEvents
from hjepa_engine.export import load_encoder

__all__ = [
    "Config",
    "TrainEvents",
    "__version__",
    "create_evaluator",
    "create_trainer",
    "dump_config",
    "load_config",
    "load_encoder",
]
