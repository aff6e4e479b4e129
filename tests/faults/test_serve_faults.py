"""Clients that are slow, vanish, or come in crowds; disks and models that fail; bytes that mean nothing."""

import concurrent.futures
import contextlib
import errno
import io
import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from psla_fast.serve import Limits, tagging
from psla_fast.serve.server import PatientProtocol
from psla_fast.tagger import Tagger
from tests.web import Running, make_sound, running, write_model

SOUND = make_sound()
LIMITS = Limits(max_mb=1, max_seconds=20, top=3, queue=64, patience_seconds=0.5)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    path = write_model(tmp_path_factory.mktemp("model") / "net.pt")
    return Tagger.from_checkpoint(path, "cpu", "fp32")


@pytest.fixture(scope="module")
def server(tagger: Tagger) -> Iterator[Running]:
    with running(tagger, LIMITS) as started:
        yield started


def read_answer(client: socket.socket) -> str:
    answer = b""
    while not answer.endswith(b"}"):
        piece = client.recv(1 << 16)
        assert piece, answer
        answer += piece
    return answer.decode()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_that_is_too_large_is_refused_before_it_comes(server: Running):
    head = (
        f"POST /api/tag HTTP/1.1\r\nHost: {server.url[7:]}\r\nContent-Type: audio/wav\r\n"
        "Content-Length: 999999999999\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 10) as client:
        client.sendall(head.encode())
        answer = read_answer(client)
    assert answer.startswith("HTTP/1.1 413")
    assert "larger than 1 MB" in answer
    assert "larger than 1 MB" in server.refusal(SOUND + bytes(2 << 20), 413)


def test_an_endless_body_is_stopped_at_the_limit(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PatientProtocol, "drop_seconds", 0.2)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 200 << 20:
            sent += 1 << 16
            yield bytes(1 << 16)
            time.sleep(0.002)

    headers = {"content-type": "audio/wav"}
    with contextlib.suppress(httpx.TransportError):  # or cut off while it sends on
        response = httpx.post(f"{server.url}/api/tag", content=endless(), headers=headers, timeout=20)
        assert response.status_code == 413
    assert sent < 100 << 20
    server.settle()


def test_a_bomb_of_hours_is_decoded_to_the_limit_only(server: Running, monkeypatch: pytest.MonkeyPatch):
    hours = np.zeros(8000 * 3600 * 2, np.int16)
    hours[::50_000] = 99
    buffer = io.BytesIO()
    soundfile.write(buffer, hours, 8000, format="FLAC")
    assert len(buffer.getvalue()) < 1 << 20
    decoded, genuine = [], tagging.stream_waveform

    def counted(*arguments: Any) -> Iterator[Any]:
        for block in genuine(*arguments):
            decoded.append(len(block))
            yield block

    monkeypatch.setattr(tagging, "stream_waveform", counted)
    assert "longer than 20 seconds" in server.refusal(buffer.getvalue(), 413)
    assert sum(decoded) < 16000 * 200


def test_whatever_bytes_come_the_answer_is_json_and_nothing_stays_open(server: Running):
    rng = np.random.default_rng(7)
    seeds = [make_sound(0.4, 16000, ending) for ending in ("wav", "flac", "ogg", "mp3", "aiff", "caf", "au")]
    server.settle()
    before, seen = open_files(), set()
    with httpx.Client(timeout=30) as client:
        for number in range(140):
            content = bytearray(seeds[number % len(seeds)])
            for _ in range(int(rng.integers(1, 30))):
                span = len(content) if rng.random() < 0.3 else min(len(content), 120)
                content[int(rng.integers(span))] = int(rng.integers(256))
            if rng.random() < 0.3:
                del content[int(rng.integers(1, len(content))) :]
            response = client.post(f"{server.url}/api/tag", files={"file": ("x", bytes(content))})
            seen.add(response.status_code)
            assert isinstance(response.json(), dict)
            assert response.status_code in (200, 413, 422), response.text
    assert {200, 422} <= seen
    server.settle()
    assert open_files() <= before + 4
    assert server.ask(SOUND).status_code == 200


def test_one_more_than_the_queue_holds_is_told_to_come_back(tagger: Tagger, monkeypatch: pytest.MonkeyPatch):
    gate, genuine = threading.Event(), Tagger.timeline

    def gated(self: Tagger, *arguments: Any) -> Any:
        gate.wait(20)
        return genuine(self, *arguments)

    with running(tagger, replace(LIMITS, parallel=2, queue=3)) as server:
        monkeypatch.setattr(Tagger, "timeline", gated)
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(server.ask, SOUND) for _ in range(5)]
            deadline = time.monotonic() + 10
            while httpx.get(f"{server.url}/health").json() != {"status": "ok", "running": 2, "waiting": 3}:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            late = server.ask(SOUND)
            gate.set()
            assert [future.result().status_code for future in asked] == [200] * 5
        assert late.status_code == 503
        assert late.headers["retry-after"] == "5"
        assert "busy" in late.json()["error"]
        assert server.ask(SOUND).status_code == 200


def start_upload(server: Running, body: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 10)
    head = (
        f"POST /api/tag HTTP/1.1\r\nHost: {server.url[7:]}\r\nContent-Type: audio/wav\r\n"
        f"Content-Length: 500000\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


def test_clients_that_go_away_leave_nothing_behind(server: Running):
    server.settle()
    before, named = open_files(), set(os.listdir(tempfile.gettempdir()))
    clients = [start_upload(server, SOUND) for _ in range(10)]
    time.sleep(0.1)
    assert httpx.get(f"{server.url}/health").json()["waiting"] == 10
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - named if name.startswith("tmp")}, (
        "an upload has a name"
    )
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    server.settle()
    assert open_files() <= before + 2
    assert server.ask(SOUND).status_code == 200


def test_an_upload_that_stalls_is_given_up(server: Running):
    with start_upload(server, SOUND) as client:
        answer = read_answer(client)
    assert answer.startswith("HTTP/1.1 408")
    assert "stopped on its way" in answer
    server.settle()


def test_an_upload_that_trickles_is_given_up(tagger: Tagger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psla_fast.serve.uploads.GRACE_SECONDS", 0.3)
    with running(tagger, LIMITS) as server, start_upload(server) as client:
        deadline = time.monotonic() + 10
        while not select.select([client], [], [], 0.05)[0]:
            assert time.monotonic() < deadline
            client.sendall(b"x")
        answer = read_answer(client)
    assert answer.startswith("HTTP/1.1 408")
    assert "too slow" in answer


def test_a_server_that_ends_doesnt_wait_for_a_long_recording(tagger: Tagger, monkeypatch: pytest.MonkeyPatch):
    gate, genuine = threading.Event(), Tagger.timeline
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("psla_fast.serve.server.END_SECONDS", 1)
        with running(tagger, LIMITS) as server:
            monkeypatch.setattr(Tagger, "timeline", lambda *rest: gate.wait(20) and genuine(*rest))
            asked = pool.submit(server.ask, SOUND)
            while not httpx.get(f"{server.url}/health").json()["running"]:
                time.sleep(0.02)
        assert not gate.is_set()
        response = asked.result()
        gate.set()
    assert response.status_code == 503
    assert "ending" in response.json()["error"]


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_connection_whose_request_never_comes_is_ended(
    tagger: Tagger, monkeypatch: pytest.MonkeyPatch, first: bytes
):
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.3)
    with running(tagger, LIMITS) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(first)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        with httpx.Client() as patient:  # while a connection that asks again is kept
            for _ in range(3):
                assert patient.get(f"{server.url}/health").status_code == 200
                time.sleep(0.2)


def test_a_disk_without_room_is_told_and_survived(server: Running, monkeypatch: pytest.MonkeyPatch):
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", Full)
        assert "no room" in server.refusal(SOUND, 503)
    assert server.ask(SOUND).status_code == 200


@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
def test_a_failing_model_is_told_in_a_sentence_and_survived(
    server: Running, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
):
    def fail(*_: Any) -> None:
        raise kind("secret shapes")

    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "timeline", fail)
        sentence = server.refusal(SOUND, 500)
    assert "log says why" in sentence
    assert "secret" not in sentence
    assert server.ask(SOUND).status_code == 200


def test_scores_that_are_no_numbers_are_told(server: Running, monkeypatch: pytest.MonkeyPatch):
    genuine = Tagger.timeline

    def spoil(self: Tagger, *arguments: Any) -> Any:
        timeline = genuine(self, *arguments)
        return replace(timeline, tagging=replace(timeline.tagging, scores=np.full(4, np.nan, np.float32)))

    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "timeline", spoil)
        assert "no usable scores" in server.refusal(SOUND, 500)
