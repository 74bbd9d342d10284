"""The page of a server in a real browser, before a stand-in for the server: chat, preferences, front, errors, key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from time import sleep
from typing import Any

import pytest
from real_browser import PATIENCE

from rewarded_lines.serving.middleware import page_file

ROWS = [{"name": "soup", "label": "Rewarded Soups"}, {"name": "lines", "label": "LiNeS"}]
# As a model could write it: marks of HTML, letters of several bytes, lines.
TEXT = '<img src=x onerror="document.title=1"> Größe λ 🎬\n<b>{said}</b>'


def point(weights: dict[str, float], means: list[float], row: str | None = "lines", name: str | None = None) -> Any:
    named = dict(zip(("positive", "detailed", "calm"), means, strict=False))
    return {"name": name, "row": row, "weights": weights, "means": named, "on_front": row == "lines"}


def offer(count: int = 2, **changes: Any) -> dict[str, Any]:
    """Return what `/preferences` answers, for so many policies; with two of them, a front of seven points."""
    policies = ["positive", "detailed", "calm"][:count]
    measured = [(0.0, 0.2, 19.0, "soup"), (0.5, 0.7, 15.0, "soup"), (1.0, 1.1, 9.0, "soup")]
    measured += [(0.0, 0.4, 19.9, "lines"), (0.6, 1.4, 17.5, "lines"), (1.0, 1.5, 9.6, "lines")]
    points = [point({}, [-0.2, 12.4], row=None)]
    for at, positive, detailed, row in measured:
        weights = {"positive": at, "detailed": 1 - at}
        points.append(point(weights, [positive, detailed], row, "chosen" if (at, row) == (0.6, "lines") else None))
    three = [point(dict.fromkeys(policies, 0.0) | {name: 1.0}, [1.0, 2.0, 3.0]) for name in policies]
    return {
        "base": "demo-sft",
        "mode": "adapters",
        "chat": True,
        "policies": policies,
        "step": 0.01,
        "rows": ROWS,
        "row": "lines",
        "current": dict.fromkeys(policies, 0.0) | {"positive": 0.5, policies[-1]: 0.5},
        "rewards": [{"name": name, "unit": "logit"} for name in policies],
        "points": points if count == 2 else three,
        **changes,
    }


class StandIn(ThreadingHTTPServer):
    """Answers as the server does, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, offered: dict[str, Any], key: str = "", admin: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.offered, self.key, self.admin = offered, key, admin
        self.asked: list[dict[str, Any]] = []
        self.gone = Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Answers(BaseHTTPRequestHandler):
    """Refuses a message `fail`, ends within an answer to `cut`, and goes on and on after `long`."""

    server: StandIn

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def reply(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, content: Any, status: int = 200) -> None:
        self.reply(json.dumps(content).encode(), {"content-type": "application/json"}, status)

    def refused(self, key: str) -> bool:
        wrong = bool(key) and self.headers["authorization"] != f"Bearer {key}"
        if wrong:
            self.json({"error": {"message": "Unauthorized"}}, 401)
        return wrong

    def do_GET(self) -> None:
        found = page_file(self.path)
        if found is not None:
            content, kind, more = found
            self.reply(content, {"content-type": kind, **more})
        elif self.path == "/preferences" and not self.refused(self.server.key):
            self.json(self.server.offered)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.refused(self.server.admin if self.path == "/preference" else self.server.key):
            return
        self.server.asked.append(body)
        if self.path == "/preference":
            self.json({"current": body["preference"], "row": body["row"]})
            return
        said = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if said == "fail":
            self.json({"error": {"message": "weights sum to 1.2; there are positive, detailed", "code": 400}}, 400)
        else:
            self.stream(said, body)

    def stream(self, said: str, body: dict[str, Any]) -> None:
        preference = body.get("preference", {})
        model = f"{body.get('row')}@" + ",".join(f"{name}={value:g}" for name, value in preference.items())
        self.reply(b"", {"content-type": "text/event-stream", "x-rewarded-lines-model": model})
        for data in (self.events(said, "prompt" in body)) * (10_000 if said == "long" else 1):
            # Cut anywhere, as networks do.
            middle = len(data) // 2
            try:
                self.wfile.write(data[:middle])
                if said == "long":
                    sleep(0.002)
                self.wfile.write(data[middle:])
            except ConnectionError:
                self.server.gone.set()
                return
        if said not in ("cut", "long"):
            self.wfile.write(b"data: [DONE]\n\n")

    def events(self, said: str, plain: bool) -> list[bytes]:
        found = [b": still there\r\n\r\n"]
        for letter in TEXT.format(said=said):
            choice = {"text": letter} if plain else {"delta": {"content": letter}}
            found.append(f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\r\n\r\n".encode())
        return found


@pytest.fixture
def opening(browser: Any) -> Iterator[Callable[..., tuple[Any, StandIn]]]:
    """Open the page of a stand-in; in the end it may have met no error and asked for nothing but its own server."""
    opened = []

    def open_(offered: dict[str, Any] | None = None, width: int = 1200, **options: Any) -> tuple[Any, StandIn]:
        keys = {name: options.pop(name) for name in ("key", "admin") if name in options}
        server = StandIn(offered or offer(), **keys)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(PATIENCE)
        page, problems, requests = context.new_page(), list[str](), list[str]()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server.address)
        opened.append((page, server, problems, requests))
        return page, server

    yield open_
    for page, server, problems, requests in opened:
        page.context.close()
        server.shutdown()
        server.server_close()
        # A refused request is told by the browser too.
        assert [one for one in problems if "Failed to load resource" not in one] == []
        assert requests and all(url.startswith(server.address) for url in requests)


def say(page: Any, text: str, turn: int) -> Any:
    """Send a message by the keyboard; return its turn once the answers have ended."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    found = page.locator(".turn").nth(turn)
    found.wait_for()
    page.wait_for_selector("#log[aria-busy=false]")
    return found


def test_a_chat_streams_text_as_text_and_keeps_what_was_said(opening: Any) -> None:
    page, server = opening()
    page.get_by_role("slider", name="Weight of positive").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.get_by_label("Seed").fill("7")
    first = say(page, "one", 0)
    assert first.locator(".text").text_content() == TEXT.format(said="one")
    assert first.locator("h3").text_content() == "lines@positive=0.53,detailed=0.47"
    assert page.locator("img, .text b").count() == 0 and page.title() == "demo-sft"
    say(page, "two", 1)
    sent = server.asked[1]
    assert [one["content"] for one in sent.pop("messages")] == ["one", TEXT.format(said="one"), "two"]
    assert sent == {
        **{"model": "demo-sft", "preference": {"positive": 0.53, "detailed": 0.47}, "row": "lines", "seed": 7},
        **{"stream": True, "max_tokens": 256, "temperature": 1},
    }
    page.get_by_text("The last request").click()
    assert page.locator("#command").text_content().startswith(f"curl {server.address}v1/chat/completions ")


def test_two_preferences_answer_side_by_side_with_one_seed(opening: Any) -> None:
    page, server = opening()
    page.get_by_label("Beside a second preference").check()
    second = page.get_by_role("group", name="B")
    second.get_by_label("Merge").select_option("soup")
    second.get_by_role("slider").press("Home")
    turn = say(page, "one", 0)
    assert sorted(turn.locator("h3").all_text_contents()) == [
        "lines@positive=0.5,detailed=0.5",
        "soup@positive=0,detailed=1",
    ]
    assert len(server.asked) == 2 and len({sent["seed"] for sent in server.asked}) == 1
    assert page.locator(".ring-name").all_text_contents() == ["A", "B"]
    assert "B: positive 0.200 logit, detailed 19.0 logit (measured here)" in page.locator("#standing").text_content()


def test_errors_are_told_as_text_and_the_message_stays(opening: Any) -> None:
    page, server = opening()
    for turn, (said, told) in enumerate(
        {"fail": "Error 400. weights sum to 1.2; there are positive, detailed", "cut": "The connection ended"}.items()
    ):
        assert told in say(page, said, turn).locator(".error").text_content()
        assert page.get_by_label("Message", exact=True).input_value() == said
    server.shutdown()
    server.server_close()
    assert "The server does not answer" in say(page, "more", 2).locator(".error").text_content()


def test_a_long_answer_can_be_stopped(opening: Any) -> None:
    page, server = opening()
    page.get_by_label("Message", exact=True).fill("long")
    page.get_by_role("button", name="Send").click()
    page.locator(".text", has_text="Größe").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    assert server.gone.wait(10) and page.get_by_role("button", name="Send").is_enabled()


def test_a_key_is_asked_for_only_where_the_server_wants_one(opening: Any) -> None:
    page, _ = opening(key="secret")
    page.get_by_role("alert").get_by_text("The server wants an API key. Unauthorized").wait_for()
    assert page.locator("#main").is_hidden()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    assert say(page, "one", 0).locator(".text").text_content() == TEXT.format(said="one")
    assert page.locator("#unlock").is_hidden() and "secret" not in page.locator("body").inner_text()


def test_three_policies_have_a_triangle_and_sliders(opening: Any) -> None:
    page, server = opening(offer(3))
    assert page.locator("#plot .drawn").count() == 0 and page.get_by_role("combobox", name="Across").is_visible()
    page.locator(".triangle polygon").click()
    assert page.locator(".told").text_content() == "positive 0.50, detailed 0.25, calm 0.25"
    slider = page.get_by_role("slider", name="Weight of calm")
    slider.press("Home")
    assert page.locator(".told").text_content() == "positive 0.67, detailed 0.33, calm 0.00"
    assert slider.get_attribute("aria-valuetext") == "calm 0.00"
    say(page, "one", 0)
    assert server.asked[0]["preference"] == {"positive": 0.67, "detailed": 0.33, "calm": 0}


def test_a_point_of_the_front_is_chosen_by_click_and_from_the_list(opening: Any) -> None:
    page, _ = opening()
    standing = page.locator("#standing")
    # λ = 0.5 lies five sixths of the way from 0 to the point at 0.6.
    assert "here: positive 1.23 logit, detailed 17.9 logit (between two measured points)" in standing.text_content()
    page.locator(".point.row-0").first.click()
    assert "positive 0.200 logit" in standing.text_content()
    assert page.get_by_label("Merge").input_value() == "soup"
    choice = page.get_by_label("Stand on a measured point")
    choice.select_option(label="chosen: LiNeS, positive 0.60, detailed 0.40 (scores: positive 1.40, detailed 17.5)")
    assert page.locator(".told").text_content() == "positive 0.60, detailed 0.40"
    assert page.locator("#plot .drawn").count() == 2 and page.locator(".ring").count() == 1


def test_whole_models_have_one_preference_which_an_admin_changes(opening: Any) -> None:
    page, server = opening(offer(mode="whole", chat=False, rewards=[], points=[]), key="secret", admin="master")
    # Two keys: each is sent only where it is asked for.
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    assert page.get_by_label("Beside a second preference").is_hidden() and page.locator("#front").is_hidden()
    page.get_by_role("slider").press("End")
    page.get_by_role("button", name="Change the server's preference").click()
    page.get_by_label("Admin key").fill("master")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Change the server's preference").click()
    page.get_by_text("The server now answers with lines, positive 1.00, detailed 0.00.").wait_for()
    page.get_by_label("A text to go on from").fill("a film")
    page.get_by_role("button", name="Send").click()
    page.locator(".text", has_text="Größe").wait_for()
    page.wait_for_selector("#log[aria-busy=false]")
    assert server.asked[0] == {"preference": {"positive": 1, "detailed": 0}, "row": "lines"}
    assert server.asked[1]["prompt"] == "a film" and server.asked[1]["model"] == "default"
    assert "preference" not in server.asked[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows_and_dark_mode(opening: Any, pictures: Any, scheme: str) -> None:
    page, _ = opening(offer(3), width=340, color_scheme=scheme)
    page.get_by_label("Beside a second preference").check()
    say(page, "word" * 60, 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    pictures.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=pictures / f"chat-{scheme}.png", full_page=True)


@pytest.mark.parametrize("path", ["/page/", "/page/../middleware.py", "/page/chat.js/", "/index.html", "//", ""])
def test_no_other_path_is_a_file_of_the_page(path: str) -> None:
    assert page_file(path) is None
