"""The job spec: plain frozen data that every package may read. Unknown keys are errors."""

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from methods.options import KINDS, AnyOptions
from methods.options.full import Full
from runfolder.objective_fit import check_base, check_method, check_sequence, check_stage
from runfolder.objectives import AnyObjective, RewardOptions, SftOptions
from runfolder.resources import Resources, Section, as_mapping
from runfolder.training import Checkpoint, Evaluation, Sharding, Train, may_be_whole
from runfolder.variables import Variables

JOB_NAME = re.compile(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?")


class Base(Section):
    """The model that is tuned. A bare text stands for `model` alone."""

    model: str = Field(min_length=1, description="a hub id, or a folder with config, tokenizer and safetensors")
    init: Literal["pretrained", "scratch"] = Field(
        "pretrained", description="its own weights, or random ones of its shape; scratch has no use in 4 bits"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; null: main")
    resize_embeddings: bool = Field(
        False, description="give the base an embedding for every id of its tokenizer, and train those that are new"
    )


class Data(Section):
    """Where the examples come from, and how they become sequences. A bare text stands for `train` alone."""

    train: str = Field(min_length=1, description="a file, cluster:/path, or a hub dataset owner/name:config:split")
    eval: str | None = Field(None, description="held-out rows, named like those of train; null: none are judged")
    retain: str | None = Field(
        None, description="text that is not trained on, in rows like those of train, whose loss should not rise"
    )
    columns: dict[str, str] | None = Field(
        None, min_length=1, description="which column, or template with {column}s, is the prompt, the completion, ..."
    )
    seq_len: int = Field(1024, ge=8, description="tokens of a row, and so of the longest example")
    too_long: Literal["drop", "cut", "refuse"] | None = Field(
        None, description="rows longer than seq_len; null: cut their end, but refuse when that hits more than a tenth"
    )
    parse_special: bool = Field(False, description="names of control tokens in the data are control tokens, not text")
    date: datetime.date | None = Field(
        None, description="what a chat template takes for today; null: the day of submission"
    )
    packing: bool = Field(
        True, description="several examples in a row of seq_len, which do not see each other; false: one and padding"
    )

    @property
    def sources(self) -> dict[str, str]:
        """What it has rows of, by field."""
        by_field = {"train": self.train}
        if self.eval:
            by_field["eval"] = self.eval
        if self.retain:
            by_field["retain"] = self.retain
        return by_field


class Output(Section):
    """What is left at the end: the adapter, or the model where a method trains the base itself."""

    merge: bool = Field(False, description="also leave a model with the adapter in its weights, in output/merged")


class Tracking(Section):
    """Where the metrics go: one MLflow run for each run of Fleetune."""

    uri: str | None = Field(None, description="MLflow's tracking URI; null: SQLite beside the runs")
    experiment: str = Field(
        "fleetune", min_length=1, description="name of the MLflow experiment, made if it is missing"
    )


class Job(Section):
    """One training run, as a user writes it in job.yaml."""

    name: str = Field(
        "job",
        description="what run ids begin with: at most 32 of a-z, 0-9 and -, from a letter on, not ending with -",
    )
    base: Annotated[Base, as_mapping("model")]
    objective: Annotated[AnyObjective, as_mapping("kind")] = SftOptions()
    method: Annotated[AnyOptions, as_mapping("kind")] = Full()
    data: Annotated[Data, as_mapping("train")]
    train: Train
    sharding: Sharding = Sharding()
    resources: Resources = Resources()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    tracking: Tracking = Tracking()
    env: Variables = Field(
        {},
        description="variables for controller and workers, like NCCL_DEBUG: INFO; secret ones are kept apart",
    )

    @field_validator("name")
    @classmethod
    def _dns_label(cls, name: str) -> str:
        if not JOB_NAME.fullmatch(name):
            raise ValueError(
                "must be at most 32 characters: a-z, 0-9 and -, starting with a letter, not ending with -"
            )
        return name

    @field_validator("output")
    @classmethod
    def _can_merge(cls, output: Output, info: ValidationInfo) -> Output:
        method = info.data.get("method")
        if not output.merge or not method:
            return output
        reason = method.refusals.get("merge")
        if reason is not None:
            raise ValueError(f"{method.kind} has no merged model: {reason}")
        return output

    @model_validator(mode="after")
    def _can_start(self) -> "Job":
        if self.base.init == "scratch" and self.method.quantises:
            raise ValueError(
                "base.init scratch with a base in 4 bits: random weights are not worth quantising; "
                "nearest: init: pretrained, or method full"
            )
        virtual = self.method.virtual_tokens
        if self.data.seq_len <= virtual:
            raise ValueError(f"data.seq_len {self.data.seq_len} has no room beside method.tokens {virtual}")
        return self

    @model_validator(mode="after")
    def _method_fits_objective(self) -> "Job":
        check_method(self.objective, self.method)
        check_base(self.objective, self.method, self.base.resize_embeddings)
        check_stage(self.objective, self.sharding.zero)
        return self

    @model_validator(mode="after")
    def _can_go_by_loss(self) -> "Job":
        if not self.evaluation.goes_by_loss:
            return self
        apart = {"evaluation.test": self.evaluation.test, "data.retain": self.data.retain}
        for key, found in apart.items():  # judged after the last step, which is then not what is kept
            if found:
                raise ValueError(f"{key} with evaluation.keep best or stop_after; allowed: one of both")
        if self.data.eval is None or self.evaluation.every is None:
            raise ValueError(
                "evaluation.keep best and evaluation.stop_after go by the held-out loss during training; "
                "allowed: with data.eval and evaluation.every"
            )
        return self

    @model_validator(mode="after")
    def _can_retain(self) -> "Job":
        if self.data.retain is None:
            return self
        if self.data.eval is None or not self.evaluation.before:
            raise ValueError(
                "data.retain, which is judged with the held-out rows before the first step and after the last one; "
                "allowed: with data.eval and evaluation.before"
            )
        if self.objective.kind != "sft":
            raise ValueError(f"data.retain with objective {self.objective.kind}; allowed: objective sft")
        return self

    @model_validator(mode="after")
    def _can_share_rows(self) -> "Job":
        sequence = self.sharding.sequence
        workers = self.resources.world_size
        where = ""
        if self.resources.is_elastic:  # with any number of nodes
            workers = self.resources.workers_on_node
            where = f" on each of nodes {self.resources.nodes}"
        if workers % sequence:
            among = "one worker" if workers == 1 else f"{workers} workers"
            raise ValueError(
                f"sharding.sequence {sequence} with {among}{where}; allowed: a divisor of that number, or 1"
            )
        check_sequence(self.objective, sequence)
        return self

    @model_validator(mode="after")
    def _can_offload(self) -> "Job":
        method = self.method
        reason = method.refusals.get("offload")
        if self.sharding.offloads and reason is not None:
            raise ValueError(f"sharding.offload optimizer with method {method.kind}: {reason}")
        return self

    @model_validator(mode="after")
    def _can_do_without_masters(self) -> "Job":
        if self.train.master_weights:
            return self
        needs = {
            "method": (self.method.kind, "full"),
            "sharding.zero": (self.sharding.zero, 0),
            "train.precision": (self.train.precision, "bf16"),
        }
        for key, (found, allowed) in needs.items():
            if found != allowed:
                raise ValueError(f"train.master_weights false with {key} {found}; allowed: {key} {allowed}")
        return self

    @model_validator(mode="after")
    def _trains_new_tokens(self) -> "Job":
        if not self.base.resize_embeddings:
            return self
        setting = f"base.resize_embeddings with method {self.method.kind}"
        if not self.method.trains_new_tokens:
            kinds = ", ".join(kind for kind, options in KINDS.items() if options.trains_new_tokens)
            raise ValueError(f"{setting}, which does not train new embeddings; allowed: one of {kinds}")
        if self.sharding.zero == 3 and not self.method.makes_model:
            raise ValueError(
                f"{setting} at sharding.zero 3, where no worker has the embedding whole, and its new rows alone are "
                "trained; allowed: sharding.zero 0, 1 or 2, or method full or galore"
            )
        return self

    @property
    def data_size(self) -> int:
        """How many workers, or groups of them that share rows, have rows of their own."""
        workers = self.resources.world_size
        return workers // self.sharding.sequence

    @property
    def is_fast_on_gpus(self) -> bool:
        """Whether `train.kernels: auto` is fast on GPUs: but for whole models at ZeRO 3, which were not measured."""
        shards_weights = self.sharding.zero == 3
        return not (shards_weights and self.method.makes_model)

    def keeps_trained_whole(self, trained: int, frozen: int) -> bool:
        """Whether at ZeRO 3 each worker has the trained weights whole, as the base, which is frozen, is shared alone.

        `trainer/zero/frozen.py` decides it: the base is shared as it is loaded, and no part of it is trained.
        """
        if self.base.init != "pretrained" or isinstance(self.objective, RewardOptions):
            return False
        return may_be_whole(trained, frozen)

    @property
    def lr(self) -> float:
        """The peak learning rate: the job's, or the default of method and objective."""
        if self.train.lr is not None:
            return self.train.lr
        return self._default_rate(None)

    def at_width(self, hidden: int | None) -> "Job":
        """The job with its learning rate settled, on a base of this hidden size."""
        if self.train.lr is not None:
            return self
        settled = {"lr": self._default_rate(hidden)}
        train = self.train.model_copy(update=settled)
        return self.model_copy(update={"train": train})

    def _default_rate(self, hidden: int | None) -> float:
        """The method's learning rate on a base of this hidden size, as the objective takes it."""
        rate = self.method.rate(hidden)
        return rate * self.objective.rate_factor

    @property
    def sources(self) -> dict[str, str]:
        """What it reads beside the base, by field."""
        by_field = {f"data.{field}": source for field, source in self.data.sources.items()}
        reward = self.objective.reward_file
        if reward:
            by_field["objective.reward"] = reward
        model = self.objective.reward_folder
        if model:
            by_field["objective.reward_model"] = model
        return by_field

    def dump(self) -> dict[str, Any]:
        """The job as plain data that `Job.model_validate` reads back."""
        return self.model_dump(mode="json")
