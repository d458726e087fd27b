"""R9: too little of everything: memory of a control group, /dev/shm, the disk, descriptors.

Each limit is made as the operating system makes it (a control group, small file systems in a mount
namespace of their own, ulimit), which mostly needs root; what cannot be made here is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from reliability.client import CHAT, Answer, ask, chat
from reliability.figures import Check, Goal
from reliability.server import Server, running
from support.serve_process import ServeProcess

_LIMIT_MIB = 900  # of the control group: the demo model needs about 500


def measure(_: int) -> list[Goal]:
    return [
        _guarded("host memory short at the start", _refused_at_plan),
        _guarded("host memory short later on", _killed_later),
        _guarded("/dev/shm full", _full_shm),
        _guarded("disk full", _full_disk),
        _guarded("descriptors used up", _few_descriptors),
        _guarded("GPU memory short", _short_gpu),
    ]


def _guarded(what: str, check: Callable[[], tuple[str, str, bool]]) -> Goal:
    wanted = "refused at the start, or single requests fail; the server lives"
    try:
        wanted, got, passed = check()
        return Goal(what, wanted, got, passed)
    except (PermissionError, subprocess.CalledProcessError, FileNotFoundError) as e:
        return Goal(what, wanted, f"cannot be made here ({e})", None)


@contextlib.contextmanager
def _control_group(limit_mib: int) -> Iterator[tuple[Sequence[str], Callable[[int | None], None]]]:
    """A prefix that starts a command in a group of so much memory, and a way to change that."""
    base = Path("/sys/fs/cgroup")
    version_1 = (base / "memory").is_dir()
    group = (base / "memory" if version_1 else base) / f"jaxmoe_check_{os.getpid()}"
    group.mkdir()
    file = group / ("memory.limit_in_bytes" if version_1 else "memory.max")

    def limit(mib: int | None) -> None:
        """None: what is used now."""
        used = group / ("memory.usage_in_bytes" if version_1 else "memory.current")
        count = int(used.read_text()) if mib is None else mib << 20
        file.write_text(str(count + (2 << 20) if mib is None else count))

    try:
        limit(limit_mib)
        script = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        yield ("sh", "-c", script, "sh"), limit
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _refused_at_plan() -> tuple[str, str, bool]:
    wanted = "refused before a weight is read, with both numbers"
    with _control_group(_LIMIT_MIB) as (within, _):
        process = ServeProcess("--kv_cache_gb=3", "--max_num_seqs=1024", within=within)
        return wanted, *_refusal(process, "3.00 GiB")


def _refusal(process: ServeProcess, word: str) -> tuple[str, bool]:
    """What a server said that does not start, and whether it was one error with that word."""
    try:
        code = process.wait(120)
    finally:
        process.process.kill()
    process.process.stdout.close()
    process.process.stderr.close()
    errors = [line for line in process.err if "error:" in line]
    got = errors[0].partition("error: ")[2][:160] if errors else f"exit code {code}"
    return got, code == 1 and len(errors) == 1 and word in got


def _short_gpu() -> tuple[str, str, bool]:
    """XLA may take a share of the GPU's memory that not even the weights beside the experts fit."""
    wanted = "refused at the start, with both numbers"
    if not Path("/dev/nvidiactl").exists():
        raise FileNotFoundError("no GPU")
    process = ServeProcess(
        "--device=gpu", JAX_PLATFORMS="cuda,cpu", XLA_PYTHON_CLIENT_MEM_FRACTION="0.00002"
    )
    return wanted, *_refusal(process, "free")


def _killed_later() -> tuple[str, str, bool]:
    """The group shrinks under the running server until the system ends the engine."""
    wanted = "what is in flight fails with an error; /health stays answered; it recovers"
    with (
        _control_group(4 * _LIMIT_MIB) as (within, limit),
        running("--quiet", within=within) as server,
    ):
        before = _said(server)
        engine = server.engine_pid

        async def shrink() -> list[Answer]:
            """Requests of ever new shapes, each of which compiles and takes memory."""
            tasks = []
            for number in range(40):
                with contextlib.suppress(OSError):
                    limit(None)
                body = chat("word " * (1 + 17 * number), max_tokens=200, ignore_eos=True)
                body |= {"stream": True, "n": 1 + number % 7, "logprobs": number % 2 == 0}
                body["repetition_penalty"] = 1.1 if number % 3 else 1.0
                tasks.append(asyncio.create_task(ask(server.port, CHAT, body)))
                await asyncio.sleep(0.5)
                if server.engine_pid != engine:
                    break
            limit(4 * _LIMIT_MIB)
            return await asyncio.gather(*tasks)

        answers = asyncio.run(shrink())
        killed = server.engine_pid != engine
        # Those that came while it was away were refused.
        told = all(a.status == 503 or (a.status == 200 and a.has_end) for a in answers)
        after = _said(server, wait=True)
    got = (
        f"the engine was {'ended by the system' if killed else 'not ended'}; "
        f"{'every' if told else 'not every'} stream got its end; "
        + ("the same answer afterwards" if after == before else "no answer afterwards")
    )
    return wanted, got, killed and told and after == before


def _small_file_systems(mounts: dict[str, str]) -> Sequence[str]:
    """A prefix that starts a command where each path is a small file system of its own."""
    lines = ["set -e"]
    for path, size in mounts.items():
        lines.append(f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(path)}")
    prefix = ("unshare", "-m", "sh", "-c", "; ".join([*lines, 'exec "$@"']), "sh")
    subprocess.run([*prefix, "true"], check=True, capture_output=True)
    return prefix


def _full_shm() -> tuple[str, str, bool]:
    wanted = "the weights are private then, and the report says so"
    within = _small_file_systems({"/dev/shm": "1m"})
    with running(within=within) as server:
        notes = [line for line in server.process.out if "/dev/shm" in line]
        said = _said(server)
    got = notes[0][:160] if notes else "nothing is said"
    return wanted, got, bool(notes) and bool(said)


def _full_disk() -> tuple[str, str, bool]:
    wanted = "it serves, and does not keep compiled programs"
    with tempfile.TemporaryDirectory() as folder:
        within = _small_file_systems({folder: "64k"})
        with running(f"--cache_dir={folder}", "--quiet", within=within) as server:
            said = _said(server)
            alive = server.alive and server.metrics()["engine_restarts_total"] == 0
    return wanted, "it answers" if said and alive else "it does not answer", bool(said) and alive


def _few_descriptors() -> tuple[str, str, bool]:
    wanted = "connections beyond the limit fail, the others are served, and all are afterwards"
    within = ("sh", "-c", 'ulimit -n 96; exec "$@"', "sh")
    with running("--quiet", within=within) as server:
        said = _said(server)

        async def crowd() -> tuple[int, int]:
            held = []
            for _ in range(200):
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(2):
                        held.append(await asyncio.open_connection("127.0.0.1", server.port))
            await asyncio.sleep(1.0)
            for _, writer in held:
                writer.transport.abort()
            await asyncio.sleep(1.0)
            answers = await asyncio.gather(
                *(ask(server.port, CHAT, chat("hi", max_tokens=2)) for _ in range(5)),
                return_exceptions=True,
            )
            return len(held), sum(isinstance(a, Answer) and a.status == 200 for a in answers)

        opened, served = asyncio.run(crowd())
        again = _said(server)
    got = f"{opened} connections at 96 descriptors; {served} of 5 requests served afterwards"
    return wanted, got, served == 5 and again == said != ""


def _said(server: Server, *, wait: bool = False) -> str:
    """A known answer; empty where there is none. wait: for the engine to be back."""

    async def once() -> str:
        for _ in range(1200 if wait else 1):
            answer = await ask(server.port, CHAT, chat("Who are you?", max_tokens=20))
            if answer.status == 200:
                return answer.json["choices"][0]["message"]["content"]
            await asyncio.sleep(0.1)
        return ""

    return asyncio.run(once())


CHECK = Check("too little of everything", {"short": 1, "ci": 1, "release": 20}, "", measure)
