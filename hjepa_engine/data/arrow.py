"""Images in memory-mapped Arrow tables, read by the ``datasets`` library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.decode import DamagedImageError, open_image
from hjepa_engine.data.folder import folder_stats
from hjepa_engine.data.split import UNLABELED, Contents, DatasetSplit
from hjepa_engine.errors import DataError, RunError


class ArrowImages:
    """Rows of a table as (image, label).

    Args:
        table: a ``datasets.Dataset``; its rows are read one by one, from the memory-mapped file.
        indices: the rows.
        image: name of the column with images: encoded (bytes, or a dict with ``bytes`` and ``path``), or nested lists.
        dtype: of nested lists.
        label: name of the column with labels; None: there are none.
        class_of: class index of each value of that column, anything else is -1; None: it holds class indices.
    """

    def __init__(
        self,
        table: Any,
        indices: Sequence[int] | NDArray[np.int64],
        image: str = "image",
        dtype: str | None = None,
        label: str | None = "label",
        class_of: Mapping[Any, int] | None = None,
    ) -> None:
        self.table, self.indices, self.image, self.dtype = table, indices, image, dtype
        self.label, self.class_of = label, class_of

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[int(self.indices[index])]
        return self._open(row[self.image]), UNLABELED if self.label is None else self._class_index(row[self.label])

    def name_of(self, index: int) -> str:
        """The image's path, where the table has it, else the number of its row."""
        number = int(self.indices[index])
        value = self.table[number][self.image]
        path = value.get("path") if isinstance(value, dict) else None
        return path or f"row {number}"

    def _open(self, value: Any) -> Any:
        if isinstance(value, dict):
            content, path = value["bytes"], value.get("path") or ""
            if content is None and not path:
                raise DamagedImageError("the row has no image")
            return open_image(Path(path) if content is None else content, path)
        if value is None:
            raise DamagedImageError("the row has no image")
        return open_image(value, "") if isinstance(value, bytes) else np.asarray(value, self.dtype)

    def _class_index(self, value: Any) -> int:
        if self.class_of is not None:
            return self.class_of.get(value, UNLABELED)
        return UNLABELED if value is None else int(value)


def arrow_split(
    config: DataConfig, images: ArrowImages, classes: tuple[str, ...], files: Iterable[tuple[str, int]]
) -> DatasetSplit:
    """A split of Arrow files.

    Args:
        config: the data section.
        images: its images.
        classes: names of the classes.
        files: name and bytes of each file that they come from.
    """
    digest = hashlib.blake2b(repr(sorted(files)).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return DatasetSplit(images, classes, folder_stats(config), images.name_of, Contents({".": (len(images), digest)}))


@contextmanager
def quiet_datasets(where: str) -> Iterator[Any]:
    """The ``datasets`` library without its progress bars and warnings.

    Args:
        where: what is opened, for the message.

    Raises:
        DataError: it is not installed, or anything is wrong with the files.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'{where} needs the library datasets: pip install "hjepa-engine[hf]"') from error
    verbosity, has_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except RunError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = re.sub(r"^\[Errno \d+\] ", "", str(cause or error)).partition("\n")[0].strip()
        raise DataError(f"{where}: {reason or type(error).__name__}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if has_bars:
            datasets.enable_progress_bars()


def table_of(library: Any, files: Sequence[Path], features: Any = None) -> Any:
    """One ``datasets.Dataset`` of several Arrow files, memory-mapped, without copies.

    Args:
        library: ``datasets``.
        files: all with the same columns.
        features: what the columns are; None: as the files say.
    """
    tables = [library.table.MemoryMappedTable.from_file(str(file)) for file in files]
    # ``concatenate_datasets`` would hash and copy the features of each: 30 s for 500 files of 1,000 classes.
    joined = library.table.concat_tables(tables)
    return library.Dataset(joined, library.DatasetInfo(features=features), fingerprint="files")
