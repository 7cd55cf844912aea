"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

JobArgument = Annotated[Path, typer.Argument(metavar="JOB.YAML", help="The job.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run id, the start of one, or a job's name (its latest run).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the job: train.lr=3e-4.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", metavar="NAME", help="A cluster of the clusters file, or local; submit: also a,b."),
]
GpuOption = Annotated[
    str | None,
    typer.Option("--gpu", metavar="GPU", help="Other GPUs than those there: GiB like 80, a name, or A100:80."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Install the packages of the cluster without asking.")]
