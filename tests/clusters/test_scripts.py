"""What the shell of a far machine is asked to do, in a real sh."""

import subprocess
from pathlib import Path

from clusters.remote.scripts import ANSWER


def test_a_far_python_reads_and_writes_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "code" / "0123").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *clusters.answer) echo "$PYTHONUTF8";; *) echo 3.11;; esac\n')
    python.chmod(0o755)
    command = ["sh", "-c", ANSWER, "sh", tmp_path, "0123", python, "4567", "0"]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "en_US.ISO-8859-1"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "1\n"
