"""A local HTTP server that does what the web does to downloaders."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def picture(kind: str = "JPEG", size: tuple[int, int] = (32, 24), mode: str = "RGB", **options: object) -> bytes:
    """A small drawn picture."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def huge_png() -> bytes:
    """A valid PNG of 20,000 x 20,000 pixels in a few kilobytes: a decompression bomb."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


class HostileServer:
    """Answers by path; counts requests and how many were open at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: Counter[str] = Counter()
        self.open_now = 0
        self.most_open = 0
        self.starts: list[float] = []
        self.lock = threading.Lock()
        self.healed = False


@contextmanager
def hostile_server() -> Iterator[HostileServer]:
    """Start the server on a free local port for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            state = server_state
            with state.lock:
                state.requests[self.path] += 1
                state.open_now += 1
                state.most_open = max(state.most_open, state.open_now)
                state.starts.append(time.monotonic())
            try:
                self.answer(state.requests[self.path])
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with state.lock:
                    state.open_now -= 1

        def send(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, times: int) -> None:
            good = picture()
            name = self.path.strip("/").split("?")[0]
            if name.startswith("good"):
                time.sleep(0.02)
                self.send(200, picture(size=(32, 24 + int(name.removeprefix("good") or 0))))
            elif name == "slow":
                time.sleep(3)
                self.send(200, good)
            elif name == "drip":  # never silent, never done
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                for _ in range(30):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            elif name == "html":
                self.send(200, b"<!doctype html><title>Robot check</title>", Content_Type="image/jpeg")
            elif name == "truncated":
                self.send(200, picture(size=(200, 200))[:-300])
            elif name == "cutoff":
                self.send(200, good[:50], length=len(good))
                self.close_connection = True
            elif name == "huge":
                self.send(200, huge_png())
            elif name == "big":
                self.send(200, b"\xff\xd8" + b"x" * 3_000_000)
            elif name == "endless":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for _ in range(10_000):
                    self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            elif name == "busy" and times == 1:
                self.send(429, Retry_After="1")
            elif name == "flaky" and times <= 2:
                self.send(500)
            elif name == "healing" and not server_state.healed:
                self.send(503)
            elif name == "never":
                self.send(500)
            elif name == "gone":
                self.send(404)
            elif name == "redirect":
                self.send(302, Location="/good1")
            elif name == "loop":
                self.send(301, Location="/loop")
            elif name == "to_file":
                self.send(302, Location="file:///etc/passwd")
            elif name == "to_private":
                self.send(302, Location=f"http://127.0.0.1:{self.server.server_address[1]}/secret")
            elif name == "gzip":
                self.send(200, b"\x1f\x8b", Content_Encoding="gzip")
            else:
                self.send(200, good)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server_state = HostileServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server_state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
