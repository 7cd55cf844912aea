"""A reward model gives texts their scores, for evaluations:

    python -m trainer.score_answers < request.json

The request is one of `serving.evaluate` with `reward`, the folder of what objective `reward` has left, and without
adapters; each question has one text. So are the answers: the score is in the place of a log-likelihood.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runfolder.digests import folder_digest
from serving.evaluate import AnswerSheet, Candidate, base_key, sheets_of, versions_of
from serving.kept import KeptAnswer
from serving.question import AskedTask, Question
from serving.starting import RequestData, base_dtype, say

BATCH_TOKENS = 8192  # of a padded batch
_HEAD = "score"


def main(request: RequestData) -> int:
    """Score what has no score yet, and print where all scores are; gives the exit code."""
    tasks = list(map(AskedTask.load, request["tasks"]))
    reward = Path(request["reward"])
    digest = folder_digest(reward, scratch=False)
    candidate = Candidate(reward.name, reward, digest)
    head = versions_of(request["base_digest"])
    place = Path(request["out"]) / base_key(head)
    sheets = sheets_of(place, tasks, [candidate])
    began = time.monotonic()
    total = 0
    for sheet in sheets:
        missing = sheet.missing
        total += len(missing)
        if missing:
            _score(request, sheet, missing, head)
        path = str(sheet.file.path)
        say(file=path, task=sheet.task.name, adapter=candidate.name, digest=digest, change=None)
    seconds = time.monotonic() - began
    say(answered=total, seconds=seconds)
    return 0


def _score(request: RequestData, sheet: AnswerSheet, missing: Sequence[Question], head: RequestData) -> None:
    """Score the missing questions of a sheet, and write each batch down."""
    say(done=0, total=len(missing))  # loading may take a while
    model = load_reward_model(request["base"], request["revision"], Path(request["reward"]))
    if not sheet.file.head:
        sheet.file.begin({**head, "task": sheet.task.name, "adapter": sheet.candidate.digest})
    done = 0
    for batch in batches(missing):
        answers = scored(model, batch)
        sheet.file.add(answers)
        done += len(batch)
        say(done=done, total=len(missing))


def load_reward_model(base: str, revision: str | None, folder: Path) -> Any:
    """A reward model as transformers and PEFT load it, on the GPU if there is one; its head computes in fp32."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    place = base
    if not is_adapter:
        place = str(folder)
        revision = None
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        place, revision=revision or "main", config=config, dtype=base_dtype(), use_safetensors=True
    )
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == _HEAD:
            module.float()
            module.register_forward_pre_hook(_in_fp32)
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    return model.to(device).eval()


def _in_fp32(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Hidden states as the head takes them: two scores in bf16 would often be the same."""
    (hidden,) = inputs
    return (hidden.float(),)


def batches(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """The questions in batches that need little padding."""
    batch: list[Question] = []
    for question in sorted(questions, key=text_length):
        longest = text_length(question)
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def text_length(question: Question) -> int:
    """The tokens of a question's text."""
    (text,) = question.texts
    return len(text.ids)


def scored(model: Any, batch: Sequence[Question]) -> list[KeptAnswer]:
    """The scores of a padded batch; a text that has no room has none."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    fitting = []
    answers = []
    for question in batch:
        if positions and text_length(question) > positions:
            nothing = KeptAnswer(question.key, log_likelihoods=(0.0,), without_room=True)
            answers.append(nothing)
        else:
            fitting.append(question)
    if not fitting:
        return answers
    values = padded_scores(model, fitting)
    for question, value in zip(fitting, values, strict=True):
        answer = KeptAnswer(question.key, log_likelihoods=(value,))
        answers.append(answer)
    return answers


def padded_scores(model: Any, questions: Sequence[Question]) -> list[float]:
    """The score of each question's text."""
    longest = max(map(text_length, questions))
    shape = (len(questions), longest)
    ids_BT = torch.full(shape, model.config.pad_token_id)
    mask_BT = torch.zeros(shape, dtype=torch.long)
    for row, question in enumerate(questions):
        (text,) = question.texts
        length = len(text.ids)
        ids_BT[row, :length] = torch.tensor(text.ids)
        mask_BT[row, :length] = 1
    device = model.device
    with torch.no_grad():
        output = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device))
    scores_B = output.logits[:, 0].float()
    scores: list[float] = scores_B.tolist()
    return scores


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        sys.exit(main(json.load(sys.stdin)))
