"""A far side that works long on an answer says so, and one that is stuck does not."""

import io
import sys
import time
from dataclasses import dataclass

import pytest
from another_home import far_cluster

from clusters import answer
from clusters.base import Unreachable
from clusters.remote import far_side
from clusters.remote.far_side import AT_WORK, READY
from clusters.remote.link import ThisHost

ANSWERS = """
import sys, time
print("a login shell's words")
print({ready!r}, flush=True)
for line in sys.stdin:
    if "verb" not in line:
        continue
    for _ in range({signs}):
        time.sleep(0.2)
        print({at_work!r}, flush=True)
    time.sleep({silent_s})
    print('{{"answer": 7}}', flush=True)
"""


@dataclass(frozen=True)
class Slow(ThisHost):
    """A link whose far side takes long for an answer."""

    signs: int
    silent_s: float

    def process(self, command: object) -> list[str]:  # noqa: ARG002
        """A process that answers as the far side would."""
        text = ANSWERS.format(ready=READY, at_work=AT_WORK, signs=self.signs, silent_s=self.silent_s)
        return [sys.executable, "-c", text]


def ask(link: ThisHost) -> object:
    cluster = far_cluster("slow", link, root=far_side.os.devnull)  # type: ignore[arg-type]
    try:
        return cluster.far_side.ask({"verb": "digest"}, timeout_s=1.0)
    finally:
        cluster.far_side.close()


def test_an_answer_may_take_as_long_as_there_are_signs_of_work() -> None:
    assert ask(Slow(signs=8, silent_s=0.0)) == 7


def test_an_answer_without_signs_is_given_up() -> None:
    with pytest.raises(Unreachable, match="no answer within 1 s"):
        ask(Slow(signs=1, silent_s=60.0))


def test_signs_come_of_work_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "_SIGN_S", 0.05)
    monkeypatch.setattr(answer, "_WORK_S", 0.01)
    answers = io.StringIO()
    with answer._signs_of_work(answers):
        time.sleep(0.5)  # as where a file system does not answer
    assert answers.getvalue() == ""
    with answer._signs_of_work(answers):
        while not answers.getvalue():
            sum(range(100_000))
    assert answers.getvalue().startswith(f"{AT_WORK}\n")
