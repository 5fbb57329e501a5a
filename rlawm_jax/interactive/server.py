"""The page of a session, served to this machine alone: one page, its state as JSON, and three ways to change it.

    GET /        the page
    GET /state   what is shown: pictures as data URIs, where the rollout is, distances, seconds
    POST /step   {"action": [...]}: one row of raw actions; answers with the new state
    POST /reset  back to the start
    POST /new    another start

The server listens on the loopback address. It answers no request whose Host or Origin is another machine's, so that a
page from elsewhere, open in a browser here, can neither drive it nor read it. A request that cannot be answered changes
nothing and gets {"error": one line}.
"""

import contextlib
import errno
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlawm_jax.interactive.controls import ActionError
from rlawm_jax.interactive.session import Session
from rlawm_jax.reports.plots import png

ADDRESS = "127.0.0.1"
HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
LARGEST = 4096  # bytes of a request's body
IGNORED = 2**26  # bytes of a refused body that are read, so that its sender gets to read the answer
PATIENCE = 10.0  # seconds for a client to send what it announced
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RequestError(Exception):
    """A request that is answered with an error: its status, and one line."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens on `port` of the loopback address, 0 for any free one, and drives a session one request at a time.

    ValueError in one line if the port is taken or not ours to take.
    """

    daemon_threads = True
    session: Session
    page: str

    def __init__(self, port: int) -> None:
        self.lock = threading.Lock()
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ValueError(
                f"--port: expected a free port, found {port} ({error.strerror}); choose another one, or 0 for any"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}"

    def run(self, session: Session, page: str) -> None:
        """Answer until Ctrl-C; a step under way is finished, later ones are not begun."""
        self.session, self.page = session, page
        with contextlib.suppress(KeyboardInterrupt):
            self.serve_forever()
        self.server_close()
        self.lock.acquire()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    timeout = PATIENCE

    @property
    def ours(self) -> Server:
        """The server that this request came to."""
        assert isinstance(self.server, Server)
        return self.server

    def do_GET(self) -> None:
        """The page or the state."""
        self._answer({"/": lambda session: self.ours.page, "/state": state})

    def do_POST(self) -> None:
        """A change of the session."""
        self._answer({"/step": self._step, "/reset": _then(Session.reset), "/new": _then(Session.new_start)})

    def _step(self, session: Session) -> dict[str, Any]:
        try:
            given = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, "body: expected JSON, found something else") from error
        if not isinstance(given, dict) or set(given) != {"action"}:
            raise RequestError(HTTPStatus.BAD_REQUEST, 'body: expected {"action": [...]}, found other JSON')
        try:
            session.step(given["action"])
        except ActionError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error
        return state(session)

    def _answer(self, paths: dict[str, Callable[[Session], Any]]) -> None:
        try:
            self._check_sender()
            if self.path not in paths:
                elsewhere = self.path in ("/", "/state", "/step", "/reset", "/new")
                status = HTTPStatus.METHOD_NOT_ALLOWED if elsewhere else HTTPStatus.NOT_FOUND
                raise RequestError(status, f"{self.command} {self.path[:80]}: expected one of {', '.join(paths)}")
            # read before the lock is taken: a slow client keeps nobody waiting
            self.body = self._read_body() if self.command == "POST" else b""
            with self.ours.lock:
                answer = paths[self.path](self.ours.session)
        except RequestError as error:
            self.send_error(error.status, str(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            traceback.print_exc()
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}"[:200])
        else:
            self._send(HTTPStatus.OK, answer)

    def _check_sender(self) -> None:
        host = self.headers.get("Host", "").lower()
        if not HERE.fullmatch(host):
            raise RequestError(HTTPStatus.FORBIDDEN, f"Host: expected {ADDRESS} or localhost, found {host[:80]!r}")
        origin = self.headers.get("Origin", f"http://{host}").lower()
        if origin != f"http://{host}":
            raise RequestError(HTTPStatus.FORBIDDEN, f"Origin: expected http://{host}, found {origin[:80]!r}")

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "Content-Length: expected the body's bytes, found none")
        if int(length) > LARGEST:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: expected at most {LARGEST} bytes, found {length}"
            )
        return self.rfile.read(int(length))

    def _send(self, status: HTTPStatus, content: str | dict[str, Any]) -> None:
        kind = "text/html" if isinstance(content, str) else "application/json"
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in HEADERS.items() | {("Content-Type", f"{kind}; charset=utf-8")}:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One line of JSON; closing a connection with bytes unread would take the answer from its sender."""
        if code == HTTPStatus.NOT_IMPLEMENTED:  # what the standard library says to other methods
            code = HTTPStatus.METHOD_NOT_ALLOWED
        line = " ".join((message or HTTPStatus(code).phrase).split())
        self._send(HTTPStatus(code), {"error": line})
        self.connection.settimeout(1.0)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            left = IGNORED
            while left > 0 and (read := self.connection.recv(2**16)):
                left -= len(read)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line per key press would hide what matters."""


def state(session: Session) -> dict[str, Any]:
    """The session's state with its pictures."""
    shown = session.shown
    return session.state() | {
        "imagined": png(shown.imagined),
        "truth": None if shown.truth is None else png(shown.truth),
        "recorded": png(session.start.image),
    }


def _then(change: Callable[[Session], None]) -> Callable[[Session], dict[str, Any]]:
    """A change of the session, followed by its new state."""

    def changed(session: Session) -> dict[str, Any]:
        change(session)
        return state(session)

    return changed
