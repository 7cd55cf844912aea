"""`python -m runfolder ROOT`: the run folders below ROOT for somebody far away.

One request as JSON on standard input, one answer on standard output: {"answer": ...}, or {"refused": one line}, or
{"damaged": one line}. `fetch` alone is answered by a tar archive. ROOT may be `-`: FLEETUNE_HOME/runs here.
"""

import json
import sys
from pathlib import Path
from typing import Any

from runfolder.files import Damaged
from runfolder.folders import home
from runfolder.site import Refused, answer_request, send_archive


def main(root: Path, request: dict[str, Any]) -> None:
    """Answer one request on standard output."""
    if request["verb"] == "fetch":
        send_archive(root, request["run_id"], sys.stdout.buffer)
        return
    try:
        reply = {"answer": answer_request(root, request)}
    except Refused as error:
        reply = {"refused": str(error)}
    except Damaged as error:
        reply = {"damaged": str(error)}
    print(json.dumps(reply))


if __name__ == "__main__":
    runs = home() / "runs" if sys.argv[1] == "-" else Path(sys.argv[1])
    main(runs, json.load(sys.stdin))
