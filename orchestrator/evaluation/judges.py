"""Who judges: the base itself, another model, or a reward model."""

import sys
from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.evaluation.adapters import AdapterSource, resolve_adapters
from orchestrator.evaluation.judging import Judge, ModelJudge, RewardJudge
from orchestrator.evaluation.process import AllAnswers, EvaluationProgress, have_answered
from orchestrator.evaluation.questions import Preparation, PreparedTask
from orchestrator.evaluation.report import UNTUNED
from orchestrator.evaluation.request import base_tokenizer, evaluation_request
from runfolder.files import Record, read_json
from runfolder.job import Base

SCORER = [sys.executable, "-P", "-m", "trainer.score_answers"]
_JUDGE = "--judge"
_SCORES = "ForSequenceClassification"  # how the class of a model ends that scores
_ALLOWED = "allowed: base, a folder or hub id of a whole model, or the run or folder of a reward model"


def find_judge(name: str, base: Base, out: Path, progress: EvaluationProgress) -> Judge:
    """The judge that a name stands for, whose answers are kept in `out`; raises InputError."""
    if name == UNTUNED:
        return _model_judge(UNTUNED, base, out, progress)
    path = Path(name)
    if not path.is_dir() and "/" in name:
        return _model_judge(name, Base(model=name), out, progress)
    (source,) = resolve_adapters([name])
    config = _config_in(source.folder, "config.json")
    classes = config.get("architectures") or [""]
    adapted = _config_in(source.folder, "adapter_config.json")
    if classes[0].endswith(_SCORES):
        return _reward_judge(source, adapted, out, progress)
    if adapted or not config:
        raise InputError(f"{_JUDGE}: {name}: found an adapter that writes; {_ALLOWED}")
    return _model_judge(source.label, Base(model=str(source.folder)), out, progress)


def _model_judge(name: str, base: Base, out: Path, progress: EvaluationProgress) -> ModelJudge:
    """A model that reads answers and compares them."""
    tokenizer, ends = base_tokenizer(base, _JUDGE)

    def answer(prepared: PreparedTask) -> AllAnswers:
        request = evaluation_request(base, (), [prepared], out)
        return have_answered(request, progress)

    chats = tokenizer.chat_template is not None
    return ModelJudge(name, Preparation(tokenizer, ends), chats, answer)


def _reward_judge(source: AdapterSource, adapted: Record, out: Path, progress: EvaluationProgress) -> RewardJudge:
    """A reward model: a whole model, or an adapter on the base that it was trained on."""
    base = Base(model=str(source.folder))
    if adapted:
        plain = source.base or {"model": adapted["base_model_name_or_path"]}
        base = Base(model=plain["model"], revision=plain.get("revision"))
    tokenizer, ends = base_tokenizer(base, _JUDGE)

    def answer(prepared: PreparedTask) -> AllAnswers:
        request = evaluation_request(base, (), [prepared], out)
        request["reward"] = str(source.folder)
        return have_answered(request, progress, SCORER)

    return RewardJudge(source.label, Preparation(tokenizer, ends), answer)


def _config_in(folder: Path, name: str) -> Record:
    """A config of a folder; nothing where it has none."""
    path = folder / name
    if path.exists():
        return read_json(path)
    return {}
