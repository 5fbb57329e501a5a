"""The server over real HTTP: who is answered, what is refused in one line and changes nothing, how it ends."""

import http.client
import json
import re
import socket
import threading

import pytest

from rlawm_jax.interactive.server import LARGEST, Server
from rlawm_jax.interactive.session import Session
from rlawm_jax.reports.html import page
from tests.interactive.tiny import serving, tiny_session


@pytest.fixture(scope="module")
def server():
    with serving(tiny_session(), page("imagine.html", run="<run>", step=7)) as server:
        yield server


def ask(server, method, path, body=None, **headers):
    """(status, headers, text) of one request; header names have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=body, headers=given)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def refused(server, *request, **headers):
    """Status and error of a request that must change nothing."""
    shown, number = server.session.shown, server.session.number
    status, _, text = ask(server, *request, **headers)
    error = json.loads(text)
    assert list(error) == ["error"] and len(error["error"].splitlines()) == 1, text
    assert server.session.shown is shown and server.session.number == number
    return status, error["error"]


def test_it_listens_on_the_loopback_address_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}"


def test_the_page_is_self_contained_and_forbids_itself_the_network(server):
    status, headers, text = ask(server, "GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?:|//\w|src=\"[^\"]|@import|url\(", text)
    assert "&lt;run&gt;, step 7" in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy


def test_steps_reset_and_new_starts_answer_with_the_new_state(server):
    before = json.loads(ask(server, "POST", "/reset", "")[2])
    assert json.loads(ask(server, "GET", "/state")[2]) == before
    after = json.loads(ask(server, "POST", "/step", '{"action": [0.5, -1]}')[2])
    assert (before["steps"], after["steps"]) == (0, 1)
    for picture in ("imagined", "truth"):
        assert after[picture].startswith("data:image/png;base64,") and after[picture] != before[picture]
    again = json.loads(ask(server, "POST", "/reset", "")[2])
    assert again == before
    another = json.loads(ask(server, "POST", "/new", "")[2])
    assert another["episode"] == before["episode"] + 1 and another["recorded"] != before["recorded"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "192.168.0.7:8000", "localhost@evil", ""]
)
@pytest.mark.parametrize("request_line", [("GET", "/"), ("GET", "/state"), ("POST", "/new", "")])
def test_a_name_that_leads_here_from_elsewhere_is_refused(server, host, request_line):
    status, error = refused(server, *request_line, Host=host)
    assert status == 403 and error.startswith("Host: expected 127.0.0.1 or localhost, found")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1", "file://"]
)
def test_a_page_from_elsewhere_cannot_drive_it(server, origin):
    status, error = refused(server, "POST", "/step", '{"action": [0, 0]}', Origin=origin)
    assert status == 403 and error.startswith("Origin: expected http://127.0.0.1:")


def test_our_own_page_is_answered_under_every_name_of_this_machine(server):
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        host = f"{name}:{server.server_port}"
        assert ask(server, "POST", "/reset", "", Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", "body: expected JSON"),
        ("{", "body: expected JSON"),
        (b"\xff\xfe", "body: expected JSON"),
        ("[" * LARGEST, "body: expected JSON"),
        ("[0, 0]", 'body: expected {"action": [...]}'),
        ('{"action": [0, 0], "steps": 9}', 'body: expected {"action": [...]}'),
        ('{"action": [NaN, 0]}', "action: expected number 1 within -1 and 1, found nan"),
        ('{"action": [0, -Infinity]}', "action: expected number 2 within -1 and 1, found -inf"),
        ('{"action": [0, 1e999]}', "action: expected number 2 within -1 and 1, found inf"),
        ('{"action": [0, 1.5]}', "action: expected number 2 within -1 and 1, found 1.5"),
        ('{"action": [0]}', "action: expected a list of 2 numbers"),
        ('{"action": [0, 0, 0]}', "action: expected a list of 2 numbers"),
        ('{"action": "00"}', "action: expected a list of 2 numbers"),
        ('{"action": [true, "a\\nb"]}', "action: expected a list of 2 numbers"),
    ],
)
def test_a_step_that_is_none_is_refused(server, body, error):
    status, found = refused(server, "POST", "/step", body)
    assert status == 400 and found.startswith(error)


def test_other_paths_and_methods_are_refused(server):
    assert refused(server, "GET", "/../etc/passwd")[0] == 404
    assert refused(server, "GET", "/step")[0] == 405
    assert refused(server, "POST", "/", "")[0] == 405
    assert refused(server, "DELETE", "/state")[0] == 405


def test_a_huge_body_is_refused_whether_it_comes_or_not(server):
    assert refused(server, "POST", "/step", b" " * (LARGEST + 1)) == (
        413,
        f"body: expected at most {LARGEST} bytes, found {LARGEST + 1}",
    )
    assert refused(server, "POST", "/step", b" " * 10_000_000)[0] == 413
    assert refused(server, "POST", "/step", Content_Length="9" * 17)[0] == 413
    for length in ("9" * 40, "-1", "many"):
        assert refused(server, "POST", "/step", Content_Length=length)[0] == 411


def test_a_client_that_sends_nothing_keeps_nobody_waiting(server):
    with socket.create_connection(("127.0.0.1", server.server_port)) as slow:
        slow.sendall(f"POST /step HTTP/1.1\r\nHost: {server.url[7:]}\r\nContent-Length: 20\r\n\r\n".encode())
        assert ask(server, "POST", "/reset", "")[0] == 200


def test_what_goes_wrong_in_the_model_is_one_line_and_the_next_request_is_answered(server, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", lambda self, action: 1 / 0)
        status, error = refused(server, "POST", "/step", '{"action": [0, 0]}')
    assert (status, error) == (500, "ZeroDivisionError: division by zero")
    assert "Traceback" in capfd.readouterr().err  # for whoever started the program
    assert ask(server, "POST", "/step", '{"action": [0, 0]}')[0] == 200


def test_a_taken_port_is_one_line(server):
    with pytest.raises(ValueError, match=r"^--port: expected a free port, found \d+ \(.* in use\); .*, or 0 for any$"):
        Server(server.server_port)


def test_ctrl_c_ends_it_and_no_step_begins_any_more(server, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    other = Server(0)
    other.run(server.session, "")
    assert other.lock.locked() and other.socket.fileno() == -1


def test_steps_from_several_clients_come_one_after_the_other(server):
    ask(server, "POST", "/reset", "")
    clients = [threading.Thread(target=ask, args=(server, "POST", "/step", '{"action": [0.1, 0.1]}')) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert json.loads(ask(server, "GET", "/state")[2])["steps"] == 8
