"""Preferences in requests, through the middleware, with a stand-in for vLLM."""

import asyncio

import pytest
from stand_in_vllm import Engine, StandIn
from starlette.applications import Starlette
from starlette.testclient import TestClient

from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.serving.http_messages import hashed, rewriting
from rewarded_lines.serving.middleware import PreferenceMiddleware
from rewarded_lines.serving.served_settings import ServedSettings

CHAT = "/v1/chat/completions"
HEADER = "x-rewarded-lines-model"


def ask(body, path=CHAT, **options):
    """Return the answer to a request, and what vLLM saw of it."""

    async def once():
        server = StandIn(**options)
        await server.start()
        return await server.client.post(path, json=body), server.seen

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({"model": "sft", "preference": {"kind": 0.7, "brief": 0.3}}, "lines@0.7"),
        ({"preference": {"kind": 0.701, "brief": 0.299}, "row": "soup"}, "soup@0.7"),
        ({"preference": {"brief": 1}}, "lines@0"),
        ({"model": "default"}, "soup@0.3"),
        ({}, "soup@0.3"),
        ({"model": "chosen"}, "lines@0.4"),
        ({"model": "off"}, "off"),
        ({"model": "lines@kind=.7,brief=.3;alpha=1"}, "lines@0.7"),
        # Those of vLLM, known or not, are its own.
        ({"model": "sft"}, None),
        ({"model": "another"}, None),
    ],
)
def test_a_request_gets_the_model_that_it_asks_for(body, model):
    answer, seen = ask({**body, "seed": 3})
    assert answer.status_code == 200 and answer.text == "data: 1\n\ndata: 2\n\n"
    assert seen == [{"model": model or body["model"], "seed": 3}]
    assert answer.headers.get(HEADER) == model


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"preference": {"kind": 0.7, "brief": 0.7}}, 400, "do not sum to 1"),
        ({"preference": {"king": 1}}, 404, "did you mean `kind`?"),
        ({"preference": [0.7, 0.3]}, 400, "weights by name: kind, brief"),
        ({"preference": {"kind": "all"}}, 400, "not a weight"),
        ({"preference": {"kind": 1}, "row": "../lines"}, 404, "no such model"),
        ({"preference": {"kind": 1}, "model": "lines@0.5"}, 400, "a model and a preference"),
        ({"row": "lines", "model": "sft"}, 400, "a row without weights"),
        ({"model": "lines@2"}, 400, "a weight lies outside 0 to 1"),
        ({"model": "/etc/passwd@0.5"}, 404, "no such model"),
    ],
)
def test_what_is_not_on_the_menu_is_refused(body, status, said):
    answer, seen = ask(body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], seen) == (status, status, []) and said in error["message"]


def test_other_bodies_pass_as_they_are():
    async def check():
        server = StandIn(most_bytes=1000)
        raw = b'{"model": "default", "input": '
        for path, body, kind in (("/v1/audio", b"\x00 preference", "multipart/form-data"), (CHAT, raw, "text/plain")):
            await server.client.post(path, content=body, headers={"content-type": kind})
        await server.client.post("/tokenize", json={"prompt": "of great beauty"})
        assert server.seen == [b"\x00 preference", raw, {"prompt": "of great beauty"}]
        wrong = b'{"preference": {"\\ud800": 1}}'
        answer = await server.client.post(CHAT, content=wrong, headers={"content-type": "application/json"})
        assert answer.status_code == 404

        async def parts():
            for _ in range(30):
                yield b"a" * 40

        for body in (b"a" * 1001, parts()):
            answer = await server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 413 and "--max-body" in answer.text
        assert len(server.seen) == 3

    asyncio.run(check())


def test_tokens_without_a_model_get_the_default_too():
    answer, seen = ask({"token_ids": [1]}, "/inference/v1/generate")
    assert seen == [{"token_ids": [1], "model": "soup@0.3"}] and answer.headers[HEADER] == "soup@0.3"


def test_adapters_are_never_loaded_from_a_path():
    answer, seen = ask({"lora_name": "mine", "lora_path": "/etc"}, "/v1/load_lora_adapter")
    assert (answer.status_code, seen) == (403, [])


def test_lists_the_page_and_the_key():
    async def check():
        server = StandIn(key="sesame")
        get, own = server.client.get, {"Authorization": "Bearer sesame"}
        page, script = await get("/"), await get("/page/chat.js")
        assert page.text.startswith("<!doctype html>") and page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert script.status_code == 200 and "javascript" in script.headers["content-type"]
        assert (await get("/health")).status_code == 200
        assert (await get("/../middleware.py")).status_code == 404
        for path in ("/v1/models", "/preferences"):
            assert (await get(path)).status_code == 401
            assert (await get(path, headers={"Authorization": "Bearer other"})).status_code == 401
        answer = await server.client.post("/tokenize", json={"model": "lines@0.5"})
        assert answer.status_code == 401 and server.seen == [] and "www-authenticate" in answer.headers
        cards = {card["id"]: card for card in (await get("/v1/models", headers=own)).json()["data"]}
        assert list(cards)[0] == "sft" and {"lines@0", "lines@0.25", "lines@1", "chosen", "off"} <= cards.keys()
        assert cards["default"]["preference"] == {"kind": 0.3, "brief": 0.7} and cards["chosen"]["object"] == "model"
        told = (await get("/preferences", headers=own)).json()
        assert (told["base"], told["mode"], told["policies"]) == ("sft", "adapters", ["kind", "brief"])
        assert (told["row"], told["current"], told["chat"]) == ("soup", {"kind": 0.3, "brief": 0.7}, True)
        assert told["points"] == told["rewards"] == []

    asyncio.run(check())


def test_whole_models_are_one_merge_that_the_admin_changes():
    async def check():
        server = StandIn(whole=True, admin=hashed("root"))
        await server.start()
        post, own = server.client.post, {"Authorization": "Bearer root"}
        # The base's name is an address only with a preference.
        for body in (
            {},
            {"model": "default"},
            {"model": "soup@0.3"},
            {"model": "sft", "preference": {"kind": 0.3, "brief": 0.7}, "row": "soup"},
        ):
            answer = await post(CHAT, json=body)
            assert (answer.status_code, answer.headers[HEADER]) == (200, "soup@0.3")
        assert server.seen == [{"model": "default"}] * 4
        for body, status, said in (
            ({"model": "sft"}, 404, "holds soup@0.3"),
            ({"model": "lines@1"}, 409, "POST /preference"),
        ):
            answer = await post(CHAT, json=body)
            assert answer.status_code == status and said in answer.text
        wish = {"preference": {"kind": 1}, "row": "lines"}
        for headers in ({}, {"Authorization": "Bearer other"}):
            assert (await post("/preference", json=wish, headers=headers)).status_code == 401
        for wrong in ({}, [], {"preference": {"kind": 2}}, {"model": "sft"}):
            assert (await post("/preference", json=wrong, headers=own)).status_code in (400, 404)
        answer = await post("/preference", json=wish, headers=own)
        assert answer.json()["model"] == "lines@1" and answer.json()["current"] == {"kind": 1.0, "brief": 0.0}
        assert (await server.client.get("/preferences")).json()["current"] == {"kind": 1.0, "brief": 0.0}
        cards = [card["id"] for card in (await server.client.get("/v1/models")).json()["data"]]
        assert cards == ["default", "lines@1"]
        assert (await post(CHAT, json={})).headers[HEADER] == "lines@1"
        assert server.engine.log == ["open_plan", "use_merge", "pause wait", "use_merge", "resume"]

    asyncio.run(check())


def test_a_change_waits_for_requests_that_run_and_new_ones_wait_for_the_change():
    async def check():
        server = StandIn(whole=True, admin=hashed("root"))
        await server.start()
        server.hold = asyncio.Event()
        first = asyncio.create_task(server.client.post(CHAT, json={}))
        while not server.seen:
            await asyncio.sleep(0)
        wish, own = {"model": "lines@1"}, {"Authorization": "Bearer root"}
        change = asyncio.create_task(server.client.post("/preference", json=wish, headers=own))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(server.client.post(CHAT, json={"n": 2}))
        await asyncio.sleep(0.05)
        assert server.engine.log == ["open_plan", "use_merge"] and len(server.seen) == 1
        server.hold.set()
        answers = await asyncio.gather(first, change, second)
        assert [answer.headers.get(HEADER) for answer in answers] == ["soup@0.3", None, "lines@1"]
        # One that does not end stops the change, not the server.
        server.hold = asyncio.Event()
        third = asyncio.create_task(server.client.post(CHAT, json={"n": 3}))
        while len(server.seen) < 3:
            await asyncio.sleep(0)
        late = await server.client.post("/preference", json={"model": "soup@1"}, headers=own)
        assert late.status_code == 503 and "1 requests still run" in late.text
        server.hold.set()
        assert (await third).headers[HEADER] == "lines@1"

    asyncio.run(check())


@pytest.mark.parametrize("reason", ["not finite", "dead"])
def test_a_failed_change_leaves_the_old_weights_and_says_so(reason):
    async def check():
        server = StandIn(whole=True, admin=hashed("root"))
        await server.start()
        before, server.engine.reasons = server.engine.weights, [reason]
        own = {"Authorization": "Bearer root"}
        answer = await server.client.post("/preference", json={"model": "lines@1"}, headers=own)
        after = await server.client.post(CHAT, json={})
        if reason != "dead":
            assert answer.status_code == 409 and "soup@0.3 goes on answering" in answer.text
            assert server.engine.weights == before and after.headers[HEADER] == "soup@0.3"
        else:
            assert answer.status_code == after.status_code == 503 and "restart the server" in after.text
            assert server.seen == []
        assert server.engine.log[-1] == "resume"

    asyncio.run(check())


def test_a_server_opens_its_desk_before_it_answers(tiny, capfd):
    point = PointSpec("lines", MergeSpec((0.25, 0.75), 1.0, 1.0)).as_dict()
    given = {"project": str(tiny / "rewarded-lines.yaml"), "points": {"default": point}, "ready": "it answers"}
    app = Starlette()
    app.add_middleware(PreferenceMiddleware, settings=ServedSettings(**given, whole={"plan": {}, "level": "disk"}))
    app.state.engine_client = Engine()
    with TestClient(app) as client:
        told = client.get("/preferences").json()
    assert (told["model"], told["mode"], told["current"]) == ("lines@0.25", "whole", {"first": 0.25, "second": 0.75})
    assert capfd.readouterr().out == "it answers\n"


def test_a_list_of_models_keeps_the_headers_of_the_engine():
    """A page of another origin may read it only with those of `allowed_origins`."""

    async def check():
        sent = []

        async def send(message):
            sent.append(message)

        answer = rewriting(send, lambda content: {**content, "more": 1})
        headers = [(b"access-control-allow-origin", b"*"), (b"content-length", b"2")]
        await answer({"type": "http.response.start", "status": 200, "headers": headers})
        await answer({"type": "http.response.body", "body": b"{}"})
        return dict(sent[0]["headers"]), sent[1]["body"]

    headers, body = asyncio.run(check())
    assert headers[b"access-control-allow-origin"] == b"*" and body == b'{"more": 1}'
    assert headers[b"content-length"] == str(len(body)).encode()
