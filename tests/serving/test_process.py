"""The server as processes: what it prints, an engine that dies, signals, no outgoing connection."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.front import parse_events
from support.serve_process import children, engine_pid, serve

from jaxmoe.cli import serve as command

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
LONG = {**ASK, "max_tokens": 1500, "ignore_eos": True, "stream": True}
# Notes what must not happen; loaded by every Python process of the server.
HOOK = """
import os, sys
_FILE = {file!r}
def _note(event, args):
    if event in ("socket.connect", "pickle.find_class"):
        with open(_FILE, "a") as f:
            f.write(f"{{os.getpid()}} {{event}} {{args[1:]!r}}\\n")
sys.addaudithook(_note)
"""


class Stream(threading.Thread):
    """Reads a stream to its end in a thread."""

    def __init__(self, url, body=LONG):
        super().__init__()
        self.url, self.body = url, body
        self.text, self.error, self.began = "", None, threading.Event()
        self.start()

    def run(self):
        try:
            with httpx.stream("POST", self.url + CHAT, json=self.body, timeout=60) as r:
                for piece in r.iter_text():
                    self.text += piece
                    if '"content":"I' in self.text:
                        self.began.set()
        except httpx.HTTPError as e:
            self.error = e

    @property
    def events(self):
        return [value for _, value in parse_events(self.text)]


def get(server, path):
    return httpx.get(server.url + path, timeout=10)


def wait_until(condition, timeout_s):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s
        time.sleep(0.01)
    return time.monotonic() - start


def test_an_engine_that_dies_and_a_drain(tmp_path):
    log = tmp_path / "audit"
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(file=str(log)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    # A restarted engine compiles ahead too, and an end in the middle of it is an end like others.
    with serve("--warm_up", PYTHONPATH=path.rstrip(os.pathsep)) as server:
        report = "\n".join(server.out)
        for words in ("http://127.0.0.1:", "jaxmoe-demo", "memory planned", "ISA ", "KV cache"):
            assert words in report, report
        (planned,) = re.findall(r"compiling ahead: (\d+) programs", report)
        answer = httpx.post(server.url + CHAT, json=ASK, timeout=60).json()
        programs = get(server, "/ready").json()["programs"]
        assert programs["planned"] == int(planned) >= programs["compiled"] >= 0
        assert f"jaxmoe_warm_up_programs_planned {planned}.0" in get(server, "/metrics").text
        engine = engine_pid(server.process.pid)
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "jaxlib" not in maps  # the front does without

        stream = Stream(server.url)
        assert stream.began.wait(30)
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: get(server, "/health").status_code == 503, 1.0)
        stream.join(2.0)
        assert not stream.is_alive() and stream.error is None
        assert stream.events[-1] == "[DONE]" and "error" in stream.events[-2]
        r = httpx.post(server.url + CHAT, json=ASK, timeout=10)
        assert r.status_code == 503 and "retry-after" in r.headers
        wait_until(lambda: get(server, "/ready").status_code == 200, 60)
        again = httpx.post(server.url + CHAT, json=ASK, timeout=60).json()
        assert again["choices"] == answer["choices"]
        assert "jaxmoe_engine_restarts_total 1.0" in get(server, "/metrics").text

        # SIGTERM: running requests finish, new ones are refused, the exit code is 0.
        finishing = [Stream(server.url, {**LONG, "max_tokens": 60}) for _ in range(3)]
        assert all(s.began.wait(30) for s in finishing)
        server.terminate()
        wait_until(lambda: "draining" in get(server, "/ready").text, 5)
        assert get(server, "/health").status_code == 200
        r = httpx.post(server.url + CHAT, json=ASK, timeout=10)
        assert r.status_code == 503 and r.json()["error"]["code"] == "draining"
        assert server.wait(30) == 0
        for s in finishing:
            s.join(5)
            assert s.error is None and s.events[-1] == "[DONE]"
            assert s.events[-2]["choices"][0]["finish_reason"] == "length"
        assert children(server.process.pid) == []
    noted = log.read_text().splitlines() if log.exists() else []
    assert noted == []
    lines = [json.loads(line) for line in server.err if line.startswith("{")]
    assert any("draining" in line["message"] for line in lines)
    assert not any("Who are you" in line for line in server.err)


@pytest.mark.parametrize("signals", [1, 2])
def test_what_a_drain_cannot_wait_for(signals):
    """After drain_timeout_s, or at the second signal, streams end with a reason."""
    timeout_s = 0.3 if signals == 1 else 60
    key = "test-key-of-mine"
    with serve(f"--drain_timeout_s={timeout_s}", JAXMOE_API_KEY=key) as server:
        assert httpx.post(server.url + CHAT, json=ASK).status_code == 401
        assert get(server, "/health").status_code == 200
        body = json.dumps(LONG)
        headers = {"x-api-key": key, "content-type": "application/json"}
        with httpx.stream(
            "POST", server.url + CHAT, content=body, headers=headers, timeout=60
        ) as r:
            text = ""
            for piece in r.iter_text():
                if '"content"' in piece and "I" in piece and not server.process.returncode:
                    if "signalled" not in locals():
                        signalled = time.monotonic()
                        for _ in range(signals):
                            server.terminate()
                            time.sleep(0.2)
                text += piece
        events = [value for _, value in parse_events(text)]
        assert events[-1] == "[DONE]"
        last = events[-2]
        assert "error" in last or last["choices"][0]["finish_reason"] == "abort"
        assert server.wait(10) == 0
        assert time.monotonic() - signalled < timeout_s + 2 + 1 if signals == 1 else 4
        assert not any(key in line for line in server.out + server.err)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--host=0.0.0.0"], "allow_unauthenticated"),
        (["--prot=1"], "did you mean 'port'"),
        (["--port=99999"], "port"),
        (["--model=/no/such/dir"], "no such directory"),
        (["--temperature=1"], "temperature"),
        (["--api_key_file=/no/such/file"], "api_key_file"),
        (["extra"], "extra"),
        (["--host=256.1.1.1", "--allow_unauthenticated", "--noengine_process"], "host"),
    ],
)
def test_refusals_are_one_line(argv, words, capsys, monkeypatch):
    monkeypatch.delenv("JAXMOE_API_KEY", raising=False)
    if "--noengine_process" in argv:
        argv = [*argv, "--model=/no/such/dir"]
        words = "no such directory"
    assert command.main(["jaxmoe_serve", *argv]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("jaxmoe_serve: error: ") and words in err
    assert len(err.splitlines()) == 1 and out == ""


def test_the_plan_loads_nothing(capsys):
    assert command.main(["jaxmoe_serve", "--plan_only"]) == 0
    assert "at the peak" in capsys.readouterr().out


def test_help_lists_every_option(capsys):
    assert command.main(["jaxmoe_serve", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--port", "--model", "--drain_timeout_s", "--[no]engine_process"):
        assert flag in out
    assert "--temperature" not in out
