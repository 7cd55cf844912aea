"""What a user reads of methods and jobs: every key has a meaning, and every method says when to take it."""

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from methods.options import KINDS, Options
from runfolder.job import Job
from runfolder.objective import ObjectiveOptions
from runfolder.objectives import OBJECTIVES


def undescribed(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The keys of a model and of its parts that have neither a description nor keys of their own."""
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield from undescribed(part, f"{path}{name}.")
        elif name not in ("kind", "method", "objective") and not field.description:
            yield path + name


def test_every_key_of_a_job_is_described() -> None:
    assert list(undescribed(Job)) == []


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_option_of_an_objective_is_described(options: type[ObjectiveOptions]) -> None:
    assert list(undescribed(options)) == []


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_method_says_what_it_takes_and_when_to_take_it(options: type[Options]) -> None:
    assert list(undescribed(options)) == []
    sentences = options.when_to_take.split(". ")
    assert 2 <= len(sentences) <= 5
    assert "LoRA" in options.when_to_take or options.model_fields["kind"].default == "lora"
