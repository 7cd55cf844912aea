"""Commands that ask models: evaluation of many adapters in one pass, and a chat with them."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from orchestrator.commands.arguments import YesOption
from orchestrator.terminal.messages import Json, clear_count, count_answers, count_bytes, print_json, tell, warn

if TYPE_CHECKING:
    from orchestrator.chat import Conversations
    from orchestrator.evaluation.report import EvaluationReport
    from orchestrator.submit import Submission

evaluate_app = typer.Typer()

_SEVERAL = ("--adapters", "--tasks")  # options that take all values up to the next option

AdaptersOption = Annotated[
    list[str] | None,
    typer.Option("--adapters", metavar="RUN|DIR...", help="Runs, as status takes them, or folders of adapters."),
]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="BASE", help="A folder or hub id; without it, the base of the runs.")
]
RunsClusterOption = Annotated[
    str | None, typer.Option("--cluster", metavar="NAME", help="The cluster that has the runs.")
]


JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", metavar="JUDGE", help="Compares answers: base, a model, or the run of a reward model."),
]
AgainstOption = Annotated[
    str | None,
    typer.Option("--against", metavar="RUN|DIR", help="Whose answers are compared; without it, the base's."),
]
EvaluatingClusterOption = Annotated[
    str | None, typer.Option("--cluster", metavar="NAME", help="Evaluate there, as a job; without it, here.")
]
EvaluationSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the job on a cluster: resources.gpus_per_node=1."),
]


class SeveralValues(TyperCommand):
    """A command some of whose options take several values, as in `--tasks a.yaml b.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, each value under its option."""
        with_options = list(_each_with_its_option(args))
        return super().parse_args(ctx, with_options)


def _each_with_its_option(args: list[str]) -> Iterator[str]:
    """The arguments with the option that takes several values in front of each of them."""
    option = ""
    behind_option = False
    for argument in args:
        if argument.startswith("-"):
            option = argument if argument in _SEVERAL else ""
            behind_option = True
        elif option and not behind_option:
            yield option
        else:
            behind_option = False
        yield argument


@evaluate_app.command("evaluate", cls=SeveralValues)
def evaluate_command(
    tasks: Annotated[
        list[str],
        typer.Option("--tasks", metavar="TASK.YAML...", help="What is asked: files, or lm_eval:NAME of the harness."),
    ],
    adapters: AdaptersOption = None,
    base: BaseOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Rows of each task.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where answers are kept and found again.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write all answers to this file, to look through.")
    ] = None,
    judge: JudgeOption = None,
    against: AgainstOption = None,
    cluster: EvaluatingClusterOption = None,
    sets: EvaluationSetOption = None,
    yes: YesOption = False,
    as_json: Json = False,
) -> None:
    """Evaluate adapters and their base on tasks, all in one pass; what was answered before is not asked again."""
    from orchestrator.evaluation.evaluate import evaluate

    ask = partial(
        evaluate,
        adapters or (),
        tasks,
        base=base,
        limit=limit,
        out=out,
        cluster=cluster,
        overrides=sets or (),
        judge=judge,
        against=against,
        progress=count_answers,
        sent=count_bytes,
        announce=_tell_submission,
    )
    evaluation = _with_environment(ask, yes)
    _show_evaluation(evaluation, html, as_json)


def _with_environment(ask: "Callable[[], EvaluationReport]", yes: bool) -> "EvaluationReport":
    """What comes of an evaluation, before which the packages of its cluster are installed where it has none."""
    from clusters.remote.machine import EnvironmentMissing

    try:
        return ask()
    except EnvironmentMissing as missing:
        from orchestrator.cluster_setup import make_environment

        make_environment(missing, yes)
        return ask()


def _show_evaluation(evaluation: "EvaluationReport", html: Path | None, as_json: bool) -> None:
    """Write the answers into a file, and print what was found."""
    clear_count()
    for warning in evaluation.warnings:
        warn(warning)
    if html:
        from orchestrator.evaluation.page import write_page

        write_page(evaluation, html)
        print(f"the answers are in {html}", file=sys.stderr)
    if as_json:
        return print_json(evaluation.to_json())
    from orchestrator.evaluation.table import evaluation_table
    from orchestrator.terminal.render import output_width, print_markup

    return print_markup(evaluation_table(evaluation, output_width()))


def _tell_submission(submission: "Submission") -> None:
    """Say which run evaluates on a cluster."""
    clear_count()
    run_id = submission.run_id
    tell(f"{run_id} evaluates on cluster {submission.cluster}; the same command again waits for it, or goes on")


@evaluate_app.command("chat", cls=SeveralValues)
def chat_command(
    adapters: AdaptersOption = None,
    base: BaseOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="What draws come from.")] = 0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Send prompts as they are, without the chat template.")
    ] = False,
    cluster: RunsClusterOption = None,
    as_json: Json = False,
) -> None:
    """Ask the base and adapters, one line a prompt; their answers stand side by side. An empty line begins anew."""
    from orchestrator.chat import ChatSettings, chat

    settings = ChatSettings(max_new_tokens, temperature, seed, plain)
    with chat(adapters or (), base=base, settings=settings, cluster=cluster) as conversations:
        for prompt in _prompts():
            if prompt.strip():
                _ask_prompt(conversations, prompt, as_json)
            else:
                conversations.begin_anew()


def _prompts() -> Iterator[str]:
    """The lines of standard input; where a person types them, behind a mark, until Ctrl-D."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  (what is typed can be edited, and found again)

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _ask_prompt(conversations: "Conversations", prompt: str, as_json: bool) -> None:
    """Ask one prompt and show the answers; what cannot be asked is said, and the next prompt may be."""
    from orchestrator.errors import InputError

    try:
        answers = conversations.ask(prompt)
    except InputError as error:
        return tell(str(error))
    if as_json:
        by_label = {answer.label: answer.text for answer in answers}
        return print(json.dumps({"prompt": prompt, "answers": by_label}), flush=True)
    from orchestrator.terminal.side_by_side import show_answers

    return show_answers(answers, typed=sys.stdin.isatty(), prompt=prompt)
