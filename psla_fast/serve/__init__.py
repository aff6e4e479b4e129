"""The web page: drop a recording, see its classes and their course over time; and the same as JSON."""

from psla_fast.serve.app import build_app
from psla_fast.serve.limits import Limits, Refusal
from psla_fast.serve.server import bind, serve

__all__ = ["Limits", "Refusal", "bind", "build_app", "serve"]
