"""Uploads: a request's body, multipart or raw -> a file without a name that is gone once it is closed."""

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import IO

from starlette.requests import Request

from psla_fast.serve.limits import Limits, Refusal

FLUSH_BYTES = 1 << 18
FRAMING_BYTES = 1 << 16  # of a multipart body, around its file
GRACE_SECONDS = 20.0
MOST_NAME = 200
HOW = "Send one file as the field 'file' of a form, or the bytes themselves as audio/*."
RAW_TYPES = ("", "application/octet-stream", "application/ogg", "video/mp4", "video/webm")

log = logging.getLogger("psla_fast.serve")


@dataclass(frozen=True)
class Upload:
    """A received file: how its sender calls it, and its content; close it."""

    name: str
    file: IO[bytes]


async def receive_upload(request: Request, limits: Limits) -> Upload:
    """Receive a request's file; raises Refusal for what is too large, too slow, or no file.

    At most a quarter of a MB is held in memory. A client that goes away raises ClientDisconnect.
    """
    form = _open_form(request)
    _check_declared_size(request, form, limits)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - its owner closes it
    try:
        num_bytes = await _receive(request, form, file, limits)
        if not num_bytes:
            raise Refusal(422, "The file is empty. Choose a recording.")
        file.flush()
    except OSError as error:
        file.close()
        log.warning("an upload can't be stored in %s: %s", tempfile.gettempdir(), error)
        raise Refusal(503, "The server has no room for the file. Try again later.") from error
    except BaseException:
        file.close()
        raise
    return Upload(form.name if form else "recording", file)


def _open_form(request: Request) -> "_Form | None":
    """Give what takes a multipart body apart; None for a raw one."""
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        return _Form(options.get(b"boundary", b""))
    text = kind.decode("latin-1")
    if text in RAW_TYPES or text.startswith("audio/"):
        return None
    raise Refusal(415, f"The content type {text[:60]!r} holds no recording. {HOW}")


def _check_declared_size(request: Request, form: "_Form | None", limits: Limits) -> None:
    declared = request.headers.get("content-length", "0")  # h11 lets nothing but digits through
    if int(declared) > limits.max_bytes + (FRAMING_BYTES if form else 0):
        raise _too_large(limits)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"The file is larger than {limits.max_mb:g} MB. Cut it, or compress it (FLAC, MP3).")


async def _receive(request: Request, form: "_Form | None", file: IO[bytes], limits: Limits) -> int:
    """Write the file's bytes as they come, and count them."""
    pending, num_bytes, num_framing = bytearray(), 0, 0
    take: Callable[[bytes], None] = pending.extend
    if form:
        form.sink = pending.extend
        take = form.write
    async for chunk in _chunks(request, limits):
        before = len(pending)
        take(chunk)
        num_bytes += len(pending) - before
        num_framing += len(chunk) - len(pending) + before
        if num_bytes > limits.max_bytes or num_framing > FRAMING_BYTES:
            raise _too_large(limits)
        if len(pending) >= FLUSH_BYTES:
            await asyncio.to_thread(file.write, bytes(pending))
            pending.clear()
    if form:
        form.check_whole()
    file.write(pending)
    return num_bytes


async def _chunks(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """Give a body's pieces; Refusal where the next one, or the whole, takes too long."""
    stream, start, num_bytes = request.stream(), time.monotonic(), 0
    while True:
        try:
            async with asyncio.timeout(limits.patience_seconds):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise Refusal(408, "The upload stopped on its way. Try again.") from None
        if chunk is None:
            return
        yield chunk
        num_bytes += len(chunk)
        elapsed = time.monotonic() - start
        if elapsed > GRACE_SECONDS and num_bytes < limits.min_bytes_per_second * elapsed:
            raise Refusal(408, "The upload is too slow. Send a shorter or compressed recording.")


class _Form:
    """A multipart body that holds one file, in the field 'file', and nothing else."""

    def __init__(self, boundary: bytes) -> None:
        """Begin before the first part; Refusal without a usable boundary."""
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser

        if not boundary:
            raise Refusal(400, f"The form has no boundary. {HOW}")
        self.name, self.sink = "", bytearray().extend
        self._num_parts, self._ended = 0, False
        self._field, self._value, self._headers = bytearray(), bytearray(), dict[str, str]()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_part_data": lambda data, start, end: self.sink(data[start:end]),
                    "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise Refusal(400, f"The form's boundary is too long. {HOW}") from None

    def write(self, chunk: bytes) -> None:
        """Take the next piece of the body; the file's part of it goes to the sink."""
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(chunk)
        except FormParserError:
            raise Refusal(400, f"The form can't be read. {HOW}") from None

    def check_whole(self) -> None:
        """Raise Refusal where the body ended before the form did, or held no file."""
        if not self._num_parts:
            raise Refusal(400, f"The form holds no file. {HOW}")
        if not self._ended:
            raise Refusal(400, "The form is cut short. Send the file again.")

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > 1:
            raise Refusal(400, f"The form holds more than one part. {HOW}")

    def _end_header(self) -> None:
        self._headers[self._field.decode("latin-1").lower()] = self._value.decode("utf-8", "replace")
        self._field.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        from python_multipart.multipart import parse_options_header

        # the name is decoded as UTF-8, which browsers send, while the parser wants one character a byte
        disposition = self._headers.get("content-disposition", "").encode().decode("latin-1")
        _, options = parse_options_header(disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != "file" or b"filename" not in options:
            raise Refusal(400, f"The form's field {field[:60]!r} is not the file. {HOW}")
        self.name = clean_name(options[b"filename"].decode("utf-8", "replace"))

    def _end(self) -> None:
        self._ended = True


def clean_name(name: str) -> str:
    """Give a file's name as it can be shown: without folders and control characters, 200 at most.

    It is never used as a path.
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(char for char in last if char.isprintable()).strip()
    return shown[:MOST_NAME] or "recording"
