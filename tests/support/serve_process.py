"""jaxmoe_serve as a process of its own, on the embedded demo model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "test_serve_cache"
DEMO = Path(str(resources.files("jaxmoe") / "demo"))
# The demo's own template, and tools in Hermes' way where there are any.
_TOOLS = (
    "{%- if tools %}{{- '<|system|>Tools: ' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}"
    "{{- ' Call with <tool_call></tool_call>' }}{%- endif %}"
)


def demo_with_tools(folder: Path) -> Path:
    """The demo model's directory, its template extended by tools."""
    folder.mkdir()
    for file in DEMO.iterdir():
        if file.is_file() and file.name != "tokenizer_config.json":
            shutil.copy(file, folder)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    template = config["chat_template"]
    bos = "{{- bos_token -}}"
    assert template.startswith(bos)
    template = bos + _TOOLS + template[len(bos) :]
    # Roles and calls that a conversation with tools has.
    template = template.replace(
        "(message['content'] or '')",
        "(message['content'] or '') + (message.tool_calls | tojson if message.tool_calls else '')",
    ).replace("message['role'] == 'user'", "message['role'] in ('user', 'tool')")
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class ServeProcess:
    """url: what it printed. out, err: its lines so far. within: a command that starts the one
    behind it in a smaller world.
    """

    def __init__(self, *flags: str, within: Sequence[str] = (), **environment: str) -> None:
        argv = [sys.executable, "-m", "jaxmoe.cli.serve", "--port=0", f"--cache_dir={CACHE}"]
        # Compilers would take the cores from what is tested.
        argv.append("--nowarm_up")
        self.process = subprocess.Popen(
            [*within, *argv, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in (
                (self.process.stdout, self.out),
                (self.process.stderr, self.err),
            )
        ]
        for thread in self._threads:
            thread.start()
        self.url = ""

    def _read(self, stream, lines) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match:
        """The first line of stdout that matches."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in list(self.out):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.out}\n" + "\n".join(self.err[-20:]))

    def start(self) -> ServeProcess:
        self.url = self.wait_for(r"at (http://\S+) ").group(1)
        self.wait_for(r"^ready$")
        return self

    def terminate(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        code = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join(5)
        return code


def children(pid: int) -> list[int]:
    """Living processes that `pid` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def engine_pid(pid: int) -> int | None:
    """The engine process of a server, if there is one now."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"engine_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


@contextlib.contextmanager
def serve(*flags: str, within: Sequence[str] = (), **environment: str):
    """A server that is ready; killed at the end if it is still there."""
    server = ServeProcess(*flags, within=within, **environment)
    try:
        yield server.start()
    finally:
        if server.process.poll() is None:
            # Its engine too: a stopped one would not notice, and keep the pipes open.
            for pid in children(server.process.pid):
                os.kill(pid, signal.SIGKILL)
            server.process.kill()
            server.process.wait(10)
        for stream in (server.process.stdout, server.process.stderr):
            stream.close()
