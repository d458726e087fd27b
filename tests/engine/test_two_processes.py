"""A prefill process and a decode process on one named store: either may be killed at any moment,
and the other goes on with the same weights while a new one attaches without reading any.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_models

from jaxmoe.cli import doctor, doctor_machine
from jaxmoe.weights import shared_store

CHILD = Path(__file__).parents[1] / "support" / "store_child.py"
CASE = "qwen3_moe_fp8"


class Child:
    """One engine process. started: what it said of its store."""

    def __init__(self, role, directory, prefix):
        command = [sys.executable, str(CHILD), role, str(directory), prefix]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started = self.next()

    def next(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()[-3000:]
        return json.loads(line)

    def kill(self):
        """With SIGKILL, in the middle of a round."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def prefix(monkeypatch):
    """Of store names that nobody else uses; none is left behind."""
    name = f"jaxmoe-test2-{os.getpid()}-"
    monkeypatch.setattr(shared_store, "_PREFIX", name)
    yield name
    shared_store.remove_unused()
    assert shared_store.stores() == []


def test_either_may_be_killed(tmp_path, prefix, capsys):
    tiny_models.write_checkpoint(tmp_path, CASE)
    with contextlib.ExitStack() as stack:

        def child(role):
            made = Child(role, tmp_path, prefix)
            stack.callback(made.close)
            return made

        prefill = child("prefill")
        prompts = prefill.next()
        decode = child("decode")
        texts = decode.next()
        # The second one read no expert, and both see the same bytes.
        store = prefill.started["store"]
        path = shared_store.DIRECTORY / store.removeprefix("/")
        expert_bytes = os.stat(path).st_size
        assert decode.started["store"] == store and texts["checksum"] == prompts["checksum"]
        read = decode.started["read_bytes"]
        assert prefill.started["read_bytes"] - read > 0.8 * expert_bytes > 0
        assert oct(path.stat().st_mode)[-3:] == "600"
        decode.kill()
        for _ in range(3):
            assert prefill.next() == prompts
        assert [(s.name, s.in_use) for s in shared_store.stores()] == [(store, True)]
        decode = child("decode")
        assert (decode.started["store"], decode.started["read_bytes"]) == (store, read)
        assert decode.next() == texts and prefill.next() == prompts
        prefill.kill()  # who filled it
        for _ in range(3):
            assert decode.next() == texts
        prefill = child("prefill")
        assert (prefill.started["store"], prefill.started["read_bytes"]) == (store, read)
        assert prefill.next() == prompts and decode.next() == texts
        # Nobody removes what is in use; what both have left behind stays for the next start.
        assert doctor_machine.remove_unused_weights() == [
            f"left {store} ({doctor_machine.gib(path.stat().st_blocks * 512)}): in use"
        ]
        prefill.kill()
        decode.kill()
        assert [(s.name, s.in_use) for s in shared_store.stores()] == [(store, False)]
        check = doctor_machine.shared_weights()
        assert check.status == "warn" and "unused" in check.found
        assert doctor.main(["jaxmoe_doctor", "--remove_unused_weights"]) == 0
        assert f"removed {store}" in capsys.readouterr().out and not path.exists()
        assert doctor_machine.shared_weights().found.startswith("none")


@pytest.mark.slow
def test_what_others_may_read_or_is_too_small_is_not_used(tmp_path, prefix):
    """A segment that is not as its owner made it is refused, and the weights are private."""
    tiny_models.write_checkpoint(tmp_path, CASE)
    with contextlib.closing(Child("decode", tmp_path, prefix)) as child:
        want, store = child.next(), child.started["store"]
        child.kill()
    path = shared_store.DIRECTORY / store.removeprefix("/")
    for spoil in (lambda: path.chmod(0o644), lambda: os.truncate(path, 4096)):
        spoil()
        with contextlib.closing(Child("decode", tmp_path, prefix)) as child:
            assert child.started["store"] is None
            assert child.next() == want
        path.chmod(0o600)
