"""The server in front of an engine computable by hand, on a real socket, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import httpx

from jaxmoe.engine.thread_engine import ThreadEngine
from jaxmoe.serving.app import make_app
from jaxmoe.serving.http_server import HttpServer
from jaxmoe.serving.server_config import ServerConfig
from jaxmoe.serving.state import ServerState, Texts
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.output_parser import OutputFormats
from jaxmoe.text.tokenizer import ByteTokenizer
from support import fake_step

# Hermes calls and thoughts, in the least of templates.
TEMPLATE = (
    "{% if tools %}T:{% for t in tools %}{{ t.function.name }},{% endfor %}|{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "|{% endfor %}{% if add_generation_prompt %}a:"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}{# </think> #}"
)
MODEL = "fake"


class Gate:
    """Holds the engine before a step while it is closed."""

    def __init__(self, step):
        self._open = threading.Event()
        self._open.set()
        self.waiting = threading.Event()
        run = step.run

        def gated(kind, rows, **more):
            if not self._open.is_set():
                self.waiting.set()
                self._open.wait()
            return run(kind, rows, **more)

        step.run = gated

    def close(self):
        self.waiting.clear()
        self._open.clear()

    def open(self):
        self._open.set()


class Front:
    def __init__(self, url, client, state, engine, fake, step, http):
        self.url, self.client, self.state = url, client, state
        self.engine, self.fake, self.step, self.http = engine, fake, step, http
        self.gate = Gate(step)

    async def post(self, path, body, **more):
        return await self.client.post(path, json=body, **more)

    async def events(self, path, body):
        """(event name, value) of every event of a stream; comments are left out."""
        async with self.client.stream("POST", path, json=body) as r:
            assert r.status_code == 200, await r.aread()
            assert r.headers["content-type"].startswith("text/event-stream")
            text = (await r.aread()).decode()
        return parse_events(text)

    async def settle(self):
        """Until the engine has nothing left to do."""
        for _ in range(500):
            if not self.engine.has_work and not self.state.admission.requests:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the work never ends")


def parse_events(text):
    out = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        name = lines[0][7:] if lines[0].startswith("event: ") else None
        data = "".join(line[6:] for line in lines if line.startswith("data: "))
        out.append((name, data if data == "[DONE]" else json.loads(data)))
    return out


@contextlib.asynccontextmanager
async def serving(
    script=lambda prompt: b"answer",
    *,
    keys=None,
    template=TEMPLATE,
    max_model_len=400,
    dies=False,
    max_requests=1024,
    **more,
):
    """script: bytes of the prompt to the bytes written. template: a source, or an encoding. more:
    fields of ServerConfig, and `engine`: arguments of make_engine. dies: whether the engine does,
    which keeps its work then.
    """
    engine_args = {"num_pages": max_model_len * 2, "max_num_seqs": 4} | more.pop("engine", {})
    engine, step = fake_step.make_engine(script, max_model_len=max_model_len, **engine_args)
    fake = ThreadEngine.on_engine(engine, model=MODEL, hold_s=0.0)  # a step of its own each
    await fake.wait_ready()
    config = ServerConfig(port=0, **more)
    chat = ChatTemplate(template)
    texts = Texts(ByteTokenizer(256), chat, OutputFormats.of(chat.source))
    state = ServerState(fake, texts, config, model=MODEL, max_requests=max_requests)
    http = HttpServer(make_app(state, keys or {}), config)
    await http.start()
    url = f"http://127.0.0.1:{http.port}"
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        front = Front(url, client, state, engine, fake, step, http)
        try:
            yield front
        finally:
            front.gate.open()
            await http.stop(0.5)
            await fake.close()
            state.close()
    if not dies:
        assert not engine.has_work
        engine.pages.check()


def run(test):
    return asyncio.run(asyncio.wait_for(test, 60))


@contextlib.contextmanager
def serving_in_thread(script=lambda prompt: b"answer", **more):
    """The same server in a thread, for clients that block; gives its URL."""
    url, ready, stop = [], threading.Event(), None

    async def serve():
        nonlocal stop
        async with serving(script, **more) as f:
            stop = asyncio.Event()
            url.append(f.url)
            loop.append(asyncio.get_running_loop())
            ready.set()
            await stop.wait()
            await f.settle()

    loop: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield url[0]
    finally:
        loop[0].call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
