"""What is told of the answers that a model writes in an evaluation: which are cut short, and some of them whole."""

from collections.abc import Iterable, Sequence

from trainer.data.tokens import EvaluationPrompt
from trainer.generation import PromptGroup, positions_left
from trainer.row_results import Answer
from trainer.run import Run


def tell_limits(run: Run, step: int, continued: Iterable[PromptGroup], asked: int, max_new_tokens: int) -> None:
    """Say of how many prompts that were asked the base's positions leave too little, or nothing."""
    fitting = short = 0
    for group in continued:
        count = len(group.prompts)
        fitting += count
        if group.new_tokens < max_new_tokens:
            short += count
    without = asked - fitting
    if without or short:
        positions = positions_left(run)
        run.attempt.event("prompts_limited", step=step, without_room=without, with_less_room=short)
        print(
            f"evaluation: of {asked} prompts {without} fill the base's {positions} positions and "
            f"count as not matched; {short} get fewer than {max_new_tokens} new tokens",
            flush=True,
        )


def show_samples(run: Run, step: int, answers: Iterable[Answer], prompts: Sequence[EvaluationPrompt]) -> None:
    """Keep what the model wrote for some prompts in the attempt's events."""
    tokenizer = run.tokenizer
    for answer in answers:
        prompt = prompts[answer.prompt]
        sample = {
            "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=True),
            "answer": prompt.answer,
            "written": answer.text,
        }
        run.attempt.event("sample", step=step, **sample)
