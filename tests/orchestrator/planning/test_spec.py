"""job.yaml, overrides, and what is said about errors."""

from pathlib import Path

import pytest

from orchestrator.errors import InputError
from orchestrator.planning import spec

MINIMAL = {"base": "some/base", "data": "train.jsonl", "train": {"steps": 3}}


def refused(*overrides: str) -> list[str]:
    with pytest.raises(InputError) as error:
        spec.validate(MINIMAL, overrides, "job.yaml")
    return str(error.value).splitlines()


def in_file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "job.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_a_file(tmp_path: Path) -> None:
    path = in_file(tmp_path, "base: a/b\nmethod: {kind: dora, rank: 4}\ndata: x.jsonl\ntrain: {steps: 5, lr: 1e-4}\n")
    job = spec.read_job_file(path)
    assert (job.base.model, job.method.kind, job.data.train, job.lr) == ("a/b", "dora", "x.jsonl", 1e-4)


@pytest.mark.parametrize("number", ["3e-4", "3.0e-4", "0.0003", "3E-4", ".3e-3"])
def test_numbers_are_numbers_in_overrides(number: str) -> None:
    assert spec.validate(MINIMAL, [f"train.lr={number}"]).train.lr == 3e-4


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert spec.validate(MINIMAL, ["train.steps=1e3"]).train.steps == 1000


def test_overrides_reach_any_key_and_spell_out_short_forms() -> None:
    job = spec.validate(
        MINIMAL,
        ["method=lora", "method.target=[q_proj, v_proj]", "base.init=scratch", "train.epochs=2", "train.steps="],
    )
    assert job.method.model_dump()["target"] == ("q_proj", "v_proj")
    assert (job.base.model, job.base.init) == ("some/base", "scratch")
    assert (job.train.epochs, job.train.steps) == (2, None)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method=lorra", "job.yaml: method.kind: found 'lorra'; did you mean 'lora'? allowed: 'full', 'lora', "),
        ("train.lr=abc", "job.yaml: train.lr: found 'abc'; allowed: a valid number"),
        ("train.lr=.inf", "job.yaml: train.lr: found inf; allowed: a finite number"),
        ("train.step=3", "job.yaml: train.step: unknown key; did you mean 'steps'? allowed: steps, epochs, "),
        ("lr=3", "job.yaml: lr: unknown key; did you mean 'train.lr'? allowed: name, base, "),
        ("sharding.zero=4", "job.yaml: sharding.zero: found 4; allowed: 0, 1, 2 or 3"),
        ("checkpoint.every=often", "job.yaml: checkpoint.every: found 'often'; allowed: 'auto' or a valid integer"),
        ("train.precision=bf61", "job.yaml: train.precision: found 'bf61'; did you mean 'bf16'? allowed: 'auto', "),
        ("resources.walltime=8x", "job.yaml: resources.walltime: found '8x'; allowed: a valid integer (seconds, or "),
        ("name=Foo_", "job.yaml: name: found 'Foo_'; must be at most 32 characters"),
        ("name=null", "job.yaml: name: found null; allowed: a valid string"),
        ("train.epochs=1", "job.yaml: train: give either steps or epochs"),
        ("train.betas=[0.9]", "job.yaml: train.betas.1: missing"),
        ("method={rank: 3}", "job.yaml: method.kind: missing; allowed: 'full', "),
        ("method={kind: lora, target: [1, 2]}", "job.yaml: method.target: found [1, 2]; allowed: 'all-linear' or a "),
        ("train=3", "job.yaml: train: found 3; allowed: a mapping"),
        ("name", "--set name: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("name.x.y=3", "job.yaml: name: found {'x': {'y': 3}}; allowed: a valid string"),
        ("train.steps.x=3", "--set train.steps.x=3: train.steps is 3, not a mapping"),
        ("name=[a", "--set name=[a: line 1: expected ',' or ']'"),
        ("train={steps: &x 3, seed: *x}", "--set train={steps: &x 3, seed: *x}: line 1: found the alias *x"),
    ],
)
def test_one_clear_line(override: str, line: str) -> None:
    found = refused(override)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_every_error_is_told_at_once() -> None:
    lines = refused("method=lora", "method.rnk=3", "train.lr=-1", "sharding.zero=x")
    assert [line.split(": ")[1] for line in lines] == ["method.rnk", "train.lr", "sharding.zero"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "found nothing; allowed: a mapping"),
        ("- 1", "found list; allowed: a mapping"),
        ("name: a\nname: b", "line 2: the key 'name' stands there twice"),
        ("train:\n  lr: 1\n  lr: 2", "line 3: the key 'lr' stands there twice"),
        ("a: [", "line 1: "),
        ("\ta: 1", "line 1: "),
        ("? [1, 2]\n: 3", "line 1: found unhashable key"),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("a: 2024-99-99", "not YAML: month must be"),
        (b"\xff\xfe\x00", "not a text file (UTF-8)"),
        (b"a: \x00", "not YAML"),
        ("{" * 3000, "nested too deeply"),
        (f"a: &a [{'x, ' * 9}x]\nmethod: {{kind: *a}}", "line 2: found the alias *a; write its value out"),
        ("a: &a {b: 1}\ntrain:\n  <<: *a", "line 3: found the alias *a; write its value out"),
        ("#" * (spec.LARGEST + 1), f"a job.yaml has at most {spec.LARGEST}"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, content: str | bytes, problem: str) -> None:
    path = in_file(tmp_path, content)
    with pytest.raises(InputError) as error:
        spec.read_job_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_large_value_is_told_in_a_short_line() -> None:
    value: object = "word" * 1000
    for _ in range(4):
        value = [value] * 10
    for change in ({"method": {"kind": value}}, {"train": {"steps": 3, "precision": value}}, {"name": value}):
        with pytest.raises(InputError) as error:
            spec.validate({**MINIMAL, **change})
        (line,) = str(error.value).splitlines()
        assert "found [" in line
        assert len(line) < 600


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml: No such file"):
        spec.read_job_file(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        spec.read_job_file(tmp_path)
