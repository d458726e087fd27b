"""R13: secrets and hygiene: keys on every route, no outgoing connection, no pickle, no torch.

Every Python process of the server notes what it must not do (an audit hook); the routes are those
of the running server's own description and table.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from reliability.client import CHAT, ask, chat
from reliability.figures import Check, Goal
from reliability.r01_fuzz import BODIES
from reliability.server import Server, running
from support.serve_process import children

KEY = "a-key-of-the-reliability-check"
PUBLIC = {"/health", "/"}
HOOK = """
import os, sys
_FILE = {file!r}
def _note(event, args):
    if event in ("socket.connect", "pickle.find_class"):
        with open(_FILE, "a") as f:
            f.write(f"{{os.getpid()}} {{event}} {{args[1:]!r}}\\n")
sys.addaudithook(_note)
"""


def routes() -> list[tuple[str, str]]:
    from jaxmoe.serving.app import GETS, HANDLERS
    from jaxmoe.serving.fields import ENDPOINTS

    gets = [("GET", path.replace("{model:path}", "jaxmoe-demo")) for path in GETS]
    return gets + [("POST", ENDPOINTS[name]) for name in HANDLERS]


def measure(_: int) -> list[Goal]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "noted"
        (Path(folder) / "sitecustomize.py").write_text(HOOK.format(file=str(log)))
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with running(JAXMOE_API_KEY=KEY, PYTHONPATH=path) as server:
            unguarded, refused = asyncio.run(_ask_everything(server))
            maps = "".join(
                Path(f"/proc/{pid}/maps").read_text() for pid in (server.pid, *children(server.pid))
            )
            server.process.terminate()
            server.process.wait(30)
            lines = server.process.out + server.process.err
        noted = log.read_text().splitlines() if log.exists() else []
    told = sum(word in line for line in lines for word in (KEY, "Who are you"))
    connects = [n for n in noted if "socket.connect" in n]
    pickles = [n for n in noted if "pickle" in n]
    torch = "torch" in maps
    return [
        Goal(
            "routes that answer without a key",
            f"{' and '.join(sorted(PUBLIC))}, of {len(routes())}",
            ", ".join(sorted(unguarded)) or "none",
            unguarded == PUBLIC,
        ),
        Goal(
            "routes served with one",
            "all",
            "; ".join(refused) or f"all {len(routes())}",
            not refused,
        ),
        Goal("outgoing connections", "0", str(len(connects)), not connects),
        Goal("objects unpickled", "0", str(len(pickles)), not pickles),
        Goal("torch loaded", "no", "yes" if torch else "no", not torch),
        Goal("keys or prompts in the log", "0", str(told), told == 0),
    ]


async def _ask_everything(server: Server) -> tuple[set[str], list[str]]:
    """Paths that are not 401 without a key, and what does not answer 200 with one."""
    unguarded, refused = set(), []
    for method, path in routes():
        body = dict(BODIES[path]) if method == "POST" else None
        if body is not None:
            body.pop("tools", None)  # the demo's template has no place for them
        if (await ask(server.port, path, body)).status != 401:
            unguarded.add(path)
        wrong = await ask(server.port, path, body, authorization="Bearer wrong-key-of-nobody")
        if wrong.status != 401:
            unguarded.add(path)
        if path == CHAT:
            body = chat("Who are you?", max_tokens=4, stream=True)
        answer = await ask(server.port, path, body, authorization=f"Bearer {KEY}")
        if answer.status != 200:
            refused.append(f"{path}: {answer.status} {answer.body[:120]!r}")
    return unguarded, refused


CHECK = Check("secrets and hygiene", {"short": 1, "ci": 1, "release": 1}, "", measure)
