"""Chat: answers of the base and of adapters to one prompt, from a terminal and from a pipe."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from orchestrator import render, side_by_side
from orchestrator.chat import ChatAnswer, ChatSettings, chat
from orchestrator.errors import InputError

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny"
COMMAND = [str(Path(sys.executable).with_name("fleetune")), "chat", "--base", str(TINY)]
QUESTION = "opposite of hot ->"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT has saved, and that changes what the base says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters") / "stirred"
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), config).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, folder / "adapter_model.safetensors")
    return folder


def test_prompts_come_from_a_pipe_and_answers_go_to_one(adapter: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--adapters", str(adapter), "--json"], input=f"{QUESTION}\n\n{QUESTION}\n", text=True,
        capture_output=True, check=True, timeout=240,
    )  # fmt: skip
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second  # an empty line begins anew
    assert first["prompt"] == QUESTION and first["answers"]["base"] == "cold"
    assert first["answers"].keys() == {"base", "stirred"} and first["answers"]["stirred"] != "cold"


def test_turns_go_on_from_what_each_has_said(adapter: Path) -> None:
    with chat([str(adapter)], base=str(TINY)) as talk:
        (first, _) = talk.ask(QUESTION)
        (second, _) = talk.ask(QUESTION)
        assert (first.text, first.label) == ("cold", "base")
        talk.begin_anew()
        assert talk.ask(QUESTION)[0] == first != second
        with pytest.raises(InputError, match="the prompt: request: found .* positions; allowed: at most"):
            talk.ask("pen " * 5000)
        assert talk.ask(QUESTION)[0].label == "base"
    with chat([], base=str(TINY), settings=ChatSettings(3, plain=True)) as talk:
        assert [answer.tokens for answer in talk.ask("copy dog cat horse bird fish ->")] == [3]


def test_what_is_wrong_is_said_before_anybody_is_asked(tmp_path: Path, adapter: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(InputError) as caught, chat([str(tmp_path / "one"), str(tmp_path / "two")], base=str(TINY)):
        raise AssertionError("nobody is asked")
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()] == [
        "found no weights; allowed: adapter_model.safetensors"
    ] * 2


@pytest.mark.parametrize("width", [80, 200])
def test_answers_stand_side_by_side(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render, "_console", lambda: Console(width=width, highlight=False))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    answers = [ChatAnswer("base", "cold " * 30, 30), ChatAnswer("[b]lora", "new [red]", 2)]
    side_by_side.show_answers(answers, typed=True, prompt=QUESTION)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    (head,) = [line for line in lines if "base" in line]
    assert "[b]lora" in head and any("cold" in line and "new [red]" in line for line in lines)


def test_a_person_types_behind_a_mark() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        os.write(ours, f"{QUESTION}\n".encode() + b"\x04")
        out, _ = child.communicate(timeout=240)
    os.close(ours)
    os.close(theirs)
    assert child.returncode == 0 and "base: cold" in out
