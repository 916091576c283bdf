"""Files of the sources, and what they are imported as."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def name_of(path):
    """The name under which a source file is imported: ``handlers/x.py`` is ``hjepa_engine.handlers.x``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hjepa_engine" else ("hjepa_engine", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
