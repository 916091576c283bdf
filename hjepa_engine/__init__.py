"""hjepa-engine: an event-driven training engine for hierarchical joint-embedding predictive architectures."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In an uninstalled checkout, handlers/ and recipes/ lie beside this package: find them under the installed names.
if (Path(__file__).parent.parent / "setup.cfg").is_file():
    __path__.append(str(Path(__file__).parent.parent))

from hjepa_engine._version import __version__

if TYPE_CHECKING:
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

#: Where the names above are from. They are imported when first asked for: the command line answers without torch.
_MODULES = {
    "Config": "config.schema",
    "TrainEvents": "events",
    "create_evaluator": "evaluator",
    "create_trainer": "engine",
    "dump_config": "config.loading",
    "load_config": "config.loading",
    "load_encoder": "export",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
