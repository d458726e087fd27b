"""Orbax as the writer of prepared weights: one piece, whole or not at all.

Orbax writes a piece into a temporary folder and renames it when it is complete; what a killed
process left behind is cleared on the next try. The options ask for one uncompressed chunk an array,
so that the files are the bytes themselves (prepared.py).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp


class PieceWriter:
    """Saves and restores pieces: numpy arrays by dotted name."""

    def __init__(self) -> None:
        with _quiet():
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, use_zarr3=False, use_compression=False
            )
            self._checkpointer = ocp.Checkpointer(handler)

    def save(self, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a piece; `folder` appears when it is complete. An older one is replaced."""
        discard(folder)
        with _quiet():
            self._checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(_nested(arrays)))

    def restore(self, folder: Path) -> dict[str, np.ndarray]:
        """A piece as Orbax itself reads it; for tools and tests, since it copies everything."""
        with _quiet():
            metadata = self._checkpointer.metadata(folder.absolute()).item_metadata
            assert metadata is not None, folder
            tree = metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = self._checkpointer.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
        leaves = jax.tree.leaves_with_path(restored)
        return {".".join(str(key.key) for key in path): array for path, array in leaves}

    def close(self) -> None:
        self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Dotted names as the nested dicts that Orbax makes such names from."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def discard(folder: Path) -> None:
    """Removes a piece and everything unfinished that goes by its name."""
    for path in [folder, *folder.parent.glob(f"{folder.name}.*")]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports its own workings through absl's logger, some of it as warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
