"""The prepared form: bit-identical through the same door, resumable, bounded, and checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models
from support.checkpoints import (
    assert_same_leaves,
    assert_same_model,
    edit_tensors,
    experts_output,
    load_case,
)

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.weights import convert as convert_module
from jaxmoe.weights.convert import ConvertReport, convert
from jaxmoe.weights.orbax_store import PieceWriter
from jaxmoe.weights.prepared import PreparedCheckpoint
from jaxmoe.weights.safetensors_reader import MANIFEST, UNFINISHED, Checkpoint

SMALL = 1_000_000  # pieces of about ten experts of the tiny models


def run(source: Path, output: Path, piece_bytes: int = SMALL, **options: Any) -> ConvertReport:
    with Checkpoint.open(source) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config())
        return convert(checkpoint, config, registry, output, piece_bytes=piece_bytes, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    tiny_models.write_checkpoint(directory, "deepseek_v3_fp8")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "model"
    run(source, output)
    return output


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "kimi_k2_fp8", "qwen3_moe", "qwen3_moe_fp8"])
def test_loads_back_bit_identical(tmp_path: Path, case: str, runtime: CpuRuntime) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", case)
    report = run(tmp_path / "a", tmp_path / "b")
    assert report.pieces > 5 and report.kept_pieces == 0
    _, one = load_case(tmp_path / "a", runtime)
    _, other = load_case(tmp_path / "b", runtime)
    assert other.report.num_tensors > 50 and other.report.ignored == ()
    assert_same_model(one, other)


def test_mmap_backing(source: Path, prepared: Path, runtime: CpuRuntime) -> None:
    _, arena = load_case(source, runtime)
    _, mapped = load_case(prepared, runtime, backing="mmap")
    assert_same_leaves(arena, mapped)
    np.testing.assert_array_equal(experts_output(arena, runtime), experts_output(mapped, runtime))
    arena.close()
    mapped.close()


def test_orbax_itself_reads_the_pieces(source: Path, prepared: Path) -> None:
    tensors = tiny_models.make_tensors("deepseek_v3_fp8")
    with PieceWriter() as writer:
        first = sorted((prepared / "weights").glob("experts-0001-*"))[0]
        arrays = writer.restore(first)
    assert arrays.keys() == {w + s for w in ("gate", "up", "down") for s in (".data", ".scale_inv")}
    for expert in range(len(arrays["down.data"])):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert arrays["down.data"][expert].tobytes() == tensors[name].tobytes()
        np.testing.assert_array_equal(
            arrays["down.scale_inv"][expert], tensors[f"{name}_scale_inv"]
        )
    with PieceWriter() as writer, Checkpoint.open(prepared) as checkpoint:
        leaves = writer.restore(prepared / "weights" / "leaves-0000")
        assert len(leaves) > 5
        for name, value in leaves.items():
            assert value.tobytes() == bytes(checkpoint.read(checkpoint.tensors[name])), name


def test_companion_files_are_copied(source: Path, prepared: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        assert (prepared / name).read_bytes() == (source / name).read_bytes()
    with Checkpoint.open(prepared) as checkpoint:
        assert isinstance(checkpoint, PreparedCheckpoint)
        assert checkpoint.config() == json.loads((source / "config.json").read_text())
    assert not (prepared / UNFINISHED).exists()


# --- interruption -------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from jaxmoe.weights import orbax_store
from jaxmoe.cli.convert import main
real, left = orbax_store.PieceWriter.save, int(sys.argv.pop())
def save(self, folder, arrays):
    global left
    if left == 0:
        half = folder.with_name(folder.name + ".orbax-checkpoint-tmp")
        half.mkdir()
        (half / "gate").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    left -= 1
    real(self, folder, arrays)
orbax_store.PieceWriter.save = save
main()
"""


def test_goes_on_after_a_kill(source: Path, tmp_path: Path, prepared: Path) -> None:
    output = tmp_path / "out"
    arguments = [f"--model={source}", f"--output={output}", "--piece_mb=1", "7"]
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    with pytest.raises(CheckpointError, match="was not finished; run jaxmoe_convert"):
        Checkpoint.open(output)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("weights/*/*/0*")}
    assert len({path.parents[1] for path in kept}) == 7
    report = run(source, output, piece_bytes=1 << 20)
    assert report.kept_pieces == 7 and report.pieces > 10
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert_same_files(output, prepared)


def assert_same_files(one: Path, other: Path) -> None:
    """Same tensors with the same bytes, however they are cut into pieces."""
    with Checkpoint.open(one) as a, Checkpoint.open(other) as b:
        assert a.tensors.keys() == b.tensors.keys()
        for name, info in a.tensors.items():
            assert a.read(info) == b.read(b.tensors[name]), name


def test_damaged_piece_is_written_again(source: Path, tmp_path: Path, prepared: Path) -> None:
    output = tmp_path / "out"

    class Stop(Exception):
        pass

    real, calls = convert_module._read_piece, []

    def stop_later(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 6:
            raise Stop
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "_read_piece", stop_later)
        with pytest.raises(Stop):
            run(source, output)
    victim = sorted((output / "weights").glob("*/*/0.0"))[0]
    os.truncate(victim, victim.stat().st_size - 1)
    assert run(source, output).kept_pieces == 4
    assert_same_files(output, prepared)


def test_other_source_or_plan_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()

    def start_and_stop(directory: Path, piece_bytes: int = SMALL) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PieceWriter, "save", lambda *args: 1 / 0)
            run(directory, output, piece_bytes=piece_bytes)

    with pytest.raises(ZeroDivisionError):
        start_and_stop(source)
    with pytest.raises(CheckpointError, match="another piece size"):
        start_and_stop(source, piece_bytes=2 * SMALL)
    with pytest.raises(CheckpointError, match="of another checkpoint, or the source has changed"):
        edit_tensors(
            tmp_path / "b",
            "deepseek_v3_fp8",
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 1}),
        )
        start_and_stop(tmp_path / "b")


def test_memory_is_bounded_by_the_piece(source: Path, tmp_path: Path) -> None:
    """Python's allocations stay near one piece; the model is ten times that."""
    run(source, tmp_path / "warm")
    tracemalloc.start()
    try:
        report = run(source, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tables = 3_000_000
    largest_leaf = 3 * 512 * 256 * 2 * 4
    assert report.total_bytes > 13 * SMALL
    assert peak < SMALL + largest_leaf + tables


# --- refusals -----------------------------------------------------------------------------------


def test_output_in_use_is_refused(source: Path, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a finished conversion"):
        run(source, prepared)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        run(source, tmp_path)
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        run(source, tmp_path / "file")
    with pytest.raises(CheckpointError, match="is prepared already"):
        run(prepared, tmp_path / "again")


def test_full_disk_is_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        convert_module.shutil, "disk_usage", lambda path: type("U", (), {"free": 1000})
    )
    monkeypatch.setattr(PieceWriter, "save", None)
    with pytest.raises(CheckpointError, match=r"still to write, .*\(1000 bytes\) free"):
        run(source, tmp_path / "out")
    assert usage.f_bavail > 0


def test_damaged_source_is_refused(tmp_path: Path) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        name = "model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"
        tensors[name] = tensors[name] * np.float32(np.nan)

    edit_tensors(tmp_path / "a", "deepseek_v3_fp8", poison)
    with pytest.raises(CheckpointError, match="experts.5.up_proj.weight_scale_inv"):
        run(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / MANIFEST).exists()


def edit_json(pattern: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = sorted(directory.glob(pattern))[0]
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def first(pattern: str, do: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda directory: (do(sorted(directory.glob(pattern))[0]), None)[1]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def pieces(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["pieces"]


GATE = "weights/experts-0001-0000/gate.data"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "array cut": (first(f"{GATE}/0*", cut), ["gate.data/0.0.0", "experts.0.gate", "damaged"]),
    "array gone": (first(f"{GATE}/0*", Path.unlink), ["gate.data/0.0.0", "is missing"]),
    "array header gone": (first(f"{GATE}/.zarray", Path.unlink), [".zarray", "is missing"]),
    "compressed": (
        edit_json(f"{GATE}/.zarray", lambda z: z.update(compressor={"id": "zstd"})),
        [".zarray", "compressor"],
    ),
    "other shape": (
        edit_json(f"{GATE}/.zarray", lambda z: z["shape"].reverse()),
        [".zarray", "shape is"],
    ),
    "other dtype": (
        edit_json(f"{GATE}/.zarray", lambda z: z.update(dtype="|u1")),
        ["dtype is '|u1', wanted 'float8_e4m3fn'"],
    ),
    "other version": (edit_json(MANIFEST, lambda m: m.update(version=2)), ["version is 2"]),
    "no pieces": (edit_json(MANIFEST, lambda m: m.pop("pieces")), [MANIFEST, "lacks"]),
    "piece dropped": (
        edit_json(MANIFEST, lambda m: pieces(m).pop("experts-0001-0000")),
        ["is missing"],
    ),
    "piece is a path": (
        edit_json(MANIFEST, lambda m: pieces(m).update({"../x": {}})),
        [MANIFEST, "no name of a piece"],
    ),
    "tensor twice": (
        edit_json(
            MANIFEST,
            lambda m: pieces(m)["experts-0001-0000"]["up.data"].update(
                names=pieces(m)["experts-0001-0000"]["gate.data"]["names"]
            ),
        ),
        ["experts.0.gate", "is also in"],
    ),
    "entry of nonsense": (
        edit_json(MANIFEST, lambda m: pieces(m)["leaves-0000"].update({"a": {"shape": [2**70]}})),
        [MANIFEST, "is not an array's"],
    ),
    "manifest cut": (first(MANIFEST, cut), [MANIFEST, "not valid JSON"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_prepared_checkpoint(
    tmp_path: Path, name: str, prepared: Path, runtime: CpuRuntime
) -> None:
    import shutil

    damage, messages = DAMAGE[name]
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    damage(copy)
    if name == "manifest cut":
        text = (copy / MANIFEST).read_text().rstrip()
        (copy / MANIFEST).write_text(text[:-1])
    with pytest.raises(CheckpointError) as caught:
        load_case(copy, runtime)
    assert str(copy) in str(caught.value)
    for message in messages:
        assert message in str(caught.value)
