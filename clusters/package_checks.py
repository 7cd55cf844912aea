"""Whether a Python has what runs need, in versions that Fleetune takes. It needs Python alone."""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from clusters.checks import Check

# A program that prints as JSON which versions of the packages that it is given there are.
VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def installed_here(requirements: Iterable[str]) -> dict[str, str]:
    """The versions of those packages of requirements that this Python has."""
    found = {}
    for name in map(package_in, requirements):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def packages_check(label: str, requirements: Iterable[str], found: Mapping[str, str], mend: str) -> Check:
    """Whether the packages of a Python, by the versions that were found, meet requirements."""
    problems = []
    installed = []
    for requirement in requirements:
        name = package_in(requirement)
        if name not in found:
            problems.append(f"no {requirement}")
            continue
        installed.append(f"{name} {found[name]}")
        if not _is_met(requirement, found[name]):
            problems.append(f"{name} {found[name]}, wanted: {requirement}")
    if problems:
        return Check(label, "fail", "; ".join(problems), mend)
    return Check(label, "ok", ", ".join(installed))


def package_in(requirement: str) -> str:
    """The package in a requirement like `ray[default,train]==2.60.0`."""
    for sign in "[<>=!~; ":
        requirement = requirement.partition(sign)[0]
    return requirement


def _is_met(requirement: str, found: str) -> bool:
    """Whether a version fits a requirement; without the package that compares versions, any does."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(found, prereleases=True)
