"""A trained reward model as the reward: on the trainer's own base where it is an adapter of it, else beside it.

It is what a run of objective `reward` leaves (reward_output.py). A score is linear, in fp32, in the last layer's
output behind the last token of an answer.

Shapes: N samples, D width.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from methods.base import Tensors
from runfolder.digests import is_same_base
from runfolder.files import read_json, write_json
from serving.base import FrozenBase
from serving.engine import Engine
from serving.pool import packed_adapter
from serving.sequence import Request
from trainer.objectives.score_head import SCORE_WEIGHT
from trainer.reward_journal import RewardJournal
from trainer.rewards import Reward, RewardSample

DESCRIBED, FACTORS = "adapter_config.json", "adapter_model.safetensors"  # of an adapter's folder
JUDGE = "judge"  # the adapter's name in the engine
TEXTS_AT_ONCE = 16  # texts that a model beside the trainer scores in a pass


def shares_base(folder: Path, base: str) -> bool:
    """Whether a reward model is an adapter of this base: by its id, or by the content of its folder."""
    config = folder / DESCRIBED
    if not config.exists():
        return False
    described = read_json(config)
    named = str(described["base_model_name_or_path"])
    return is_same_base(named, base)


def bytes_of_judge(folder: Path, base: FrozenBase) -> int:
    """The memory that a reward model takes which is an adapter of this base; raises AdapterRefused."""
    with tempfile.TemporaryDirectory() as scratch:
        without_head = Path(scratch) / "adapter"
        split_head(folder, without_head)
        packed = packed_adapter(without_head, base)
    return packed.block.nbytes


class AdapterJudge:
    """A reward model that is an adapter of the trainer's own base, which the engine computes like any other."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
    ) -> None:
        """Load it; raises AdapterRefused where the engine cannot compute it."""
        self._engine = engine
        with tempfile.TemporaryDirectory() as scratch:
            without_head = Path(scratch) / "adapter"
            self._head = split_head(folder, without_head)
            engine.load(JUDGE, without_head)

    def judge(
        self,
        samples: Sequence[RewardSample],
        journal: RewardJournal,  # noqa: ARG002
    ) -> list[float]:
        """The score of each sample."""
        requests = [
            Request(
                tuple(sample.ids),
                JUDGE,
                1,
            )
            for sample in samples
        ]
        outputs = self._engine.outputs(requests)
        output_ND = torch.stack(outputs).float()
        head_1D = self._head.to(output_ND.device)
        score_N1 = linear(output_ND, head_1D)
        scores: list[float] = score_N1.flatten().tolist()
        return scores


class WholeModelJudge:
    """A reward model of another base, or a whole one: it lies beside the trainer's, and reads texts."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = loaded_judge(folder, dtype)
        model.to(device)
        self._model = model.eval()
        self._device = device

    def judge(
        self,
        samples: Sequence[RewardSample],
        journal: RewardJournal,  # noqa: ARG002
    ) -> list[float]:
        """The score of each sample; a text ends with the end token of the model's own tokenizer."""
        end = self._tokenizer.eos_token or ""
        texts = []
        for sample in samples:
            text = sample.prompt + sample.written + end
            texts.append(text)
        scores: list[float] = []
        count = len(texts)
        for first in range(
            0,
            count,
            TEXTS_AT_ONCE,
        ):
            stop = first + TEXTS_AT_ONCE
            part = texts[first:stop]
            batch = self._tokenizer(
                part,
                padding=True,
                return_tensors="pt",
            )
            on_device = batch.to(self._device)
            with torch.no_grad():
                found = self._model(**on_device)
            score_N1 = found.logits.float()
            scores += score_N1.flatten().tolist()
        return scores


def judge_of(
    folder: Path,
    is_adapter: bool,
    engine: Engine,
) -> Reward:
    """What scores by a reward model: on the base of an engine, of which it is an adapter, or beside it."""
    if is_adapter:
        return AdapterJudge(engine, folder)
    return WholeModelJudge(
        folder,
        engine.base.device,
        engine.base.dtype,
    )


def split_head(folder: Path, target: Path) -> Tensor:
    """Write an adapter without its head for scores to another folder; gives the head [1, D], fp32."""
    target.mkdir()
    weights: Tensors = load_file(folder / FACTORS)
    (name,) = filter(is_head, weights)
    head = weights.pop(name)
    save_file(
        weights,
        target / FACTORS,
        metadata={"format": "pt"},
    )
    described = read_json(folder / DESCRIBED)
    described["modules_to_save"] = None
    described["task_type"] = "CAUSAL_LM"
    write_json(target / DESCRIBED, described)
    config = folder / "config.json"
    if config.exists():
        shutil.copy(config, target)
    return head.float()


def is_head(name: str) -> bool:
    """Whether a weight of this name is a head for scores."""
    return name.endswith(SCORE_WEIGHT)


def loaded_judge(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder with its head, and with its adapter where it is one; code of its own is never run."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    place: Any = folder
    is_adapter = (folder / DESCRIBED).exists()
    if is_adapter:
        place = read_json(folder / DESCRIBED)["base_model_name_or_path"]
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        place, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    if is_adapter:
        model = PeftModel.from_pretrained(model, folder)
    judge: nn.Module = model
    return judge
