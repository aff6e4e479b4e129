"""psla_fast: a sharded-data, high-throughput trainer for audio tagging that carries the whole PSLA recipe."""

__version__ = "0.1.0"
