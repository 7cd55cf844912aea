"""What judges answers, looked at before a run starts: the file of a function, of which nothing is run, or a model."""

import json
import symtable
import tokenize
from pathlib import Path

from orchestrator.errors import InputError


def check_defined(file: Path, function: str) -> None:
    """Raise InputError where a file is no Python, or defines and imports no such name."""
    where = f"objective.reward: {file}"
    try:
        with tokenize.open(file) as stream:
            code = stream.read()
        names = symtable.symtable(code, str(file), "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where}: found {error}; allowed: Python") from None
    defined = []
    for name in names.get_symbols():
        if name.is_assigned() or name.is_imported():
            defined.append(name.get_name())
    if function not in defined and "import *" not in code:
        raise InputError(f"{where}: found no {function}; allowed: a function that it defines")


def architecture_of(config: Path) -> str:
    """The class of the model that a config.json describes, `none` where it says none; raises InputError."""
    try:
        described = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"objective.reward_model: {config}: found no JSON ({error}); allowed: JSON") from None
    names = None
    if isinstance(described, dict):
        names = described.get("architectures")
    if not isinstance(names, list) or not names:
        return "none"
    return str(names[0])
