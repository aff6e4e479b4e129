#!/usr/bin/env python3
"""The command `psla-fast report`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from psla_fast.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
