"""Experts in named shared memory: found again, by the right checkpoint only, and cleared away."""

import os
import subprocess
import sys
import textwrap

import pytest
from support import tiny_models

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models import registry
from jaxmoe.weights import shared_store
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.safetensors_reader import Checkpoint

CASE = "qwen3_moe_fp8"


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """Names that no other process uses; none is left behind."""
    monkeypatch.setattr(shared_store, "_PREFIX", f"jaxmoe-test-{os.getpid()}-")
    yield
    shared_store.remove_unused()
    assert list(shared_store.DIRECTORY.glob(f"jaxmoe-test-{os.getpid()}-*")) == []


def load(directory, runtime, **more):
    config = ModelConfig.from_hf(tiny_models.hf_config(CASE))
    with Checkpoint.open(directory) as checkpoint:
        return load_model(
            checkpoint, config, registry, runtime, shared=True, progress=False, **more
        )


def contents(loaded):
    store = loaded.host_store
    return [
        (store.matrix(layer, e, which).tobytes(), store.scale(layer, e, which).tobytes())
        for layer, layout in enumerate(store.layouts)
        for e in range(layout.num_experts)
        for which in ("gate", "up", "down")
    ]


def test_a_second_load_reads_no_expert(tmp_path, runtime):
    tiny_models.write_checkpoint(tmp_path, CASE)
    first = load(tmp_path, runtime)
    name = first.report.shared_name
    assert name.startswith("/jaxmoe-test-") and name in first.report.describe()
    want = contents(first)
    assert oct(os.stat(f"/dev/shm{name}").st_mode)[-3:] == "600"
    first.close()
    second = load(tmp_path, runtime)
    assert second.report.shared_name == name and contents(second) == want
    experts = sum(m.weight.nbytes + m.scale.nbytes for m in _matrices(tmp_path))
    assert second.report.read_bytes == first.report.read_bytes - experts > 0
    assert not second.host_store.matrix(0, 0, "up").flags.writeable
    private = load_model_privately(tmp_path, runtime)
    assert contents(private) == want
    for loaded in (second, private):
        loaded.close()


def _matrices(directory):
    from jaxmoe.weights.loader import plan_load

    config = ModelConfig.from_hf(tiny_models.hf_config(CASE))
    with Checkpoint.open(directory) as checkpoint:
        return plan_load(checkpoint, config, registry, "bfloat16", 1).table.matrices


def load_model_privately(directory, runtime):
    config = ModelConfig.from_hf(tiny_models.hf_config(CASE))
    with Checkpoint.open(directory) as checkpoint:
        return load_model(checkpoint, config, registry, runtime, progress=False)


def test_a_load_that_broke_off_goes_on_where_it_was(tmp_path, runtime, monkeypatch):
    tiny_models.write_checkpoint(tmp_path, CASE)
    from jaxmoe.weights import loader

    want = contents(load_model_privately(tmp_path, runtime))
    real, count = loader._read_matrix, 0

    def broken(checkpoint, store, plan, bar):
        nonlocal count
        count += 1
        if count > 10:
            raise CheckpointError("the disk is gone")
        real(checkpoint, store, plan, bar)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "_read_matrix", broken)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            load(tmp_path, runtime, num_threads=1)
    read = []
    monkeypatch.setattr(
        loader, "_read_matrix", lambda *args: (read.append(args[2]), real(*args))[1]
    )
    again = load(tmp_path, runtime)
    assert len(read) == len(_matrices(tmp_path)) - 10
    assert contents(again) == want
    again.close()


def test_changed_files_and_other_checkpoints_have_other_stores(tmp_path, runtime):
    names = set()
    for seed in (0, 1):
        tiny_models.write_checkpoint(tmp_path / str(seed), CASE, seed)
    for change in (lambda: None, lambda: touch(tmp_path / "0"), lambda: None):
        change()
        loaded = load(tmp_path / "0", runtime)
        names.add(loaded.report.shared_name)
        loaded.close()
    assert len(names) == 2
    other = load(tmp_path / "1", runtime)
    assert other.report.shared_name not in names
    # What nobody uses any more was removed by the loads of others.
    assert all(not os.path.exists(f"/dev/shm{name}") for name in names)
    assert any("removed /jaxmoe-test" in note for note in other.report.notes)
    other.close()


def touch(directory):
    for file in directory.glob("*.safetensors"):
        os.utime(file, ns=(1, 1))


def test_without_room_or_while_another_fills_it_weights_are_private(tmp_path, runtime, monkeypatch):
    tiny_models.write_checkpoint(tmp_path, CASE)
    with monkeypatch.context() as patch:
        patch.setattr(shared_store, "room_bytes", lambda: 1000)
        loaded = load(tmp_path, runtime)
    assert loaded.report.shared_name is None
    assert any("/dev/shm has 0.00 GiB free" in note for note in loaded.report.notes)
    loaded.close()


def test_a_held_store_stays(tmp_path, runtime):
    tiny_models.write_checkpoint(tmp_path, CASE)
    loaded = load(tmp_path, runtime)
    name = loaded.report.shared_name
    hold = shared_store.Hold(name)
    assert shared_store.present_bytes(name) >= loaded.report.expert_bytes
    assert not shared_store.Hold(name).release(remove=True)  # the store itself is in use
    loaded.close()
    assert shared_store.remove_unused() == []
    # Neither does another process remove it.
    code = f"""
        from jaxmoe.weights import shared_store
        shared_store._PREFIX = {shared_store._PREFIX!r}
        assert shared_store.remove_unused() == []
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert hold.release(remove=True) and shared_store.present_bytes(name) == 0
    with pytest.raises(FileNotFoundError):
        shared_store.Hold(name)
    assert shared_store.remove_unused() == []
