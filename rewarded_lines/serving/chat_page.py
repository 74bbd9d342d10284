"""The files of the page that a server shows at `/`: a chat, a front, and a control for the preference.

The page loads nothing from elsewhere, so it works offline. It shows texts of models as text alone; the policy in its
headers also refuses any other script.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from rewarded_lines.reports import page as report_page

# The colours are those of the report.
_PALETTE = "palette.css"
# Every path that is answered. A request's path is only looked up here, so it can open no other file.
_PAGE: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("chat", "stream", "weights", "preference", "front_chart", "page_parts")
    },
    **{f"/page/{name}": (name, "text/css; charset=utf-8") for name in ("chat.css", _PALETTE)},
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        *("img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
_HEADERS: Mapping[str, str] = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}


def page_file(path: str) -> tuple[bytes, str, Mapping[str, str]] | None:
    """Return the content, its type and headers of a file of the page; None if the path is not the page's.

    Args:
        path: the path of the request, such as `/` or `/page/chat.js`.
    """
    found = _PAGE.get(path)
    if found is None:
        return None
    name, kind = found
    folder = files(report_page) if name == _PALETTE else files(__package__).joinpath("page")
    return folder.joinpath(name).read_bytes(), kind, _HEADERS
