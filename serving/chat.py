"""`python -m serving.chat`: an engine that answers prompts as they come, each adapter its own.

The first line on stdin is the request {base, revision, adapters: [{name, folder}]}, each further one a turn
{prompts: [{adapter, ids}], stop, new_tokens, temperature, seed}. The answers are lines of JSON: {problem} for each
thing that is wrong with the request (and that is all), else {ready: true}, and for each turn
{answers: [{text, tokens}]}, or {refused} where it can never be answered.
"""

import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any

from serving.error import RequestRefused
from serving.sequence import Request
from serving.sizes import sizes_of_chat
from serving.starting import ReadyEngine, RequestData, ready_engine, say


def main(lines: Iterable[str]) -> int:
    """Answer turns until there are no more; gives the exit code."""
    lines = iter(lines)
    request = json.loads(next(lines))
    engine = ready_engine(request, sizes_of_chat)
    if isinstance(engine, list):
        for problem in engine:
            say(problem=problem)
        return 2
    say(ready=True)
    for line in lines:
        turn = json.loads(line)
        try:
            answers = answers_to(turn, engine)
        except RequestRefused as error:
            say(refused=str(error))
        else:
            say(answers=answers)
    return 0


def answers_to(turn: RequestData, ready: ReadyEngine) -> list[dict[str, Any]]:
    """What each of those that are asked writes; an answer gets as many tokens as there are positions left for it."""
    engine = ready.engine
    stop = tuple(turn["stop"])
    requests: list[Request] = []
    for prompt in turn["prompts"]:
        adapter = prompt["adapter"]
        virtual = 0
        if adapter is not None:
            virtual = engine.pool.packed_of(adapter).adapter.virtual
        ids = tuple(prompt["ids"])
        room = engine.positions - virtual - len(ids)
        new_tokens = min(turn["new_tokens"], room)
        request = Request(
            ids,
            adapter,
            new_tokens=max(1, new_tokens),
            stop=stop,
            temperature=turn["temperature"],
            seed=turn["seed"],
        )
        requests.append(request)
    answers: list[dict[str, Any]] = []
    for ids_of_answer in engine.generate(requests):
        tokens = len(ids_of_answer)
        if ids_of_answer[-1] in stop:
            ids_of_answer.pop()
        text = ready.decode(ids_of_answer)
        answers.append({"text": text, "tokens": tokens})
    return answers


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        sys.exit(main(sys.stdin))
