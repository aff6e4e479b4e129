import base64
import io
import json
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from psla_fast.cli import main
from psla_fast.models import ModelConfig
from psla_fast.serve import Limits, bind, tagging
from psla_fast.serve.app import PAGE
from psla_fast.serve.guard import Hosts, is_loopback
from psla_fast.serve.server import find_url
from psla_fast.serve.tagging import find_av_suffix
from psla_fast.serve.uploads import clean_name
from psla_fast.tagger import Tagger
from tests import tiny  # noqa: F401 - registers its network
from tests.web import HOSTILE, Running, make_sound, running, write_model

SOUND = make_sound()
LIMITS = Limits(max_mb=1, max_seconds=20, top=3, queue=64, patience_seconds=0.5)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    path = write_model(tmp_path_factory.mktemp("model") / "net.pt")
    return Tagger.from_checkpoint(path, "cpu", "fp32", thresholds=np.array([0.0, 2.0, 0.0, 2.0]))


@pytest.fixture(scope="module")
def server(tagger: Tagger) -> Iterator[Running]:
    with running(tagger, LIMITS) as started:
        yield started


@pytest.mark.parametrize(("ending", "options"), [("wav", {}), ("flac", {}), ("ogg", {}), ("mp3", {})])
def test_an_answer_has_the_taggers_own_scores(
    server: Running, tmp_path: Path, ending: str, options: dict[str, Any]
):
    content = make_sound(3.3, 44100, ending, **options)
    path = tmp_path / f"sound.{ending}"
    path.write_bytes(content)
    wanted = server.tagger.timeline(path)
    response = server.ask(content, "Ünï.wav")
    answer = response.json()
    assert response.status_code == 200
    assert answer["name"] == "Ünï.wav"
    assert answer["seconds"] == pytest.approx(wanted.tagging.seconds, abs=1e-3)
    top = wanted.tagging.top(3)
    assert [entry["mid"] for entry in answer["top"]] == [label.mid for label in top]
    assert [entry["score"] for entry in answer["top"]] == pytest.approx(
        [label.score for label in top], abs=1e-5
    )
    assert {label["mid"] for label in answer["labels"]} == {"/m/a", "/m/c"}
    timeline = answer["timeline"]
    assert timeline["classes"] == [label.name for label in top]
    assert timeline["step_seconds"] == wanted.step_seconds
    activity = wanted.activity[[label.index for label in top]]
    np.testing.assert_allclose(timeline["activity"], activity, atol=6e-4)
    assert "picture" not in answer


def test_raw_bytes_are_taken_like_a_form(server: Running):
    form = server.ask(SOUND).json()
    for kind in ("audio/wav", "application/octet-stream", "audio/x-wav; rate=1"):
        raw = httpx.post(f"{server.url}/api/tag", content=SOUND, headers={"content-type": kind}).json()
        assert raw["top"] == form["top"]


def test_a_long_sounds_timeline_keeps_its_peaks_in_a_thousand_steps(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    whole = server.ask(make_sound(20)).json()["timeline"]
    monkeypatch.setattr(tagging, "MOST_STEPS", 25)
    coarse = server.ask(make_sound(20)).json()["timeline"]
    factor = round(coarse["step_seconds"] / whole["step_seconds"])
    assert factor > 1
    assert len(coarse["activity"][0]) <= 25
    for long, short in zip(whole["activity"], coarse["activity"], strict=True):
        assert short == [max(long[start : start + factor]) for start in range(0, len(long), factor)]


def test_a_picture_comes_when_it_is_asked_for(server: Running):
    picture = server.ask(make_sound(2), query="?picture=1").json()["picture"]
    pixels = np.frombuffer(base64.b64decode(picture["pixels"]), np.uint8)
    assert pixels.size == 198 * picture["num_mels"]
    assert picture["step_seconds"] == 0.01
    assert (pixels.max(), picture["low_hz"], picture["high_hz"]) == (255, 20.0, 8000.0)
    assert pixels.std() > 20


def test_a_model_without_activity_answers_without_a_timeline(tmp_path: Path):
    path = write_model(tmp_path / "tiny.pt", model=ModelConfig("tiny"))
    with running(Tagger.from_checkpoint(path, "cpu", "fp32"), LIMITS) as started:
        answer = started.ask(SOUND, query="?picture=1").json()
        assert httpx.get(f"{started.url}/api/about").json()["has_timeline"] is False
    assert set(answer) == {"name", "seconds", "tagged_in_seconds", "top"}
    assert len(answer["top"]) == 3


def test_the_server_tells_of_itself(server: Running):
    about = httpx.get(f"{server.url}/api/about").json()
    assert (about["num_classes"], about["max_mb"], about["max_seconds"]) == (4, 1, 20)
    classes = httpx.get(f"{server.url}/api/classes").json()
    assert [entry["name"] for entry in classes] == list(HOSTILE.names)
    for path in ("/docs", "/openapi.json", "/style.css/x", "/page/../../etc/passwd", "/%00"):
        response = httpx.get(server.url + path)
        assert response.status_code == 404
        assert response.json()["error"]
    assert httpx.get(f"{server.url}/api/tag").status_code == 405
    assert httpx.head(server.url).status_code == 200


def wav(samples: np.ndarray[Any, Any], rate: int = 16000, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def wav_of_rate(rate: int) -> bytes:
    content = bytearray(SOUND)
    content[24:28] = struct.pack("<I", rate)
    return bytes(content)


BAD = {
    "nothing": (b"", "empty"),
    "text": (b"Lorem ipsum " * 999, "can't be read as audio"),
    "random": (np.random.default_rng(0).bytes(50_000), "can't be read as audio"),
    "a header alone": (SOUND[:44], "cut short"),
    "cut short": (SOUND[: len(SOUND) // 2], "cut short"),
    "cut FLAC": (make_sound(ending="flac")[:9000], "can't be read"),
    "no samples": (wav(np.zeros(0)), "no samples"),
    "one sample": (wav(np.ones(1)), "every sample is the same"),
    "silence": (wav(np.zeros(16000)), "silent"),
    "constant": (wav(np.full(16000, 0.3)), "every sample is the same"),
    "NaN": (wav(np.full(16000, np.nan)), "no numbers"),
    "infinite": (wav(np.array([0.0, np.inf, 1.0])), "no numbers"),
    "no rate": (wav_of_rate(0), "can't be read"),
    "absurd rate": (wav_of_rate(2**31), "can't be read"),
    "an MP4 that is none": (b"\0\0\0\x20ftypM4A " + bytes(999), "can't be read"),
    "a WebM that is none": (b"\x1a\x45\xdf\xa3" + bytes(999), "can't be read"),
    "an MP3 that is none": (b"ID3" + bytes(999), "can't be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recording_is_refused_in_a_sentence(server: Running, case: str):
    content, words = BAD[case]
    sentence = server.refusal(content, 422)
    assert words in sentence
    assert sentence.endswith(".")
    assert not re.search(r"/proc|/tmp|Traceback|Error", sentence), sentence


def test_odd_but_sound_recordings_are_tagged(server: Running):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, 65))
    for content in (
        wav(noise),
        wav(noise[:, 0], 768_000),
        wav(noise[:2, 0]),
        wav(noise[:, 0] * 1e6),
        wav(noise, 8000, "PCM_U8"),
    ):
        assert server.ask(content).status_code == 200


def form_body(name: str, field: str = "file", boundary: str = "xyz", times: int = 1) -> bytes:
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return (part.encode() + SOUND + b"\r\n") * times + f"--{boundary}--\r\n".encode()


FORM = {"content-type": "multipart/form-data; boundary=xyz"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (form_body("a.wav", field="sound"), FORM, 400, "field 'sound'"),
        (form_body("a.wav", times=2), FORM, 400, "more than one part"),
        (form_body("a.wav")[:-9], FORM, 400, "cut short"),
        (
            b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--xyz--',
            FORM,
            400,
            "not the file",
        ),
        (b"--xyz--\r\n", FORM, 400, "no file"),
        (b"", FORM, 400, "no file"),
        (b"\0\1\2 garbage", FORM, 400, "can't be read"),
        (b"--xyz\r\n" + b"a" * 30_000 + b"\r\n\r\n", FORM, 400, "can't be read"),
        (SOUND, {"content-type": "multipart/form-data"}, 400, "no boundary"),
        (SOUND, {"content-type": "multipart/form-data; boundary=" + "x" * 400}, 400, "boundary"),
        (SOUND, {"content-type": "text/html"}, 415, "'text/html'"),
        (SOUND, {"content-type": "application/x-www-form-urlencoded"}, 415, "audio/*"),
    ],
)
def test_a_wrong_form_is_refused_in_a_sentence(
    server: Running, body: bytes, headers: dict[str, str], status: int, words: str
):
    response = httpx.post(f"{server.url}/api/tag", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../../etc/passwd", "passwd"),
        ("C:\\\\windows\\\\cmd.wav", "cmd.wav"),
        ("a\x00b.wav", "ab.wav"),
        ("名前 😀.wav", "名前 😀.wav"),
        ("<img src=x onerror=alert(1)>.wav", "<img src=x onerror=alert(1)>.wav"),
        ("x" * 5000 + ".wav", None),
        ("…/", "recording"),
    ],
)
def test_a_files_name_is_only_shown(server: Running, name: str, shown: str | None):
    response = httpx.post(f"{server.url}/api/tag", content=form_body(name), headers=FORM)
    if shown is None:  # a header of more than 4 kB
        assert response.status_code == 400
    else:
        assert response.json()["name"] == shown


def test_a_name_is_cut_and_cleaned():
    assert clean_name("x" * 900) == "x" * 200
    assert clean_name("a\u202eb\nc\x7f") == "abc"
    assert clean_name("") == clean_name("/") == "recording"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:80"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "[::1"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_other_sites_are_refused(server: Running, headers: dict[str, str]):
    response = server.ask(SOUND, headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]
    if "host" in headers:
        assert httpx.get(server.url, headers=headers).status_code == 403


def test_the_servers_own_page_may_ask_and_no_other_may_read(server: Running):
    port = server.url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        answer = server.ask(SOUND, headers=headers)
        assert answer.status_code == 200
    for response in (answer, httpx.get(server.url), httpx.get(f"{server.url}/nothing")):
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "microphone=(self)" in response.headers["permissions-policy"]
    preflight = httpx.options(f"{server.url}/api/tag", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 403


def test_names_are_allowed_by_where_a_server_listens():
    local, everywhere = Hosts("127.0.0.1", ["Proxy.example"]), Hosts("0.0.0.0")
    assert local.allows("LOCALHOST:8000")
    assert local.allows("proxy.example")
    assert local.allows("[::1]:8000")
    assert not local.allows("192.168.1.5:8000")
    assert not local.allows("")
    assert everywhere.allows("192.168.1.5:8000")
    assert everywhere.allows(socket.gethostname())
    assert not everywhere.allows("evil.example")
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "x")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert find_url(taken, "0.0.0.0") == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is in use. Give another --port"):
            bind("127.0.0.1", port)
        with pytest.raises(SystemExit, match="2"):
            main(["serve", "net.pt", "--host", "localhost", "--port", str(port)])
        assert capsys.readouterr().err == (
            f"psla-fast serve: error: port {port} of localhost is in use. "
            "Give another --port, or 0 for any free one.\n"
        )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bind("127.0.0.1", 70_000), "--port is 70000"),
        (lambda: bind("203.0.113.7", 0), "can't be taken"),
        (lambda: bind("no such host", 0), "is no address"),
        (lambda: Limits(max_mb=0), "--max-mb is 0; give more than 0"),
        (lambda: Limits(max_seconds=float("nan")), "--max-seconds is nan"),
        (lambda: Limits(top=0), "--top is 0; give 1 or more"),
        (lambda: Limits(parallel=0), "--parallel is 0"),
        (lambda: Limits(queue=-1), "--queue is -1; give 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(call: Callable[[], object], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for name in sys.modules if name.startswith("psla_fast.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("psla_fast.serve", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "net.pt"])
    assert "pip install 'psla-fast[serve]'" in capsys.readouterr().err


def test_the_page_needs_nothing_but_its_own_files(server: Running):
    for name, kind in PAGE.items():
        response = httpx.get(f"{server.url}/{'' if name == 'index.html' else name}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        text = response.text.replace("http://www.w3.org/2000/svg", "").replace("http://HOST/api/tag", "")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
        assert not re.search(r"<script(?! type=\"module\" src=\"/app.js\")|\son\w+=|style=\"", text), name
    folder = resources.files("psla_fast.serve") / "page"
    assert {entry.name for entry in folder.iterdir()} == set(PAGE)


def test_what_pyav_decodes_is_known_by_its_first_bytes():
    assert find_av_suffix(b"\0\0\0\x20ftypM4A ") == ".m4a"
    assert find_av_suffix(b"\x1a\x45\xdf\xa3") == ".webm"
    assert find_av_suffix(b"\xff\xf1\x50") == ".aac"
    for ending in ("wav", "flac", "ogg", "mp3"):
        assert find_av_suffix(make_sound(ending=ending)) == ""
    assert find_av_suffix(b"") == ""


@pytest.mark.parametrize(("form", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("adts", "aac")])
def test_aac_and_webm_are_tagged(server: Running, form: str, codec: str):
    av = pytest.importorskip("av", reason="needs PyAV")
    buffer = io.BytesIO()
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 48_000)).astype(np.float32)
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    answer = server.ask(buffer.getvalue(), "speech.bin").json()
    assert answer["seconds"] == pytest.approx(1.0, abs=0.1), json.dumps(answer)
