"""What mkdocs does besides: the sources as they are installed, in the markup that pages have."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_sources: tempfile.TemporaryDirectory[str] | None = None


@event_priority(100)  # before mkdocstrings looks
def on_config(config: Any) -> Any:
    """Let mkdocstrings read a copy in which handlers/ and recipes/ are parts of the package, as in an installation."""
    global _sources
    on_shutdown()
    _sources = tempfile.TemporaryDirectory()
    package = Path(_sources.name) / "hjepa_engine"
    skipped = shutil.ignore_patterns("__pycache__", "benchmarks")
    shutil.copytree(ROOT / "hjepa_engine", package, ignore=skipped)
    for folder in ("handlers", "recipes"):
        shutil.copytree(ROOT / folder, package / folder, ignore=skipped)
    for path in package.rglob("*.py"):
        path.write_text(as_markdown(path.read_text(encoding="utf-8")), encoding="utf-8")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    return config


def as_markdown(source: str) -> str:
    """Sources whose docstrings have no roles, examples in fences, and a paragraph for each of a handler's lines."""
    source = re.sub(r"^( +)(>>> .*(?:\n\1(?!\"\"\").+)*)$", r"\1```pycon\n\1\2\n\1```", source, flags=re.MULTILINE)
    source = re.sub(r":\w+:`~?(?:[\w]+\.)*(\w+)`", r"`\1`", source)
    return re.sub(r"^    (Listens to|Reads|Writes|Fires|Keys): ", r"\n    **\1**: ", source, flags=re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Make pages of the tutorials."""
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        text = tutorial(path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
    return files


def tutorial(source: str) -> str:
    """A notebook in the percent format as a page."""
    parts = []
    for cell in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files that are not part of the site without a link; tutorials are, as pages."""
    markdown = re.sub(r"\(tutorials/(\w+)\.py\)", r"(tutorials/\1.md)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./(?![^)]*\.md)[^)]*\)", r"\1", markdown)


def on_shutdown() -> None:
    """Remove the copy."""
    if _sources is not None:
        _sources.cleanup()
