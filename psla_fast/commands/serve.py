"""The command `serve`: a checkpoint -> a web page that tags what is dropped on it or recorded."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision
from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class ServeCommand:
    """Serve a web page: drop a recording or make one, see its classes and their course over time.

    POST /api/tag answers the same as JSON: curl -F file=@dog.wav http://127.0.0.1:8000/api/tag
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A file of RUN/checkpoints, or a folder of the Hub."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, all of them: there is no password."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    allow_host: tuple[str, ...] = ()
    """Names, beside this machine's own, under which browsers may ask, for instance a proxy's."""
    thresholds: Path | None = None
    """Score file of psla-fast evaluate on a validation split: answers tell which classes are there."""
    max_mb: float = 50
    """Largest file. Uploads lie in TMPDIR while they wait: at most max-mb times (parallel + queue)."""
    max_seconds: float = 600
    """Longest recording; while it is scored it takes 0.13 MB of memory a second."""
    top: int = 10
    """Classes that are shown."""
    parallel: int = 2
    """Recordings decoded and scored at a time."""
    queue: int = 64
    """Recordings that may wait; more are answered with 503."""
    precision: Precision = "auto"
    """Autocast, as in training."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""
    open_browser: bool = False
    """Show the page in a browser at once."""


def serve(arguments: list[str]) -> None:
    """Load a checkpoint, warm it up, and serve it until Ctrl-C."""
    command = parse_flags(ServeCommand, arguments, "psla-fast serve")
    try:
        from psla_fast import serve as web
        from psla_fast.serve.guard import Hosts, is_loopback
        from psla_fast.serve.server import find_url
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "fastapi",
            "h11",
            "python_multipart",
            "starlette",
            "uvicorn",
        ):
            raise
        raise ValueError("psla-fast serve needs the extra serve: pip install 'psla-fast[serve]'.") from error
    from psla_fast.tagger import Tagger

    limits = web.Limits(command.max_mb, command.max_seconds, command.top, command.parallel, command.queue)
    with web.bind(command.host, command.port) as bound:
        tagger = Tagger.from_checkpoint(
            command.checkpoint, command.device, command.precision, batch_size=8, thresholds=command.thresholds
        )
        app = web.build_app(tagger, limits, Hosts(command.host, command.allow_host))
        if not is_loopback(command.host):
            print(f"{command.host} lets other machines in, without a password: use it in networks you trust.")
        url = find_url(bound, command.host)
        card = tagger.card
        ready = (
            f"{url} is ready: {card.model.name}, {len(card.classes)} classes; recordings up to "
            f"{limits.max_mb:g} MB and {limits.max_seconds:g} s. Ctrl-C ends it."
        )
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("psla_fast.serve").setLevel(logging.INFO)
        web.serve(app, bound, ready, url if command.open_browser else "")
        if app.state.desk.is_busy:  # the interpreter would wait for the recording to be scored
            os._exit(0)
