"""What a process may take: the machine's memory, or its container's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxmoe.common.errors import CapacityError
from jaxmoe.weights import memory

GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """64 GiB free, and a control group hierarchy to write to."""
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB)
    )
    return tmp_path


def put_in(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    real = Path.read_text

    def read(self: Path, *args: object, **kw: object) -> str:
        return line if str(self) == "/proc/self/cgroup" else real(self)

    monkeypatch.setattr(Path, "read_text", read)


def test_no_limit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, "0::/user.slice/job\n")
    assert memory.available_bytes(machine) == 64 * GIB
    (machine / "user.slice/job").mkdir(parents=True)
    (machine / "user.slice/job/memory.max").write_text("max\n")
    (machine / "user.slice/job/memory.current").write_text(f"{GIB}\n")
    assert memory.available_bytes(machine) == 64 * GIB


@pytest.mark.parametrize("level", ["user.slice", "user.slice/job", ""])
def test_version_2_limit_of_any_parent(
    machine: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    put_in(monkeypatch, "0::/user.slice/job\n")
    folder = machine / level
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{10 * GIB}\n")
    (folder / "memory.current").write_text(f"{7 * GIB}\n")
    assert memory.available_bytes(machine) == 3 * GIB
    # Cached files give way; shared memory does not.
    (folder / "memory.stat").write_text(f"anon {3 * GIB}\nfile {4 * GIB}\nshmem {GIB}\n")
    assert memory.available_bytes(machine) == 6 * GIB


def test_version_1_limit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, "5:cpu:/job\n4:memory:/job\n")
    folder = machine / "memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{8 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (folder / "memory.stat").write_text(f"total_cache {GIB}\nshmem 0\n")
    assert memory.available_bytes(machine) == 6 * GIB


def test_require_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 5 * GIB)
    assert memory.require(5 * GIB, "this") == 5 * GIB
    with pytest.raises(CapacityError) as caught:
        memory.require(6 * GIB, "this")
    text = str(caught.value)
    assert "this needs 6.00 GiB" in text and "5.00 GiB" in text and str(6 * GIB) in text


def test_peak_is_at_least_what_was_touched() -> None:
    before = memory.peak_rss_bytes()
    data = bytearray(32 << 20)
    assert memory.peak_rss_bytes() >= before and len(data) > 0
    assert memory.available_bytes() > 0
