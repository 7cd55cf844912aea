"""`fleetune serve`: a base and adapters behind an HTTP API, for one person or for many tenants."""

from pathlib import Path
from typing import Annotated

import typer

serve_app = typer.Typer()


@serve_app.command("serve")
def serve_command(
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="The model: a folder, or a hub id.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", metavar="NAME=FOLDER_OR_RUN", help="An adapter and its name; repeatable."),
    ] = None,
    tenants: Annotated[
        Path | None, typer.Option("--tenants", metavar="FILE", help="Who has keys; without it, this machine alone.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 is any that is free.")] = 8000,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="One process on this machine.")] = False,
) -> None:
    """Serve a base and its adapters through OpenAI's API; the page at / tries them side by side."""
    from orchestrator.serve import Serving, serve

    named = tuple(adapters or ())
    serve(Serving(base, named, tenants, host, port, no_ray))


@serve_app.command("key")
def key_command() -> None:
    """Make an API key: prints it, for its owner, and what the tenants file says of it."""
    from serving.gateway.tenants import hash_of, new_key

    key = new_key()
    print(f"key:             {key}")
    print(f"tenants file:    {hash_of(key)}")
