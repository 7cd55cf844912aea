"""The clusters file: which clusters there are beside `local`, by the names that `--cluster` takes.

It is that of `--clusters`, or FLEETUNE_CLUSTERS, or ~/.config/fleetune/clusters.yaml. The cluster that is meant
without `--cluster` is FLEETUNE_CLUSTER, or `cluster:` in ~/.config/fleetune/config.yaml, or `local`.
"""

import os
import reprlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clusters.backends import BACKENDS, backend_of
from clusters.config import ClusterConfig
from orchestrator.errors import InputError
from orchestrator.planning.spec import load_yaml
from orchestrator.planning.spec_errors import did_you_mean, explain
from runfolder.job import JOB_NAME


def clusters_path() -> Path:
    """Where the clusters file is, whether there is one or not."""
    named = os.environ.get("FLEETUNE_CLUSTERS")
    if named:
        return Path(named).expanduser()
    return _settings_folder() / "clusters.yaml"


def read_clusters() -> dict[str, ClusterConfig]:
    """The clusters of the file by name; none where there is no file. Raises InputError with one line per error."""
    path = clusters_path()
    if not path.exists():
        if os.environ.get("FLEETUNE_CLUSTERS"):
            raise InputError(f"--clusters or FLEETUNE_CLUSTERS: {path}: no such file")
        return {}
    configs = {}
    problems = []
    for name, plain in load_yaml(path).items():
        if not isinstance(name, str) or not JOB_NAME.fullmatch(name) or name == "local":
            problems.append(f"{path}: {name!r}: allowed as a cluster's name: a-z, 0-9 and -, and not 'local'")
            continue
        try:
            configs[name] = _config(plain)
        except InputError as error:
            problems += [f"{path}: {name}.{line}" for line in str(error).splitlines()]
    if problems:
        raise InputError("\n".join(problems))
    return configs


def default_cluster() -> str:
    """The name of the cluster that is meant where none is said."""
    named = os.environ.get("FLEETUNE_CLUSTER")
    if named:
        return named
    path = _settings_folder() / "config.yaml"
    if not path.exists():
        return "local"
    settings = load_yaml(path)
    unknown = settings.keys() - {"cluster"}
    name = settings.get("cluster", "local")
    if unknown or not isinstance(name, str):
        found = ", ".join(map(str, unknown)) or reprlib.repr(name)
        raise InputError(f"{path}: found {found}; allowed: cluster, the name of a cluster")
    return name


def _settings_folder() -> Path:
    parent = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(parent).expanduser() / "fleetune"


def _config(plain: Any) -> ClusterConfig:
    """A cluster in plain data; raises InputError with a line per field that is wrong, which begins with its name."""
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(kind, str) or kind not in BACKENDS:
        hint = did_you_mean(kind, BACKENDS)
        allowed = " or ".join(BACKENDS)
        raise InputError(f"kind: found {reprlib.repr(kind)}; {hint}allowed: {allowed}")
    model = backend_of(kind).Config
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, plain, model))) from None
