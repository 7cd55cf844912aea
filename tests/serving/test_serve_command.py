"""What `fleetune serve` refuses before it serves; how its process ends is seen in test_quotas.py."""

from pathlib import Path

import pytest
from adapters import Exported
from typer.testing import CliRunner

from orchestrator.commands.serve import serve_app
from orchestrator.errors import InputError
from orchestrator.serve import Serving, serve


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "--host: found 0.0.0.0 without --tenants; allowed: 127.0.0.1"),
        ({"adapters": ("lora",)}, "--adapters: found 'lora'; allowed: NAME=FOLDER, or NAME=RUN"),
        ({"adapters": ("a={folder}", "a={folder}")}, "--adapters: found the name a twice"),
        ({"adapters": ("a/b={folder}",)}, "adapter: found the name 'a/b'; allowed: letters"),
        ({"adapters": ("a={folder}/..",)}, "found no adapter_config.json"),
        ({"tenants_file": Path("nowhere.yaml")}, "nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_served(
    options: dict, said: str, tiny_base: Path, served: dict[str, Exported]
) -> None:
    folder = str(served["lora"].folder)
    if "adapters" in options:
        options = options | {"adapters": tuple(text.format(folder=folder) for text in options["adapters"])}
    asked = {"adapters": (), "tenants_file": None, "host": "127.0.0.1", "port": 0, "replicas": 1} | options
    with pytest.raises(InputError, match=said):
        serve(Serving(base=str(tiny_base), **asked))


def test_a_new_key_is_what_its_hash_says() -> None:
    from serving.gateway.tenants import hash_of

    lines = CliRunner().invoke(serve_app, ["key"]).stdout.split()
    assert hash_of(lines[1]) == lines[-1]
