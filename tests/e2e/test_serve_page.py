"""The web page in headless Chromium, and the command around it."""

import concurrent.futures
import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
import soundfile

from tests.web import HOSTILE, Command, make_sound, serving, write_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FileChooser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
HIT = "<img src=x onerror=document.title='hit'>.wav"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "net.pt")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Command]:
    """The command, which has to end well when all tests are through."""
    with serving(checkpoint, "--max-mb", "8", "--max-seconds", "30") as started:
        assert "efficientnet_b0, 4 classes; recordings up to 8 MB and 30 s" in started.first_line
        yield started
        assert started.interrupt() == 0
        assert started.process.stdout
        assert started.process.stdout.read().strip() == "stopped"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    spoken.write_bytes(make_sound(5, 48_000))
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags += [f"--use-file-for-fake-audio-capture={spoken}", "--autoplay-policy=no-user-gesture-required"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture
def page(browser: "Browser", server: Command) -> "Iterator[Page]":
    """The page, which must stay without errors and ask nothing of other hosts."""
    said: list[str] = []
    context = browser.new_context(viewport={"width": 1100, "height": 900}, permissions=["microphone"])
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("console", lambda entry: said.append(entry.text) if "status of 4" not in entry.text else None)
    opened.on("request", lambda asked: said.append(asked.url) if not is_own(asked.url, server) else None)
    opened.goto(server.url)
    opened.wait_for_selector("#hint:not(:empty)")
    yield opened
    context.close()
    assert said == []


def is_own(url: str, server: Command) -> bool:
    return url.startswith((f"{server.url}/", f"blob:{server.url}/", "data:"))


def upload(page: "Page", content: bytes, name: str = "chirp.wav", kind: str = "audio/wav") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})
    wait_for_answer(page, name)


def wait_for_answer(page: "Page", name: str) -> None:
    page.wait_for_function("n => document.getElementById('name').textContent === n", arg=name)
    page.wait_for_selector("#busy", state="hidden")


def texts(page: "Page", selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def count_colours(page: "Page", canvas: str) -> int:
    found: int = page.evaluate(
        """id => { const c = document.getElementById(id), d = c.getContext("2d")
        .getImageData(0, 0, c.width, c.height).data, seen = new Set();
        for (let i = 0; i < d.length; i += 4) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
        return seen.size; }""",
        canvas,
    )
    return found


@needs_chromium
def test_an_uploaded_wav_shows_classes_and_a_timeline_that_plays(page: "Page", server: Command):
    content = make_sound(4)
    answer = httpx.post(f"{server.url}/api/tag", files={"file": ("x", content)}).json()
    upload(page, content)
    assert texts(page, "#classes .score") == [f"{entry['score']:.3f}" for entry in answer["top"]]
    assert texts(page, "#names div") == [entry["name"].replace("_", " ") for entry in answer["top"]]
    assert count_colours(page, "picture") > 30
    assert count_colours(page, "activity") > 4
    assert "4.00 s" in page.inner_text("#facts")
    box = page.locator("#activity").bounding_box()
    assert box
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 10)
    page.wait_for_function("() => document.getElementById('audio').currentTime > 2.2")
    page.evaluate("document.getElementById('audio').pause()")
    time = page.evaluate("document.getElementById('audio').currentTime")
    left = page.evaluate("parseFloat(document.getElementById('cursor').style.left)")
    assert left == pytest.approx(100 * time / 4, abs=2)
    page.mouse.move(box["x"] + 5, box["y"] + 10)
    assert f"{answer['timeline']['activity'][0][0]:.2f}" in page.inner_text("#tip")
    page.focus("#plots")
    page.keyboard.press("Home")
    page.wait_for_function("() => document.getElementById('audio').currentTime === 0")
    assert page.get_attribute("#plots", "aria-valuetext") == "0.0 of 4.0 seconds"


@needs_chromium
def test_a_dropped_flac_is_tagged(page: "Page"):
    transfer = page.evaluate_handle(
        """bytes => { const t = new DataTransfer();
        t.items.add(new File([new Uint8Array(bytes)], "dropped.flac", {type: "audio/flac"})); return t; }""",
        list(make_sound(1, ending="flac")),
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    assert "over" in (page.get_attribute("#drop", "class") or "")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    wait_for_answer(page, "dropped.flac")
    assert len(texts(page, "#classes .label")) == 4


@needs_chromium
def test_the_microphone_is_recorded_and_tagged(page: "Page"):
    page.click("#record")
    page.wait_for_function("() => document.getElementById('recorded').textContent === '0:02'")
    assert page.inner_text("#record") == "Stop"
    page.click("#record")
    page.wait_for_function("() => document.getElementById('name').textContent.startsWith('recording ')")
    page.wait_for_function("() => document.getElementById('audio').duration > 1.5")
    assert count_colours(page, "picture") > 30
    assert page.inner_text("#record") == "Record"


@needs_chromium
def test_what_only_the_browser_decodes_is_sent_as_wav(page: "Page", server: Command):
    page.evaluate(
        """async () => {
        const context = new AudioContext(), tone = context.createOscillator();
        const out = context.createMediaStreamDestination(), parts = [];
        tone.connect(out); tone.start();
        const recorder = new MediaRecorder(out.stream);
        recorder.ondataavailable = event => parts.push(event.data);
        recorder.start(); await new Promise(done => setTimeout(done, 700));
        await new Promise(done => { recorder.onstop = done; recorder.stop(); });
        const t = new DataTransfer(); t.items.add(new File(parts, "tone.webm", {type: "audio/webm"}));
        const input = document.getElementById("file"); input.files = t.files;
        input.dispatchEvent(new Event("change")); }"""
    )
    wait_for_answer(page, "tone.webm")
    assert 0.3 < float(page.inner_text("#facts").split()[0]) < 1.5


@needs_chromium
def test_names_are_text_and_never_markup(page: "Page"):
    upload(page, make_sound(), HIT)
    assert page.inner_text("#name") == HIT
    assert page.title() == f"{HIT} – psla_fast"
    assert page.locator("#result img").count() == 0
    assert HOSTILE.names[1] in texts(page, "#classes .label")


@needs_chromium
def test_a_bad_file_is_told_and_the_next_one_works(page: "Page"):
    page.set_input_files("#file", {"name": "a.wav", "mimeType": "audio/wav", "buffer": b"no sound at all"})
    page.wait_for_selector("#error:not(:empty)")
    assert "can't be read as audio" in page.inner_text("#error")
    assert page.get_attribute("#error", "role") == "alert"
    page.set_input_files("#file", {"name": "b.wav", "mimeType": "audio/wav", "buffer": bytes(9 << 20)})
    page.wait_for_function(
        "() => document.getElementById('error').textContent.includes('9.0 MB; 8 are allowed')"
    )
    page.set_input_files("#file", {"name": "c.wav", "mimeType": "audio/wav", "buffer": make_sound(40)})
    page.wait_for_function(
        "() => document.getElementById('error').textContent.includes('longer than 30 seconds')"
    )
    upload(page, make_sound(), "good.wav")
    assert page.inner_text("#error") == ""


@needs_chromium
def test_scores_are_downloaded_as_json_and_csv(page: "Page"):
    upload(page, make_sound(2), "chirp.wav")
    with page.expect_download() as waiting:
        page.click("#json")
    assert waiting.value.suggested_filename == "chirp.json"
    answer = json.loads(Path(waiting.value.path()).read_text())
    assert [entry["score"] for entry in answer["top"]] == sorted(
        (entry["score"] for entry in answer["top"]), reverse=True
    )
    with page.expect_download() as waiting:
        page.click("#csv")
    with open(waiting.value.path(), newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:4] == ["mid", "name", "score", "0.00 s"]
    names = [entry["name"] for entry in answer["top"]]
    assert [row[1] for row in rows] == [f"'{name}" if name[0] == "=" else name for name in names]
    assert [float(value) for value in rows[0][3:]] == answer["timeline"]["activity"][0]


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(page: "Page", scheme: str):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    upload(page, make_sound(), "a_very_long_name_without_a_space_" * 5 + ".wav")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(back.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")


@needs_chromium
def test_the_keyboard_reaches_everything(page: "Page"):
    reached = []
    upload(page, make_sound())
    page.evaluate("document.activeElement.blur()")
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert [
        name for name in ("choose", "record", "json", "csv", "audio", "plots") if name not in reached
    ] == []
    choosers: list[FileChooser] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.focus("#choose")
    page.wait_for_timeout(300)  # until Chromium hands choosers over
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    choosers[0].set_files({"name": "typed.wav", "mimeType": "audio/wav", "buffer": make_sound()})
    wait_for_answer(page, "typed.wav")


def test_fifty_uploads_at_a_time_take_bounded_memory(server: Command):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (72_000, 16))
    path = Path(f"/proc/{server.process.pid}/fd")
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 48_000, format="WAV", subtype="FLOAT")
    content = buffer.getvalue()
    assert len(content) > 4 << 20  # 220 MB in all

    def ask(_: int) -> tuple[int, str]:
        response = httpx.post(f"{server.url}/api/tag", files={"file": ("x.wav", content)}, timeout=300)
        return response.status_code, str(response.json().get("top"))

    alone = ask(0)  # takes what is allocated once
    assert alone[0] == 200
    before, files = server.peak_mb(), len(list(path.iterdir()))
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, range(50))) == [alone] * 50
    grown = server.peak_mb() - before
    assert grown < 90
    assert len(list(path.iterdir())) <= files + 5
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
