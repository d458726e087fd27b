"""More files than descriptors, and files that change."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxmoe.common.errors import CheckpointError
from jaxmoe.weights import open_files
from jaxmoe.weights.open_files import OpenFiles


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}" for i in range(12)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    return paths


def num_open(directory: Path) -> int:
    links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(f"{directory}/") for link in links)


def test_few_descriptors_for_many_files(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MAX_OPEN", 3)
    files = OpenFiles()
    for path in paths:
        files.add(path)
    assert num_open(paths[0].parent) <= 3 and files.paths == tuple(paths)

    def read(i: int) -> bool:
        with files.use(paths[i % 12], "t") as fd:
            return os.pread(fd, 1, 0) == bytes([i % 12])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(600)))
    with files.use(paths[0], "t"):
        pass
    assert num_open(paths[0].parent) <= 3
    files.close()
    files.close()
    assert num_open(paths[0].parent) == 0
    with pytest.raises(CheckpointError, match="was closed"), files.use(paths[0], "t"):
        pass


def test_a_file_in_use_stays_open(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MAX_OPEN", 1)
    files = OpenFiles()
    for path in paths:
        files.add(path)
    with files.use(paths[3], "t") as fd:
        for path in paths:
            with files.use(path, "t"):
                pass
        assert os.pread(fd, 1, 0) == b"\3"
    files.close()


@pytest.mark.parametrize("reopened", [False, True])
def test_changed_files_are_refused(
    paths: list[Path], reopened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "_MAX_OPEN", 0 if reopened else 100)
    files = OpenFiles()
    for path in paths:
        files.add(path)
    os.truncate(paths[1], 0)
    os.utime(paths[2], ns=(5, 5))
    for path, message in ((paths[1], "from 1 to 0 bytes"), (paths[2], "was written to")):
        with pytest.raises(CheckpointError, match=message) as caught:
            files.check_unchanged(path, "some.tensor")
        assert str(path) in str(caught.value) and "'some.tensor'" in str(caught.value)
    if reopened:
        new = paths[3].with_name("new")
        new.write_bytes(b"x")
        os.utime(new, ns=(1, paths[3].stat().st_mtime_ns))
        os.replace(new, paths[3])
        with pytest.raises(CheckpointError, match="or replaced"):
            files.check_unchanged(paths[3], "t")
        paths[4].unlink()
        with pytest.raises(CheckpointError, match="is missing"):
            files.check_unchanged(paths[4], "t")
    files.close()
