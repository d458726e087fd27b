"""Models, health, readiness, metrics, props, tokens, the page."""

from prometheus_client.parser import text_string_to_metric_families
from support.front import run, serving

from jaxmoe.engine.async_engine import EngineStatus
from jaxmoe.serving.metrics import engine_families

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def test_models():
    async def test():
        async with serving(served_model_name="a,org/b") as f:
            body = (await f.client.get("/v1/models")).json()
            assert [m["id"] for m in body["data"]] == ["a", "org/b"]
            assert body["data"][0]["max_model_len"] == 400
            assert (await f.client.get("/v1/models/org/b")).json()["id"] == "org/b"
            r = await f.client.get("/v1/models/c")
            assert r.status_code == 404 and r.json()["error"]["code"] == "model_not_found"

    run(test())


def test_states_show_in_health_and_ready(monkeypatch):
    states = [
        (EngineStatus("loading", "loading weights", 41.26), 200, 503, 503, "41 %"),
        (EngineStatus("restarting", "starting", 0.0, "it died"), 503, 503, 503, "restarting"),
        (EngineStatus("dead", error="it died"), 503, 503, 503, "it died"),
        (EngineStatus("draining"), 200, 503, 503, "shutting down"),
    ]

    async def test():
        async with serving() as f:
            assert (await f.client.get("/ready")).json() == {"status": "ready", "model": "fake"}
            with monkeypatch.context() as m:
                figures = {"warm_up_programs_planned": 12.0, "warm_up_programs_compiled": 3.0}
                m.setattr(f.fake, "stats", lambda: figures)
                r = await f.client.get("/ready")
                assert r.status_code == 200
                assert r.json()["programs"] == {"compiled": 3, "planned": 12}
            for status, health, ready, answer, words in states:
                with monkeypatch.context() as m:
                    m.setattr(f.fake, "status", lambda s=status: s)
                    assert (await f.client.get("/health")).status_code == health
                    r = await f.client.get("/ready")
                    assert r.status_code == ready and r.json()["status"] == status.state
                    if status.state == "loading":
                        assert r.json()["stage"] == "loading weights"
                        assert r.json()["percent"] == 41.3
                    for path in (CHAT, "/v1/messages"):
                        r = await f.post(path, ASK)
                        assert r.status_code == answer and words in r.text, (status, r.text)
                        assert "retry-after" in r.headers
            assert (await f.client.get("/health")).status_code == 200

    run(test())


def test_metrics_parse_and_count():
    async def test():
        async with serving(lambda prompt: b"abcdefgh") as f:
            await f.post(CHAT, ASK)
            await f.post(CHAT, {**ASK, "temperature": -1})
            await f.client.get("/made/up/path")
            r = await f.client.get("/metrics")
            assert r.headers["content-type"].startswith("text/plain")
            families = {m.name: m for m in text_string_to_metric_families(r.text)}
            http = {
                (s.labels["path"], s.labels["status"]): s.value
                for s in families["jaxmoe_http_requests"].samples
                if s.name.endswith("_total")
            }
            assert http == {(CHAT, "200"): 1, (CHAT, "400"): 1, ("?", "404"): 1}
            assert families["jaxmoe_generation_tokens"].samples[0].value == 4
            assert families["jaxmoe_time_to_first_token_seconds"].type == "histogram"
            assert families["jaxmoe_time_per_output_token_seconds"].type == "histogram"
            assert families["jaxmoe_queue_seconds"].type == "histogram"
            for name in (
                *("requests_running", "requests_waiting", "waiting_prompt_tokens"),
                *("prompt_tokens", "cached_prompt_tokens", "generation_tokens"),
                *("kv_pages", "kv_pages_used", "kv_pages_free", "kv_pages_cached"),
                *("prefix_cache_query_tokens", "prefix_cache_hit_tokens"),
                *("weight_bytes_read", "kv_bytes_read", "decode_bytes_read"),
                *("last_decode_step_weight_bytes", "last_decode_step_kv_bytes"),
                *("read_ceiling_bytes_per_second", "dram_fraction_of_ceiling"),
            ):
                assert f"jaxmoe_{name}" in families

    run(test())


def test_flat_figures_become_families():
    stats = {
        'a_total{k="x"}': 1.0,
        'a_total{k="y"}': 2.0,
        "g": 3.0,
        "count": 4.0,
        'h_bucket{le="1"}': 1.0,
        'h_bucket{le="+Inf"}': 2.0,
        "h_sum": 5.0,
        "h_count": 2.0,
    }
    families = {m.name: m for m in engine_families(stats)}
    assert {n: m.type for n, m in families.items()} == {
        "jaxmoe_a": "counter",
        "jaxmoe_g": "gauge",
        "jaxmoe_count": "gauge",
        "jaxmoe_h": "histogram",
    }
    assert [s.labels for s in families["jaxmoe_a"].samples] == [{"k": "x"}, {"k": "y"}]
    assert len(families["jaxmoe_h"].samples) == 4


def test_props_and_version():
    async def test():
        async with serving() as f:
            props = (await f.client.get("/props")).json()
            assert props["state"] == "ready" and props["max_model_len"] == 400
            assert props["tool_format"] == "hermes" and props["reasoning_format"] == "qwen3"
            assert props["default_generation_settings"]["temperature"] == 1.0
            version = (await f.client.get("/version")).json()
            assert version["version"] and version["starlette"]
            assert (await f.client.get("/openapi.json")).json()["openapi"] == "3.1.0"

    run(test())


def test_tokens():
    async def test():
        async with serving() as f:
            r = await f.post("/tokenize", {"prompt": "né", "return_token_strs": True})
            body = r.json()
            assert body["tokens"] == list("né".encode()) and body["count"] == 3
            assert len(body["token_strs"]) == 3 and body["max_model_len"] == 400
            body = (await f.post("/tokenize", {"messages": ASK["messages"]})).json()
            assert bytes(body["tokens"]) == b"u:hi|a:"
            back = (await f.post("/detokenize", {"tokens": body["tokens"]})).json()
            assert back["prompt"] == "u:hi|a:"
            for path, wrong in [
                ("/tokenize", {}),
                ("/tokenize", {"prompt": "a", "messages": ASK["messages"]}),
                ("/tokenize", {"prompt": "a" * 500}),
                ("/detokenize", {"tokens": [-1]}),
                ("/detokenize", {"tokens": [256]}),
                ("/detokenize", {"tokens": ["a"]}),
                ("/detokenize", {"tokens": [2**63]}),
            ]:
                assert (await f.post(path, wrong)).status_code == 400, wrong

    run(test())


def test_the_page():
    async def test():
        async with serving() as f:
            r = await f.client.get("/")
            assert r.status_code == 200 and r.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in r.headers["content-security-policy"]
            again = await f.client.get("/", headers={"if-none-match": r.headers["etag"]})
            assert again.status_code == 304 and not again.content
        async with serving(chat_page=False) as f:
            assert (await f.client.get("/")).status_code == 404

    run(test())
