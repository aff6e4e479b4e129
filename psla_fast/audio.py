"""Decode: an audio file, or its bytes -> a 16 kHz mono waveform in [-1, 1], mean removed."""

import io
import math
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

Waveform = npt.NDArray[np.float32]
Opened = tuple[int, int, Iterator[Waveform]]  # rate in Hz, position in samples, mono blocks from there on

AV_SUFFIXES = frozenset((".m4a", ".mp4", ".aac", ".webm"))  # libsndfile reads none of these; PyAV does
BLOCK_SAMPLES = 1 << 19  # of all channels together: what is decoded at a time
MIN_RATE, MAX_RATE = 1000, 768_000  # Hz; a header that says anything else is damaged
MAX_AMPLITUDE = 1e12  # the mel power of more overflows float32
UNKNOWN_FRAMES = 1 << 62  # libsndfile's count is above this where a header doesn't say
STREAMING_BYTES = 0x7F000000  # what writes to a pipe declares 0x7FFFFFFF bytes, 0xFFFFFFFF, or just below
# libsndfile's other formats are instruments and matrices, found by weak marks; its SDS reader prints.
FORMATS = ("AIFF", "AU", "CAF", "FLAC", "IRCAM", "MP3", "NIST", "OGG", "RF64", "VOC", "W64", "WAV", "WAVEX")
INEXACT_SEEK = frozenset(("MP3", "OGG"))  # libsndfile: Vorbis seeks wrongly near its end, MP3 by estimates


class AudioError(ValueError):
    """Audio that can't be used; `reason` is one word for statistics, for instance undecodable."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the reason apart from the sentence."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class _Decoder(soundfile.SoundFile):  # type: ignore[misc]  # soundfile is untyped
    """A SoundFile that is read on: the base class seeks after every read, which resets lossy decoders."""

    def seekable(self) -> bool:
        """Say no, so that `read` leaves the position alone."""
        return False


class _Bytes(io.BytesIO):
    """Bytes for libsndfile, whose parsers may seek before the start; an exception there goes to stderr."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek to the nearest position there is."""
        size = self.getbuffer().nbytes
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: size}[whence]
        return super().seek(min(max(base + offset, 0), size))


def read_waveform(
    file: Path | bytes,
    sample_rate: int = 16000,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    max_seconds: float = 600.0,
) -> Waveform:
    """Read a file, or a file's bytes, as a mono waveform (samples,) at `sample_rate`, its mean subtracted.

    Only [start_seconds, end_seconds) is kept, cut at the file's own rate. libsndfile decodes; PyAV does so
    for .m4a, .mp4, .aac and .webm. Memory follows what is decoded, at most `max_seconds`, never what a header
    declares. Raises AudioError with reason missing_audio, undecodable, too_long (more than `max_seconds`
    after the cut), empty (also a cut beyond the end), or one of `prepare_waveform`.
    """
    _keep_freed_memory()
    what = "bytes" if isinstance(file, bytes) else str(file)
    if not 0 <= start_seconds < (math.inf if end_seconds is None else end_seconds):
        raise AudioError("empty", f"{what} holds nothing from second {start_seconds} to {end_seconds}")
    with _open(file, start_seconds, what) as (rate, position, blocks):
        start = round(start_seconds * rate)
        length = None if end_seconds is None else round(end_seconds * rate) - start
        waveform = _gather(blocks, start - position, length, round(max_seconds * rate), what)
    if not len(waveform):
        raise AudioError("empty", f"{what} holds no sample from second {start_seconds:g} on")
    return prepare_waveform(waveform, rate, sample_rate, what)


def stream_waveform(file: Path | bytes, sample_rate: int = 16000) -> Generator[Waveform, None, None]:
    """Read a file, or a file's bytes, as mono blocks (samples,) at `sample_rate`: in constant memory.

    Joined and centred, the blocks are what `read_waveform` gives. Each is decoded when it is asked for, so
    what is wrong with a file may be found late. Raises AudioError as `read_waveform` does.
    """
    what = "bytes" if isinstance(file, bytes) else str(file)
    with _open(file, 0.0, what) as (rate, _, blocks):
        yield from stream_blocks(blocks, rate, sample_rate, what)


def stream_blocks(
    blocks: Iterable[Waveform], source_rate: int, sample_rate: int, what: str
) -> Generator[Waveform, None, None]:
    """Resample mono blocks (samples,) of one sound as they come; `what` names it in messages.

    Raises AudioError for what `prepare_waveform` refuses; empty, silent or dc_only after the last block.
    """
    num_samples = 0
    for block in resample_blocks(_varying(blocks, what), source_rate, sample_rate, what):
        num_samples += len(block)
        yield block
    if not num_samples:
        raise AudioError("empty", f"{what} is shorter than one sample at {sample_rate} Hz")


def resample_blocks(
    blocks: Iterable[Waveform], source_rate: int, sample_rate: int, what: str
) -> Generator[Waveform, None, None]:
    """Resample mono blocks (samples,) as they come, by soxr (HQ), whatever they hold but numbers.

    What soxr still holds comes last. Raises AudioError with reason undecodable or non_finite.
    """
    _check_rate(source_rate, what)
    stream = None
    if source_rate != sample_rate:
        stream = soxr.ResampleStream(source_rate, sample_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        _check_finite(block.min(initial=0), block.max(initial=0), what)
        resampled = block if stream is None else stream.resample_chunk(np.ascontiguousarray(block))
        if len(resampled):
            yield resampled
    if stream is not None:
        rest = stream.resample_chunk(np.empty(0, np.float32), last=True)
        if len(rest):
            yield rest


def prepare_waveform(audio: Waveform, source_rate: int, sample_rate: int, what: str) -> Waveform:
    """Downmix, resample and centre audio (samples,) or (samples, channels): a new waveform (samples,).

    Channels are averaged, soxr (HQ) resamples, the mean is subtracted as PSLA does. `what` names the audio in
    messages. Raises AudioError with reason empty, undecodable (no rate of audio), non_finite (NaN, infinite,
    or beyond 1e12), silent (every sample is 0) or dc_only (every sample has the same other value).
    """
    _check_rate(source_rate, what)
    if not audio.size:
        raise AudioError("empty", f"{what} holds no sample")
    waveform = downmix(audio) if audio.ndim == 2 else audio
    low, high = waveform.min(), waveform.max()
    _check_finite(low, high, what)
    _check_varies(low, high, what)
    if source_rate != sample_rate:
        waveform = soxr.resample(waveform, source_rate, sample_rate, quality="HQ")
        if not len(waveform):
            raise AudioError("empty", f"{what} is shorter than one sample at {sample_rate} Hz")
    return centre(waveform)


def centre(waveform: Waveform) -> Waveform:
    """Subtract a waveform's mean (samples,), as PSLA does."""
    return waveform - float(waveform.mean(dtype=np.float64))


def downmix(block: npt.NDArray[np.float32 | np.int16], scale: float = 1.0) -> Waveform:
    """Mean over channels of a block (samples, channels), times `scale`: (samples,)."""
    floats: Waveform = block.astype(np.float32, copy=False)
    mono = floats[:, 0]
    with np.errstate(all="ignore"):  # NaN and infinity are looked for later
        for channel in range(1, floats.shape[1]):
            mono = np.add(mono, floats[:, channel], out=None if channel == 1 else mono)
        factor = np.float32(scale / floats.shape[1])
        return mono if factor == 1 else mono * factor


def read_duration(path: Path) -> float:
    """Return a file's length in seconds as its header has it; 0.0 where it can't be read or doesn't say."""
    if path.suffix.lower() in AV_SUFFIXES:
        return _read_av_duration(path)
    try:
        with path.open("rb") as source, soundfile.SoundFile(source.fileno(), closefd=False) as decoder:
            known = decoder.frames < UNKNOWN_FRAMES and decoder.samplerate > 0
            return float(decoder.frames / decoder.samplerate) if known else 0.0
    except (OSError, soundfile.SoundFileError):
        return 0.0


@cache
def _keep_freed_memory() -> None:
    """Free 31 MB once a process: glibc then keeps up to 62 MB that are freed instead of giving them back.

    Otherwise every clip's arrays are new pages, whose faults can cost more than reading a WAV. Source:
    M_MMAP_THRESHOLD in mallopt(3), which grows to what is freed, up to 32 MB. Elsewhere this does nothing.
    """
    np.empty(31 << 20, np.uint8)


def _check_rate(rate: int, what: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError("undecodable", f"{what} has a sample rate of {rate} Hz")


def _check_finite(low: float, high: float, what: str) -> None:
    if not (low > -MAX_AMPLITUDE and high < MAX_AMPLITUDE):  # NaN is neither
        raise AudioError("non_finite", f"{what} holds NaN, infinite or absurdly large samples")


def _check_varies(low: float, high: float, what: str) -> None:
    if low == high:
        raise AudioError("dc_only" if low else "silent", f"{what}: every sample is {low:g}")


def _varying(blocks: Iterable[Waveform], what: str) -> Iterator[Waveform]:
    """Hand blocks on; AudioError after the last one where they hold no sample, or one value alone."""
    low, high = math.inf, -math.inf
    for block in blocks:
        low, high = min(low, block.min(initial=math.inf)), max(high, block.max(initial=-math.inf))
        yield block
    if low > high:
        raise AudioError("empty", f"{what} holds no sample")
    _check_varies(low, high, what)


def _gather(blocks: Iterator[Waveform], skip: int, length: int | None, limit: int, what: str) -> Waveform:
    """Join blocks, without the first `skip` samples, up to `length`. Raises AudioError beyond `limit`."""
    waveform = np.empty(0, np.float32)
    total = 0
    for decoded in blocks:
        block = decoded[skip:]
        skip -= len(decoded) - len(block)
        end = total + len(block) if length is None else min(total + len(block), length)
        if total == 0:
            waveform = block[:end]  # all of most clips
        elif end > total:
            if end > len(waveform):
                waveform = waveform if waveform.flags.owndata else waveform.copy()
                waveform.resize(
                    max(end, total * 5 // 4), refcheck=False
                )  # in place, other than np.concatenate
            waveform[total:end] = block[: end - total]
        total = end
        if total > limit:
            raise AudioError("too_long", f"{what} lasts longer than the {limit} samples of max_seconds")
        if total == length:
            break
    return waveform[:total]


@contextmanager
def _open(file: Path | bytes, start_seconds: float, what: str) -> Iterator[Opened]:
    """Open a file, or a file's bytes, with what decodes it."""
    if isinstance(file, Path) and not file.is_file():
        raise AudioError("missing_audio", f"{what} is not there")
    if isinstance(file, Path) and file.suffix.lower() in AV_SUFFIXES:
        opened = _open_av(file, what)
    else:
        opened = _open_sndfile(file, start_seconds, what)
    with opened as found:
        yield found


@contextmanager
def _open_sndfile(file: Path | bytes, start_seconds: float, what: str) -> Iterator[Opened]:
    """Open a file with libsndfile, at `start_seconds` where its seek is exact."""
    try:
        with ExitStack() as stack:
            if isinstance(file, bytes):
                decoder = _Decoder(_Bytes(file))
            else:  # by number: libsndfile would take a file called "-" for stdin
                decoder = _Decoder(stack.enter_context(file.open("rb")).fileno(), closefd=False)
            stack.enter_context(decoder)
            rate = decoder.samplerate
            _check_rate(rate, what)
            if decoder.format not in FORMATS:
                raise AudioError(
                    "undecodable", f"{what} is {decoder.format_info}; give one of {', '.join(FORMATS)}"
                )
            _check_whole(decoder, what)
            position = 0
            if decoder.format not in INEXACT_SEEK and start_seconds > 0:
                position = min(round(start_seconds * rate), decoder.frames)
                decoder.seek(position)
            yield rate, position, _decode_sndfile(decoder, position, what)
    except soundfile.LibsndfileError as error:
        raise AudioError("undecodable", f"{what}: {error.error_string or 'damaged or cut short'}") from error
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError("undecodable", f"{what}: {error}") from error


def _check_whole(decoder: _Decoder, what: str) -> None:
    """Raise AudioError where libsndfile's parser noted that much of the samples' chunk is missing."""
    note = re.search(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", decoder.extra_info)
    if note is None:
        return
    declared, held = int(note[1]), int(note[2])
    if declared < STREAMING_BYTES and declared - held > max(1024, declared // 100):
        _raise_cut_short(decoder, decoder.frames, decoder.frames * declared // max(held, 1), what)


def _raise_cut_short(decoder: _Decoder, held: int, declared: int, what: str) -> NoReturn:
    seconds, whole = held / decoder.samplerate, declared / decoder.samplerate
    raise AudioError("undecodable", f"{what} is cut short: holds {seconds:.2f} of {whole:.2f} seconds")


def _decode_sndfile(decoder: _Decoder, position: int, what: str) -> Iterator[Waveform]:
    """Decode on from a decoder's position to its end: mono blocks (samples,)."""
    # libsndfile converts 16-bit PCM to float at a tenth of NumPy's speed; FLAC and lossy codecs yield floats.
    pcm = decoder.subtype == "PCM_16" and decoder.format != "FLAC"
    scale, dtype = (2.0**-15, "int16") if pcm else (1.0, "float32")
    shape = max(1, BLOCK_SAMPLES // decoder.channels), decoder.channels
    while len(block := decoder.read(out=np.empty(shape, dtype))):
        position += len(block)
        yield downmix(block, scale)
    if decoder.format == "FLAC" and position < decoder.frames < UNKNOWN_FRAMES:
        _raise_cut_short(decoder, position, decoder.frames, what)


@contextmanager
def _open_av(file: Path, what: str) -> Iterator[Opened]:
    """Open the first audio stream of a file with PyAV."""
    try:
        import av
    except ImportError:
        advice = "pip install psla-fast[m4a], or convert to wav or flac"
        raise AudioError("undecodable", f"{what} needs PyAV: {advice}") from None
    try:
        with av.open(str(file.absolute())) as container:
            frames = container.decode(audio=0) if container.streams.audio else iter(())
            first = next(frames, None)  # the header of AAC with SBR has half the rate
            if first is None:
                raise AudioError("empty", f"{what} has no audio")
            _check_rate(first.sample_rate, what)
            planar = av.AudioResampler(format="fltp", layout=first.layout, rate=first.sample_rate)
            parts = (part for frame in chain((first,), frames) for part in planar.resample(frame))
            arrays = (part.to_ndarray().astype(np.float32, copy=False) for part in parts)
            yield first.sample_rate, 0, (downmix(channels.T) for channels in arrays)
    except AudioError:
        raise
    except (av.FFmpegError, ValueError) as error:  # ValueError: a stream that changes its rate or channels
        raise AudioError("undecodable", f"{what}: {error}") from error


def _read_av_duration(path: Path) -> float:
    try:
        import av
    except ImportError:
        return 0.0
    try:
        with av.open(str(path.absolute())) as container:
            return max(0.0, (container.duration or 0) / av.time_base)
    except av.FFmpegError:
        return 0.0
