"""A judging server on this machine that misbehaves as told: `judge_server` is its fixture."""

import http.server
import json
import threading
import time
import types

import pytest

from tests.support.serving import serving


def completion(content):
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def plain(body, *, status=200, **headers):
    """Answers with these bytes."""

    def reply(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def says(text):
    return plain(completion(text), Content_Type="application/json")


def status(code, **headers):
    return plain(b'{"error": "as told"}', status=code, **headers)


def stalls(handler):
    handler.owner.released.wait(20)


def hangs_up(handler):
    handler.close_connection = True


def breaks_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("CORRECT")[:20])


def no_http(handler):
    handler.wfile.write(b"what?\r\n\r\n")


@pytest.fixture
def judge_server():
    """A server that does what it is told to, in turn, and keeps the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        owner = types.SimpleNamespace(
            requests=[],
            times=[],
            replies=[],
            judging=None,
            released=threading.Event(),
            lock=threading.Lock(),
        )

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with owner.lock:
                owner.requests.append((self.path, self.headers.get("Authorization"), body))
                owner.times.append(time.monotonic())
                judging = owner.judging
                reply = None if judging else owner.replies.pop(0)
            try:
                judging(self, body) if judging else reply(self)
            except OSError:
                self.close_connection = True  # the other side has hung up

        def log_message(self, *_):
            pass

    owner = Handler.owner
    with serving(Handler) as port:
        owner.url = f"http://127.0.0.1:{port}/v1/"
        yield owner
        owner.released.set()
