"""The page as one file: a template filled with its style, its script, plotly and the run, all inline.

A text that a model wrote reaches the page only inside JSON, as ASCII without a `<`, and is shown only as text: the
script makes text nodes of it and nothing else. Responses and plotly are compressed; the page unpacks those of a point
when it is chosen, and plotly after the first paint.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from string import Template
from typing import Any

from rewarded_lines.evaluation.records import Run
from rewarded_lines.pages.content import overview, prompts, records
from rewarded_lines.summaries.summary import Summary

# In the order in which they are read; together they are one script.
SCRIPTS = ("numbers.js", "state.js", "front.js", "controls.js", "responses.js", "start.js")


def lacking() -> str:
    """Return what must be installed before a page can be made, in one line; "" if nothing."""
    if find_spec("plotly"):
        return ""
    return "No report.html: it needs plotly, which is not installed (pip install 'rewarded-lines[report]')."


def page(runs: Sequence[Run], summary: Summary) -> bytes:
    """Return the report of runs as one HTML file, the same bytes every time.

    Args:
        runs: those that were summarised.
        summary: their numbers.

    Raises:
        ImportError: plotly is not installed; see `lacking`.
    """
    from plotly.offline import get_plotlyjs

    packed = {f"prompts-{index}": prompts(run) for index, run in enumerate(runs)}
    for index, run in enumerate(runs):
        for place, point in enumerate(summary.points):
            packed[f"records-{index}-{place}"] = records(run, point)
    blocks = [_block(name, _json(content)) for name, content in packed.items()]
    filled = Template(_template("page.html")).substitute(
        title=html.escape(summary.title or "Front"),
        style=_template("page.css"),
        overview=_unmarked(_json(overview(runs, summary))),
        script="\n".join(map(_template, SCRIPTS)),
        blocks="\n".join([*blocks, _block("plotly", get_plotlyjs())]),
    )
    # Half a surrogate pair in a title has no UTF-8; a browser shows its reference as U+FFFD.
    return filled.encode("utf-8", "xmlcharrefreplace")


def _template(name: str) -> str:
    return (files("rewarded_lines.pages") / name).read_text(encoding="utf-8")


def _json(content: Any) -> str:
    """Return content as JSON in ASCII: half a surrogate pair, which no encoding takes, is an escape then."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _unmarked(text: str) -> str:
    """Return JSON without the characters that could end a script element or begin a comment in it."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _block(name: str, text: str) -> str:
    """Return an element that holds a text gzipped, in base64, which no browser runs."""
    packed = base64.b64encode(gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0)).decode("ascii")
    return f'<script type="text/plain" id="{name}">{packed}</script>'
