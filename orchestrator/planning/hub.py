"""The one question that a laptop asks the hub: the config of a base that is not in the local cache."""

import json
import os
from http.client import HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from orchestrator.errors import InputError
from orchestrator.planning.model import HUB_ID
from runfolder.job import Base

_HUB_TIMEOUT_S = 3.0  # submitting must not hang on a dead network


class _TokenStays(HTTPRedirectHandler):
    """Follows a redirect with the token within the place that the token was meant for, and without it elsewhere."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following and _origin(newurl) != _origin(req.full_url):
            following.remove_header("Authorization")
        return following


def _origin(url: str) -> tuple[str, str]:
    """The scheme of a URL, and its host with the port."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def fetch_config(base: Base) -> dict[str, Any]:
    """config.json of a base on the hub; raises InputError when it cannot be had."""
    if not HUB_ID.fullmatch(base.model):
        where = f"base.model: found {base.model!r}, which is no folder"
        raise InputError(f"{where}; allowed: a folder, or a hub id owner/name")
    where = f"base.model: found {base.model!r}, which is no folder and not in the local cache of the hub"
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper()
    if offline not in ("", "0", "FALSE", "NO"):
        raise InputError(f"{where}; allowed: a folder, or a cached id while HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        request = _config_request(endpoint, base)
        with build_opener(_TokenStays).open(request, timeout=_HUB_TIMEOUT_S) as answer:
            config = json.loads(answer.read())
    except HTTPError as error:
        refusal = _refusal(error.code)
        raise InputError(f"{where}; {endpoint} says: {refusal}") from None
    except (URLError, OSError, ValueError) as error:
        raise InputError(f"{where}; {endpoint} gives no config.json: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where}; {endpoint} gives a config.json that is no object")
    return config


def _config_request(endpoint: str, base: Base) -> Request:
    """The request for config.json of a base, with the user's token where there is one."""
    headers = {}
    token = os.environ.get("HF_TOKEN")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    revision = base.revision or "main"
    repository = f"{endpoint}/{base.model}"
    url = f"{repository}/resolve/{revision}/config.json"
    return Request(url, headers=headers)


def _refusal(code: int) -> str:
    if code in (401, 403):
        return f"{code}, not allowed or no such model (set HF_TOKEN for a gated one)"
    if code == 404:
        return "404, no such model or revision, or one without config.json (an adapter, or GGUF alone)"
    return str(code)
