"""Pages that are made from the code: the keys of a job and of a cluster, methods, and the API; a hook of mkdocs."""

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import fleetune
from clusters.config import ClusterConfig
from clusters.kubernetes_config import KubernetesConfig
from clusters.local import LocalConfig
from clusters.slurm_script import SlurmConfig
from methods.options import KINDS, Options
from orchestrator.describe import CAPABILITIES, methods, support
from runfolder.job import Job
from runfolder.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
API = ("runfolder", "orchestrator", "clusters", "trainer", "methods", "serving", "k8s")
SHOWN_WITH_NAME = (
    "    options:",
    "      heading_level: 2",
    "      show_root_heading: true",
    "      show_root_full_path: false",
    "      show_root_toc_entry: true",
    "      skip_local_inventory: true",  # references go to the page of the package
)
READ = {
    "answers": "rows with an answer",
    "pairs": "pairs of a chosen and a rejected answer",
    "margins": "pairs of a chosen and a rejected answer, perhaps with a `margin`",
    "judged": "answers with a `label`",
}
OWN_METHODS = [kind for kind, options in KINDS.items() if options.implementation.startswith("methods.")]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that nobody writes by hand."""
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """The path of each made page, and its Markdown."""
    yield "job.md", job_page()
    yield "clusters-file.md", clusters_page()
    yield "methods/index.md", methods_page()
    for kind in OWN_METHODS:
        yield f"methods/{kind}.md", method_page(kind)
    yield "api/fleetune.md", fleetune_page()
    for package in API:
        yield f"api/{package}.md", api_page(package)


def job_page() -> str:
    """Every key of job.yaml, from the models that check it."""
    lines = ["# job.yaml", "", "Every key, made from the models that check a job. Unknown keys are errors.", ""]
    plain = {name: field for name, field in Job.model_fields.items() if part_of(field) is None}
    lines += ["## The job itself", "", *options_table(plain)]
    for name, field in Job.model_fields.items():
        part = part_of(field)
        if part is not None:
            lines += ["", f"## {name}", "", *paragraphs(part.__doc__), "", *options_table(part.model_fields)]
    lines += [
        "",
        "## method",
        "",
        "One of the [methods](methods/index.md), with its options: `{kind: lora, rank: 16}`, or",
    ]
    lines += ["its bare name for its defaults. Without this key it is `full`.", *objective_sections()]
    return "\n".join([*lines, ""])


def objective_sections() -> list[str]:
    """What a job may learn: of each objective its equation and paper, the rows that it reads, and its options."""
    lines = [
        "",
        "## objective",
        "",
        "What is learned from the rows: `{kind: dpo, beta: 0.1}`, or its bare name for its",
    ]
    lines += [
        "its defaults. Without this key it is `sft`. [Data](data.md) has the shapes of rows that each one reads."
    ]
    for kind, options in OBJECTIVES.items():
        lines += ["", f"### {kind}", "", *paragraphs(options.__doc__), ""]
        lines += [*paragraphs(docstring_of(options.implementation)), "", f"It reads {READ[options.rows]}."]
        if options.rate_factor != 1:
            lines += [f"Its default learning rate is {options.rate_factor:g} times that of the method."]
        if options.needs:
            lines += [f"It needs {options.needs}."]
        if options.model_fields.keys() - {"kind"}:
            lines += ["", *options_table(options.model_fields)]
    return lines


def clusters_page() -> str:
    """Every key of the clusters file, by kind of cluster, from the models that check it."""
    lines = ["# The clusters file", "", "Every key, made from the models that check it. Unknown keys are errors."]
    lines += ["[Clusters](clusters.md) says where the file is, and has examples.", ""]
    lines += ["## Clusters of all kinds", "", *options_table(ClusterConfig.model_fields)]
    lines += part_sections(ClusterConfig.model_fields)
    for config in (LocalConfig, SlurmConfig, KubernetesConfig):
        own = {name: field for name, field in config.model_fields.items() if is_own(config, name)}
        kind = get_args(config.model_fields["kind"].annotation)[0]
        lines += ["", f"## kind: {kind}", "", *paragraphs(config.__doc__), ""]
        lines += options_table(own) if own else ["It has no keys of its own."]
        lines += part_sections(own)
    return "\n".join([*lines, ""])


def part_sections(fields: dict[str, FieldInfo]) -> list[str]:
    """A section for each key that has, or may have, keys of its own."""
    lines = []
    for name, field in fields.items():
        for choice in (field.annotation, *get_args(field.annotation)):
            if is_model(choice):
                lines += ["", f"### {name}", "", *paragraphs(choice.__doc__), "", *options_table(choice.model_fields)]
    return lines


def is_own(config: type[ClusterConfig], name: str) -> bool:
    """Whether a kind of cluster adds a key, or says something else of it than all kinds do."""
    general = ClusterConfig.model_fields.get(name)
    field = config.model_fields[name]
    return name != "kind" and (general is None or general.description != field.description)


def part_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a key that has keys of its own; None for a plain value, and for method and objective."""
    annotation = field.annotation
    if is_model(annotation) and not issubclass(annotation, Options):
        return annotation
    return None


def is_model(annotation: Any) -> bool:
    """Whether a value of this type has keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def options_table(fields: dict[str, FieldInfo]) -> list[str]:
    """A table of keys: what they may be, their default, what they mean."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        if name not in ("method", "objective", "kind"):
            default = "required" if field.is_required() else f"`{shown_default(field)}`"
            lines.append(f"| `{name}` | {values(field)} | {default} | {escaped(field.description or '')} |")
    return lines


def shown_default(field: FieldInfo) -> str:
    """A default as YAML has it."""
    default: Any = field.default
    if isinstance(default, BaseModel):
        return "{}"
    return json.dumps(list(default) if isinstance(default, tuple) else default)


def values(field: FieldInfo) -> str:
    """What a key may be, in words, with its bounds where it is a number."""
    types = described(field.annotation)
    return ", ".join([types, *bounds(field.metadata)]).replace("|", r"\|")


def bounds(constraints: Iterable[object]) -> Iterator[str]:
    """The bounds of a number, from what annotated_types says of it."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for constraint in constraints:
        for attribute, word in words.items():
            if hasattr(constraint, attribute):
                bound = getattr(constraint, attribute)
                yield f"{word} {bound}" if isinstance(bound, int) else f"{word} {bound:g}"


def described(annotation: Any) -> str:
    """A type in words: the choices of a Literal, a number, a text, a list of them."""
    if hasattr(annotation, "__metadata__"):  # Annotated: what checks a value is not for readers
        return described(annotation.__origin__)
    if is_model(annotation):
        return "a mapping"
    if isinstance(annotation, type) and not get_args(annotation):
        names = {"str": "text", "int": "whole number", "float": "number", "bool": "true, false", "date": "date"}
        return names.get(annotation.__name__, "null" if annotation is type(None) else annotation.__name__)
    arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    if all(isinstance(argument, str | int) for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments)
    if getattr(annotation, "__origin__", None) is dict:
        return "a mapping"
    if getattr(annotation, "__origin__", None) is tuple:
        return f"a list of {described(arguments[0])}"
    choices = map(described, arguments)
    return ", ".join(dict.fromkeys(choices))


def methods_page() -> str:
    """All methods in one table, with what was seen to work."""
    lines = ["# Methods", "", "| method | what it is | trained | learning rate |", "|---|---|---|---|"]
    for method in methods():
        options = KINDS[method["kind"]]
        what = "the base's own weights" if options.makes_model else "an adapter"
        lines.append(
            f"| [`{method['kind']}`]({method['kind']}.md) | {method['summary']} | {what} | {options.default_lr:g} |"
        )
    lines += [
        "",
        "The learning rate is the default on a base of hidden size 2048. The page of a method says when to take it,",
        "partly by PEFT's method_comparison: Llama-3.2-3B tuned on MetaMathQA, asked GSM8K, one seed, and for each",
        "method a learning rate that was not searched for.",
        "",
        "## What was seen to work",
        "",
    ]
    lines += [f"| method | {' | '.join(CAPABILITIES)} | commit |", "|---" * (len(CAPABILITIES) + 2) + "|"]
    lines += [f"| `{m['kind']}` | {' | '.join(support(m))} | {m['support_commit']} |" for m in methods()]
    return "\n".join([*lines, ""])


def method_page(kind: str) -> str:
    """What a method does, its equation and paper, its options, and what was seen of it."""
    options = KINDS[kind]
    (method,) = methods(kind)
    lines = [f"# {kind}", "", *paragraphs(options.__doc__), "", f"    method: {{kind: {kind}}}", ""]
    lines += ["## What it does", "", *paragraphs(docstring_of(options.implementation))]
    if options.when_to_take:
        lines += ["", "## When to take it", "", *paragraphs(options.when_to_take)]
    lines += ["", "## Options", "", *options_table(options.model_fields)]
    lines += ["", "## What was seen", "", *seen(method), ""]
    for name, reason in options.refusals.items():
        lines.append(f"- Its {name} is refused: {reason}.")
    return "\n".join([*lines, ""])


def docstring_of(implementation: str) -> str | None:
    """The docstring of the module in `module:Class`, which is read and not imported."""
    module, _, _ = implementation.partition(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    return ast.get_docstring(tree)


def seen(method: dict[str, Any]) -> list[str]:
    """What the support matrix and the comparison on the tiny base say of a method."""
    lines = [f"At commit {method['support_commit']}:", ""]
    lines += [f"- {name}: {cell}" for name, cell in zip(CAPABILITIES, support(method), strict=True)]
    record = json.loads((ROOT / "benchmarks" / "results" / "methods-record.json").read_text())
    for figures in record["methods"]:
        if figures["method"] == method["kind"]:
            matches = figures["exact_match"]
            mean = sum(matches) / len(matches)
            lines += [
                "",
                f"On the tiny base (task `{record['task']}`, commit {record['commit']}, {len(matches)} seeds):",
            ]
            lines += [f"exact match {mean:.0%} with {figures['trained']:,} trained weights."]
    return lines


def paragraphs(docstring: str | None) -> list[str]:
    """A docstring as Markdown: what stands in it is plain text, and code where it is indented."""
    lines: list[str] = []
    for block in inspect.cleandoc(docstring or "").split("\n\n"):
        is_code = block.startswith("    ")
        lines += [*(block if is_code else escaped(block)).splitlines(), ""]
    return lines[:-1]


def escaped(text: str) -> str:
    """Plain text as Markdown that shows it, in a table too; what stands between backticks is code already."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"[*_|]", r"\\\g<0>", parts[index]).replace("<", "&lt;")
    return "`".join(parts)


def fleetune_page() -> str:
    """What `import fleetune` gives: its names come from other modules, where they are documented."""
    lines = ["# fleetune", "", *paragraphs(docstring_of("fleetune")), ""]
    for name, module in sorted(fleetune._WHERE.items()):
        lines += [f"::: {module}.{name}", *SHOWN_WITH_NAME, ""]
    return "\n".join(lines)


def api_page(package: str) -> str:
    """The public names of a package, module by module, from their docstrings."""
    lines = [f"# {package}", ""]
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.name.startswith("__") or not path.read_text().strip():
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts)
        lines += [f"## {module}", "", f"::: {module}", ""]
    return "\n".join(lines)
