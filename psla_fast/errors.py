"""Errors at the command line: one line of what, got and what to do, exit status 2, never a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def exit_on_user_error(prog: str) -> Iterator[None]:
    """Turn ValueError, OSError and lack of memory into one line on stderr and status 2, Ctrl-C into 130.

    PSLA_FAST_TRACEBACK=1 in the environment shows the traceback instead.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read our output has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        text = _sentence(error)
        if not text or os.environ.get("PSLA_FAST_TRACEBACK") == "1":
            raise
        rank = int(os.environ.get("RANK", "0"))
        print(f"{prog}{f' [rank {rank}]' if rank else ''}: error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def _sentence(error: ValueError | OSError | RuntimeError) -> str:
    """Say an error in one line; empty for what is a fault of ours and deserves its traceback."""
    if isinstance(error, RuntimeError):
        if type(error).__name__.startswith("Dist") or "/gloo/" in str(error):
            reason = str(error).splitlines()[0].rpartition("] ")[2]
            return f"lost another rank ({reason}). It says why; run the same command again to go on."
        lacks_memory = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
        return "not enough memory for a batch. Lower the batch size." if lacks_memory else ""
    if isinstance(error, OSError) and error.strerror:
        advice = " Make room and run the same command again." if error.errno in FULL else ""
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}.{advice}"
    return " ".join(str(error).split()) or type(error).__name__
