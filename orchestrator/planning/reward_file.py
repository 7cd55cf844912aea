"""A reward's function, looked for in its file before a run starts; nothing of the file is run here."""

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
