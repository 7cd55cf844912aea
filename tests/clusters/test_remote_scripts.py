"""Scripts for another machine, whatever shell its user logs in to."""

import base64
import shutil
import subprocess

import pytest

from clusters.remote import scripts
from clusters.remote.link import Ssh

SCRIPT = """set -u
first="$1"  # two lines, and what shells take for something else: !! 'quotes' \\ $HOME `id`
printf '%s|' "$first" "$2"; cat
"""


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "tcsh", "csh", "fish"])
def test_a_login_shell_hands_on_script_arguments_and_input(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    encoded = base64.b64encode(SCRIPT.encode()).decode()
    command = ["bash", "-c", scripts.DECODE, "fleetune", encoded, "/scratch/a b'c", ""]
    line = Ssh("login").process(command)[-1]
    ran = subprocess.run([shell, "-c", line], input="input", capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("/scratch/a b'c||input", "")
