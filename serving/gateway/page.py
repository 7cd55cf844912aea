"""The page at `/`: pick adapters, write one prompt, read the answers side by side."""

from functools import cache
from importlib.resources import files

# Nothing but the page's own script and style, and this server.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def page_text() -> str:
    """The page, one file without a build step."""
    page = files("serving.gateway") / "page.html"
    return page.read_text()
