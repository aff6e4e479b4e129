"""Errors at the command line: one line of what, got and what to do, exit status 2, never a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_user_error(prog: str) -> Iterator[None]:
    """Turn ValueError and OSError into one line on stderr and exit status 2, Ctrl-C into 130.

    PSLA_FAST_TRACEBACK=1 in the environment shows the traceback instead.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("PSLA_FAST_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
        rank = int(os.environ.get("RANK", "0"))
        print(f"{prog}{f' [rank {rank}]' if rank else ''}: error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
