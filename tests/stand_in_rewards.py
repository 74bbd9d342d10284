"""A reward's server for tests: it can be slow, fail on purpose, die and come back, and keeps a ledger."""

import json
import math
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score_of(prompt, response, *columns):
    """Return the server's score: a float with many digits that depends on every part."""
    texts = [json.dumps(one, sort_keys=True) for one in (prompt, response, *columns)]
    return sum((at + 1) * len(text) + ord(text[-2]) / 7 for at, text in enumerate(texts)) / 3


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.say(200, {"data": []})

    def do_POST(self):
        own = self.server.owner
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with own.counted():
            own.headers.append(dict(self.headers))
            said = own.answer(self.path, content)
            own.wait(content)
        if said == "drop":
            self.close_connection = True
        elif said == "cut":
            self.say(200, '{"scores": [1.0, 2')
        elif said == "short":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"scores": [')
            self.close_connection = True
        else:
            self.say(*said)

    def say(self, status, content, headers=()):
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, port, owner):
        self.owner, self.open = owner, []
        super().__init__(("127.0.0.1", port), Handler)

    def get_request(self):
        connection, address = super().get_request()
        self.open.append(connection)
        return connection, address

    def handle_error(self, *_):
        pass


class RewardServer:
    """Scores pairs by `score_of`; `fault(number, content)` returns another answer for a request, or None.

    `wait(content)` returns when the answer may go.

    Attributes:
        asked: requests for scores, without those that ask about no pairs.
        ledger: how often each pair was answered with a score.
        most, mean: requests under way at the same time.
    """

    def __init__(self, fault=lambda number, content: None, wait=lambda content: None):
        self.fault, self.wait = fault, wait
        self.asked, self.headers, self.ledger = [], [], Counter()
        self.most = self._now = 0
        self._area = self._since = self._began = 0.0
        self._lock = threading.Lock()
        self._listener, self.port = None, 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}/score"

    def start(self):
        self._listener = Listener(self.port, self)
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Die: no answer to what is under way, no new connections."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            listener.server_close()
            for connection in listener.open:
                with suppress(OSError):
                    connection.shutdown(2)

    def die_for(self, seconds):
        """Die, and come back after some seconds."""

        def gone():
            self.stop()
            time.sleep(seconds)
            self.start()

        threading.Thread(target=gone, daemon=True).start()

    def counted(self):
        return _Counted(self)

    @property
    def mean(self):
        return self._area / (self._since - self._began)

    def change(self, by):
        with self._lock:
            now = time.perf_counter()
            self._began = self._began or now
            self._area += self._now * (now - (self._since or now))
            self._since, self._now = now, self._now + by
            self.most = max(self.most, self._now)

    def answer(self, path, content):
        with self._lock:
            if not content["prompts"]:
                return 200, {"scores": []}
            self.asked.append(content)
            said = self.fault(len(self.asked), content)
            if said is None:
                pairs = zip(content["prompts"], content["responses"], *content["columns"].values(), strict=True)
                pairs = [tuple(pair) for pair in pairs]
                self.ledger.update(json.dumps(pair) for pair in pairs)
                said = 200, {"scores": [score_of(*pair) for pair in pairs]}
        return said


class _Counted:
    def __init__(self, server):
        self._server = server

    def __enter__(self):
        self._server.change(1)

    def __exit__(self, *_):
        self._server.change(-1)


class ChatServer(RewardServer):
    """Answers with what `say(last turn's text)` returns: a text, or tokens with their probabilities."""

    say = staticmethod(lambda text: "Score: 3")

    def answer(self, path, content):
        with self._lock:
            self.path = path
            assert path.partition("?")[0] == "/v1/chat/completions"
            self.asked.append(content)
            said = self.fault(len(self.asked), content)
            if said is not None:
                return said
            text = content["messages"][-1]["content"]
            self.ledger[text] += 1
            return 200, {"choices": [choice(self.say(text))]}


def choice(said):
    if not isinstance(said, dict):
        text, ended = said if isinstance(said, tuple) else (said, "stop")
        return {"message": {"role": "assistant", "content": text}, "finish_reason": ended}
    top = [{"token": token, "logprob": math.log(share)} for token, share in said.items()]
    first = {**max(top, key=lambda one: one["logprob"]), "top_logprobs": top}
    return {"message": {"content": first["token"]}, "finish_reason": "length", "logprobs": {"content": [first]}}
