"""Chat: answers of the base and of adapters to one prompt, from a terminal and from a pipe."""

import io
import json
import os
import pty
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from orchestrator import cli
from orchestrator.chat import ChatAnswer, ChatSettings, chat
from orchestrator.commands import evaluate as evaluate_commands
from orchestrator.errors import InputError
from orchestrator.terminal import render, side_by_side

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny"
QUESTION = "opposite of hot ->"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, as PEFT writes it, that changes what the base says."""
    folder = tmp_path_factory.mktemp("adapters") / "stirred"
    folder.mkdir()
    kind = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(kind))
    config = json.loads((TINY / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(2, config["intermediate_size"], generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(config["hidden_size"], 2, generator=generator) / 4
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_prompts_come_from_a_pipe_and_answers_go_to_one(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chat", "--base", str(TINY), "--adapters", str(adapter), "--plain", "--max-new-tokens", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["fleetune", *command])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n{QUESTION}"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second  # an empty line begins anew
    assert first["prompt"] == QUESTION and first["answers"]["base"] == "cold"
    assert first["answers"].keys() == {"base", "stirred"} and first["answers"]["stirred"] != "cold"


def test_a_person_types_until_the_end_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, f"{QUESTION}\n\nand\n\x04".encode())
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert list(evaluate_commands._prompts()) == [QUESTION, "", "and"]
    os.close(ours)


def test_turns_go_on_from_what_each_has_said(adapter: Path) -> None:
    with chat([str(adapter)], base=str(TINY), settings=ChatSettings(3)) as talk:
        (first, _) = talk.ask(QUESTION)
        (second, _) = talk.ask(QUESTION)
        assert (first.text, first.label) == ("cold", "base")
        talk.begin_anew()
        assert talk.ask(QUESTION)[0] == first != second
        with pytest.raises(InputError, match="the prompt: request: found .* positions; allowed: at most"):
            talk.ask("pen " * 5000)
        assert max(answer.tokens for answer in talk.ask("copy dog cat horse bird fish ->")) == 3


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
    monkeypatch.setattr(render, "_console", lambda: Console(width=width, highlight=False, force_terminal=False))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    answers = [ChatAnswer("base", "cold " * 30, 30), ChatAnswer("[b]lora", "new [red]", 2)]
    side_by_side.show_answers(answers, typed=True, prompt=QUESTION)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    (head,) = [line for line in lines if "base" in line]
    assert "[b]lora" in head and any("cold" in line and "new [red]" in line for line in lines)
