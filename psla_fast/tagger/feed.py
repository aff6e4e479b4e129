"""Feed: recordings -> their windows in order, decoded by threads that run ahead of the model."""

import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from psla_fast.audio import AudioError
from psla_fast.tagger.recordings import Recording
from psla_fast.tagger.results import Failure
from psla_fast.tagger.windows import Cut, Window, cut_windows

MOST_THREADS = 8
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class End:
    """A recording's end, so many samples at the model's rate after its start."""

    num_samples: int


Event = Window | End | Failure


class _Lane:
    """The queue of one recording's events."""

    def __init__(self, depth: int, stop: threading.Event) -> None:
        self.queue: queue.Queue[Event | None] = queue.Queue(depth)
        self.stop = stop

    def fill(self, recording: Recording, cut: Cut) -> None:
        """Decode a recording into the queue, and None after its last event."""
        try:
            for window in cut_windows(recording.blocks(cut.fbank.sample_rate), cut):
                if not self._put(End(window) if isinstance(window, int) else window):
                    return
        except (AudioError, OSError) as error:
            self._put(Failure(recording.name, " ".join(str(error).split())))
        finally:
            self._put(None)

    def _put(self, event: Event | None) -> bool:
        """Wait for room; False where nobody wants events any more."""
        while not self.stop.is_set():
            try:
                self.queue.put(event, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


def feed_windows(recordings: Sequence[Recording], cut: Cut, depth: int) -> Iterator[tuple[int, Event]]:
    """Give every recording's windows, then its End or Failure, with its number; recording after recording.

    Threads decode the next recordings meanwhile, up to `depth` windows of each.
    """
    num_threads = min(MOST_THREADS, os.cpu_count() or 1, max(1, len(recordings)))
    stop = threading.Event()
    running: deque[tuple[int, _Lane, Future[None]]] = deque()
    waiting = deque(enumerate(recordings))
    pool = ThreadPoolExecutor(num_threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
    try:
        while waiting or running:
            while waiting and len(running) <= num_threads:
                number, recording = waiting.popleft()
                lane = _Lane(depth, stop)
                running.append((number, lane, pool.submit(lane.fill, recording, cut)))
            number, lane, future = running.popleft()
            while (event := lane.queue.get()) is not None:
                yield number, event
            future.result()  # raises what is no fault of the recording
    finally:
        stop.set()
        pool.shutdown()
