"""Render: a report's content -> one HTML page that needs nothing else, neither files nor a network."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "lines.js", "bars.js", "heat.js", "table.js", "classes.js", "examples.js", "page.js")


def render_page(content: Mapping[str, Any]) -> str:
    """Give the page as HTML; texts of the data are escaped, and its policy lets only its own script run."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ValueError("psla-fast report needs jinja2: pip install jinja2.") from error
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = '"use strict";\n' + "\n".join((PAGE / name).read_text("utf-8") for name in SCRIPTS)
    style = (PAGE / "style.css").read_text("utf-8")
    return environment.get_template("report.html").render(
        {key: value for key, value in content.items() if key != "data"},
        data=Markup(embed_json(content["data"])),
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def embed_json(data: object) -> str:
    """Write JSON that may stand in a <script> of HTML: nothing in it ends the element or begins another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    """Give an inline element's source expression for a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
