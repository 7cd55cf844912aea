"""What another machine asks of the run folders of this one, as plain data that goes through JSON."""

import time
from base64 import b64encode
from dataclasses import astuple
from pathlib import Path
from typing import Any

from runfolder.appended import Position
from runfolder.fetched import FETCHED, is_fetched, part
from runfolder.files import Record
from runfolder.site import Appended, LocalSite, PlainData, Refused


def answer_request(root: Path, request: PlainData) -> Any:
    """Do what a request asks, as plain data that goes through JSON: {verb, ...its arguments}."""
    site = LocalSite(root)
    match request["verb"]:
        case "ids":
            return site.ids()
        case "create":
            record = request["record"] | {"submitted": time.time()}  # by the clock that the run's other times have
            return site.create(request["run_id"], record)
        case "record":
            return site.record(request["run_id"])
        case "snapshots":
            snapshots = site.snapshots(request["run_ids"], request["in_full"])
            return {run_id: view.dump() for run_id, view in snapshots.items()}
        case "read":
            since = {}
            for file, position in request["since"].items():
                since[file] = Position(*position)
            appended = site.read(request["run_id"], since)
            return _plain(appended)
        case "files":
            return site.files(request["run_id"])
        case "write_secrets":
            return site.write_secrets(request["run_id"], request["secrets"])
        case "kept_secrets":
            return site.kept_secrets(request["run_id"])
        case "ask":
            return site.ask(request["run_id"], request["what"], request["step"], request["why"])
        case "digest":
            return site.digest(Path(request["path"]))
        case "news":
            return site.news(request["known"]).model_dump()
        case "listing":
            return site.listing(request["run_id"])
        case "part":
            if not is_fetched(request["path"]):
                allowed = ", ".join(FETCHED)
                raise Refused(f"path: found {request['path']!r}; allowed: files of {allowed}")
            data = part(root / request["run_id"], request["path"], request["offset"], request["length"])
            return b64encode(data).decode()
    raise Refused(f"verb: found {request['verb']!r}; this Fleetune does not know it")


def _plain(appended: Appended) -> dict[str, list[Record]]:
    """Chunks as JSON can hold them: any bytes may be in a log."""
    plain: dict[str, list[Record]] = {}
    for file, chunks in appended.items():
        plain[file] = []
        for chunk in chunks:
            data = b64encode(chunk.data).decode()
            position = astuple(chunk.after)
            plain[file].append({"data": data, "after": position, "sealed": chunk.sealed})
    return plain
