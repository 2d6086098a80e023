"""Google Cloud Storage on this machine: as much of its JSON API as gcsfs uses for a checkpoint.

gcsfs goes to `STORAGE_EMULATOR_HOST`; see
https://cloud.google.com/storage/docs/json_api/v1 for what is answered here.
"""

import contextlib
import http.server
import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tests.support.serving import serving


class FakeGcs:
    """Objects by "bucket/name" in the order of their puts; `ranges` has the ranges that were read.

    With `refusal` every request is answered by status 403 and that message.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.ranges: list[str] = []
        self.refusal: str | None = None
        self.url = ""

    def metadata(self, key: str) -> dict[str, Any]:
        bucket, _, name = key.partition("/")
        quoted = urllib.parse.quote(name, safe="")
        return {
            "name": name,
            "bucket": bucket,
            "size": str(len(self.objects[key])),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "generation": "1",
            "mediaLink": f"{self.url}/download/storage/v1/b/{bucket}/o/{quoted}?alt=media",
        }


def _handler(gcs: FakeGcs) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if gcs.refusal:
                return self.send(403, {"error": {"code": 403, "message": gcs.refusal}})
            if url.path == "/batch/storage/v1":
                return self.batch(body)
            if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path):
                return self.upload(match[1], query, body)
            if re.fullmatch(r"/storage/v1/b/[^/]+", url.path):
                return self.send(200, {"name": url.path.rsplit("/", 1)[1]})
            if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", url.path):
                return self.listing(match[1], query)
            if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", url.path):
                return self.one(f"{match[1]}/{urllib.parse.unquote(match[2])}", query)
            return self.send(404, {"error": {"code": 404, "message": url.path}})

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def batch(self, body: bytes) -> None:
            answers = b""
            for number, path in enumerate(re.findall(rb"DELETE\s+(\S+)", body), start=1):
                match = re.search(r"/b/([^/]+)/o/([^/?]+)", path.decode())
                assert match is not None
                gone = gcs.objects.pop(f"{match[1]}/{urllib.parse.unquote(match[2])}", None)
                status = "404 Not Found" if gone is None else "204 No Content"
                answers += (
                    "--part\r\nContent-Type: application/http\r\n"
                    f"Content-ID: <response-{number}>\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n"
                ).encode()
            headers = {"Content-Type": "multipart/mixed; boundary=part"}
            self.send(200, answers + b"--part--", headers)

        def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
            if "upload_id" in query:
                key, data = gcs.uploads[query["upload_id"]]
                data.extend(body)
                if self.headers.get("content-range", "").endswith("/*"):
                    return self.send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
            elif query["uploadType"] == "resumable":
                number = str(len(gcs.uploads))
                gcs.uploads[number] = f"{bucket}/{json.loads(body)['name']}", bytearray()
                path = f"{gcs.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
                return self.send(200, b"", {"Location": path})
            else:
                boundary = re.search(r'boundary="?([^";]+)', self.headers["content-type"])
                assert boundary is not None
                _, first, second, _ = body.split(b"--" + boundary[1].encode())
                name = json.loads(re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1])["name"]
                content = re.split(rb"\r?\n\r?\n", second, maxsplit=1)[1]
                key, data = f"{bucket}/{name}", bytearray(content.removesuffix(b"\n"))
            gcs.objects.pop(key, None)
            gcs.objects[key] = bytes(data)
            return self.send(200, gcs.metadata(key))

        def listing(self, bucket: str, query: dict[str, str]) -> None:
            start, delimiter = f"{bucket}/{query.get('prefix', '')}", query.get("delimiter")
            items, prefixes = [], set()
            for key in sorted(gcs.objects):
                head, found, _ = key.removeprefix(start).partition(delimiter or "\0")
                if not key.startswith(start):
                    continue
                if found:
                    prefixes.add(f"{query.get('prefix', '')}{head}{delimiter}")
                else:
                    items.append(gcs.metadata(key))
            self.send(200, {"items": items, "prefixes": sorted(prefixes)})

        def one(self, key: str, query: dict[str, str]) -> None:
            if key not in gcs.objects:
                return self.send(404, {"error": {"code": 404, "message": "No such object"}})
            if self.command == "DELETE":
                del gcs.objects[key]
                return self.send(204, b"")
            if query.get("alt") != "media":
                return self.send(200, gcs.metadata(key))
            data, wanted = gcs.objects[key], self.headers.get("range", "")
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            if match is None:
                return self.send(200, data)
            gcs.ranges.append(f"{key} {wanted}")
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            return self.send(206, data[start:stop], headers)

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

    return Handler


@contextlib.contextmanager
def running() -> Iterator[FakeGcs]:
    """The storage, at `gcs.url` until the block ends."""
    gcs = FakeGcs()
    with serving(_handler(gcs)) as port:
        gcs.url = f"http://127.0.0.1:{port}"
        yield gcs
