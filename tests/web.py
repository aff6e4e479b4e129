"""A web server around a small model, in a thread or as the command, for the tests of psla_fast.serve."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
import torch

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.classes import Classes
from psla_fast.demo import make_waveform
from psla_fast.fbank import FbankConfig, compute_fbank
from psla_fast.models import ModelConfig, build_model
from psla_fast.serve import Limits, bind, build_app
from psla_fast.serve.guard import Hosts
from psla_fast.serve.server import build_server
from psla_fast.tagger import Tagger

TWO_MINUTES = 120.0
HOSTILE = Classes(
    ("/m/a", "/m/b", "/m/c", "/m/d"),
    ("Dog_bark", "<img src=x onerror=document.title='hit'>", "=1+1", 'Music, "live"'),
)


def write_model(path: Path, classes: Classes = HOSTILE, model: ModelConfig | None = None) -> Path:
    """A checkpoint of an untrained network of 64 frames, whose scores differ from sound to sound."""
    model = model or ModelConfig("efficientnet_b0", num_heads=1)
    torch.manual_seed(0)
    network = build_model(model, len(classes), 128).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    sound, _ = soundfile.read(io.BytesIO(make_sound(5.2)), dtype="float32")
    heard = compute_fbank(torch.from_numpy(sound), FbankConfig())[:512]
    network((heard.view(8, 64, 128) + 4.6) / 4.6)
    card = Card(model, classes, InputSpec(64, 128, 0.0, -4.6, 4.6), FbankConfig())
    save_checkpoint(path, card, network.state_dict(), epoch=1)
    return path


def make_sound(seconds: float = 1.0, rate: int = 16000, ending: str = "wav", **options: Any) -> bytes:
    """A recording of the synthetic demo's sounds, as a file's bytes."""
    sound = make_waveform(["Rising_chirp", "Fast_clicks"], np.random.default_rng(0))
    buffer = io.BytesIO()
    samples = np.resize(sound, round(seconds * rate))
    soundfile.write(buffer, samples, rate, format=ending, **options)
    return buffer.getvalue()


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    tagger: Tagger
    limits: Limits

    def ask(self, content: bytes, name: str = "sound.wav", query: str = "", **options: Any) -> httpx.Response:
        """Upload a file as a form does."""
        return httpx.post(
            f"{self.url}/api/tag{query}", files={"file": (name, content)}, timeout=TWO_MINUTES, **options
        )

    def refusal(self, content: bytes, status: int, name: str = "sound.wav") -> str:
        """Upload what is refused, and give the sentence."""
        response = self.ask(content, name)
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        error: str = response.json()["error"]
        return error

    def settle(self) -> None:
        """Wait until nothing is on its way; a stuck request fails."""
        deadline = time.monotonic() + 10
        idle = {"status": "ok", "running": 0, "waiting": 0}
        while (state := httpx.get(f"{self.url}/health").json()) != idle:
            assert time.monotonic() < deadline, state
            time.sleep(0.02)


@contextlib.contextmanager
def running(tagger: Tagger, limits: Limits) -> Iterator[Running]:
    """Serve a tagger on a free port."""
    bound = bind("127.0.0.1", 0)
    server = build_server(build_app(tagger, limits, Hosts("127.0.0.1")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", tagger, limits)
    finally:
        server.should_exit = True
        thread.join(TWO_MINUTES)
        bound.close()
        assert not thread.is_alive()


@dataclass
class Command:
    """`psla-fast serve` in a process of its own."""

    url: str
    process: subprocess.Popen[str]
    first_line: str

    def peak_mb(self) -> float:
        """The most memory that it held so far, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match
        return int(match[1]) / 1024

    def interrupt(self) -> int:
        """Press Ctrl-C, and give the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(TWO_MINUTES)


@contextlib.contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[Command]:
    """Run the command on a free port until it is ready."""
    words = [sys.executable, "-m", "psla_fast.cli", "serve", str(checkpoint), "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout
            line = next((text for text in process.stdout if " is ready: " in text), "")
            assert line, "the server didn't start"
            yield Command(line.split()[0], process, line)
        finally:
            process.kill()
