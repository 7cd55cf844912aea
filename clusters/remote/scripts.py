"""What the shell of a cluster's machine is asked to do there: find code and Python, and start a module of Fleetune.

Arguments of each script: root ("" for the default), digest of the code, python ("" where Fleetune makes the
environment), digest of the lock, and how many modules the code has. The cluster's own setup lines come before, as
they may put Python on the path. A script travels in one word.
"""

NO_CODE = 97  # exit code: this version of Fleetune is not there yet
NO_ENVIRONMENT = 98  # exit code: the environment is not there yet
NO_PYTHON = 99  # exit code: no Python there is new enough

_ROOT = 'root=${1:-${FLEETUNE_HOME:-$HOME/.fleetune}}; case $root in "~/"*) root=$HOME/${root#"~/"};; esac\n'
_CODE = _ROOT + (
    'code=$root/code/$2; modules=$(find "$code" -name "*.py" 2>/dev/null | wc -l)\n'  # old files may be purged there
    f'[ "$modules" -ge "$5" ] || exit {NO_CODE}\n'
    "export FLEETUNE_HOME=$root PYTHONPATH=$code PYTHONUNBUFFERED=1 PYTHONUTF8=1\n"
)
# It sets `base`, a Python that is new enough; `python`, the one of runs; and `environment`, "" for a named Python.
_PYTHON = _CODE + (
    "version_of() {\n"
    """  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); """
    "sys.exit(sys.version_info < (3, 11))' 2>/dev/null)\n"
    "}\n"
    'if [ -n "$3" ]; then\n'
    """  base=$3; case $base in "~/"*) base=$HOME/${base#"~/"};; esac\n"""
    "  python=$base environment=\n"
    f'  version_of "$base" || {{ echo "$3 there is ${{version:-no Python}}" >&2; exit {NO_PYTHON}; }}\n'
    "else\n"
    "  for base in python3.11 python3.12 python3.13 python3; do\n"
    '    version_of "$base" && break\n'
    f'  done || {{ echo "python3 there is ${{version:-not on PATH}}" >&2; exit {NO_PYTHON}; }}\n'
    "  environment=$root/environments/$4-py$version python=$environment/ready/bin/python\n"
    "fi\n"
)

DECODE = 'script=$1; shift; eval "$(printf %s "$script" | base64 -d)"'
# Where the folder is there already, another client was first, or files of it are gone.
RECEIVE = _ROOT + (
    'umask 077; mkdir -p "$root/code" && new=$(mktemp -d "$root/code/.new-XXXXXX") && '
    '{ tar -xzmf - -C "$new" || { rm -rf "$new"; exit 1; }; } && '
    '{ mv -T "$new" "$root/code/$2" 2>/dev/null || '
    '{ cp -rn "$new/." "$root/code/$2"; rm -rf "$new"; [ -d "$root/code/$2" ]; }; }'
)
ANSWER = _PYTHON + (
    f'[ -z "$environment" ] || [ -x "$python" ] || exit {NO_ENVIRONMENT}\nexec "$python" -P -m clusters.answer'
)
SET_UP = _PYTHON + 'exec "$base" -P -m clusters.remote.setup "$environment"'
LOOK = _PYTHON + (
    '[ -z "$environment" ] || [ -x "$python" ] || python=$base\nexec "$python" -P -m clusters.checkup "$environment"'
)
