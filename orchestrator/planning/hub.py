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

_TIMEOUT = 3.0  # seconds; submitting must not hang on a dead network


class _TokenStays(HTTPRedirectHandler):
    """Follows a redirect with the token within the place that the token was meant for, and without it elsewhere."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:  # scheme, host and port
            following.remove_header("Authorization")
        return following


def fetch_config(base: Base) -> dict[str, Any]:
    """config.json of a base on the hub; raises InputError when it cannot be had."""
    if not HUB_ID.fullmatch(base.model):
        where = f"base.model: found {base.model!r}, which is no folder"
        raise InputError(f"{where}; allowed: a folder, or a hub id owner/name")
    where = f"base.model: found {base.model!r}, which is no folder and not in the local cache of the hub"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "FALSE", "NO"):
        raise InputError(f"{where}; allowed: a folder, or a cached id while HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    request = Request(
        f"{endpoint}/{base.model}/resolve/{base.revision or 'main'}/config.json",
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    try:
        with build_opener(_TokenStays).open(request, timeout=_TIMEOUT) as answer:
            config = json.loads(answer.read())
    except HTTPError as error:
        raise InputError(f"{where}; {endpoint} says: {_refusal(error.code)}") from None
    except (URLError, OSError, ValueError) as error:
        raise InputError(f"{where}; {endpoint} gives no config.json: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where}; {endpoint} gives a config.json that is no object")
    return config


def _refusal(code: int) -> str:
    if code in (401, 403):
        return f"{code}, not allowed or no such model (set HF_TOKEN for a gated one)"
    if code == 404:
        return "404, no such model or revision, or one without config.json (an adapter, or GGUF alone)"
    return str(code)
