"""What the files of a run folder hold: at least these fields, with these types. Anything else in them is damage.

A file is checked where it is read (`files.read_json`, `appended.parse_lines`). So no reader asks whether a field is
there or what its type is, and all damage, whatever it looks like, is one kind of error: Damaged.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

WholeNumber = Annotated[int, Field(ge=0, le=1 << 53)]  # of bytes, steps or slots: what every reader of JSON can hold
UnixTime = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # seconds since 1970
FileShape = TypeAdapter[Any]


class _Fields(BaseModel):
    """Fields that must be there; others may be there too, as versions of one format add some."""

    model_config = ConfigDict(strict=True)


class _Submitted(_Fields):
    cluster: str | None = None
    submitted: UnixTime | None = None
    digests: dict[str, str | None] | None = None
    stage_of: str | None = None
    job: dict[str, Any]


class _Brief(_Fields):
    cluster: str | None
    submitted: UnixTime
    steps: WholeNumber | None
    stages: list[str] = []
    stage_of: str | None = None


class _StageNote(_Fields):
    run_id: str
    key: str
    reused: bool


class _Start(_Fields):
    attempt: WholeNumber
    step: WholeNumber


class _Result(_Fields):
    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None


class _Claim(_Fields):
    time: UnixTime
    host: str
    token: str


class _AttemptClaim(_Claim):
    kind: Literal["attempt"]
    start: _Start | None


class _CloseClaim(_Claim):
    kind: Literal["close"]
    closes: WholeNumber
    result: _Result


class _ReopenClaim(_Claim):
    kind: Literal["reopen"]


class _Verdict(_Fields):
    kind: str
    reason: str = ""
    evidence: str = ""


class _CancelRequest(_Fields):
    save: bool = False
    why: str | None = None


class _PauseRequest(_Fields):
    step: WholeNumber


class _StopRequest(_Fields):
    why: str
    reason: str
    by: UnixTime


class _MlflowRun(_Fields):
    mlflow_run_id: str
    uri: str


class _Undelivered(_Fields):
    lasting: bool
    reason: str
    mend: str


class _Delivered(_Fields):
    slot: WholeNumber
    mlflow_run_id: str | None = None


class _Hindrance(_Fields):
    slot: WholeNumber
    submission: WholeNumber
    starts: WholeNumber
    why: str


class _LatestStart(_Fields):
    slot: WholeNumber


class _Failure(_Fields):
    text: str
    types: list[str]
    preempted: bool


class _Outcome(_Fields):
    failures: dict[Annotated[str, Field(pattern=r"^-?\d{1,9}$")], _Failure]


class _Row(_Fields):
    step: Annotated[int, Field(ge=-(1 << 53), le=1 << 53)]  # of system.jsonl seconds, which a clock may turn back
    time: UnixTime


class _DataSummary(_Fields):
    unused: dict[str, WholeNumber] = {}


class _OtherEvent(_Fields):
    event: str
    time: UnixTime = 0.0


class _Plan(_OtherEvent):
    steps: WholeNumber | None = None
    data: _DataSummary | None = None


class _AfterStep(_OtherEvent):
    step: WholeNumber


class _Evaluating(_AfterStep):
    began: UnixTime
    what: str
    done: WholeNumber
    total: WholeNumber


class _ServingEvent(_OtherEvent):
    address: Annotated[str, Field(pattern=r"^http://[A-Za-z0-9.-]{1,253}:\d{1,5}$")]


class _Missing(_OtherEvent):
    what: str
    why: str


def _shape_of_event(record: Mapping[str, Any]) -> str:
    kind = record.get("event")
    if kind in ("stopped", "saving"):
        return "after step"
    return kind if kind in ("plan", "evaluating", "missing", "serving") else "other"


_Event = Annotated[
    Annotated[_Plan, Tag("plan")]
    | Annotated[_AfterStep, Tag("after step")]
    | Annotated[_Evaluating, Tag("evaluating")]
    | Annotated[_Missing, Tag("missing")]
    | Annotated[_ServingEvent, Tag("serving")]
    | Annotated[_OtherEvent, Tag("other")],
    Discriminator(_shape_of_event),
]


SUBMITTED: FileShape = TypeAdapter(_Submitted)  # job.yaml
BRIEF: FileShape = TypeAdapter(_Brief)  # run.json
STAGE_NOTE: FileShape = TypeAdapter(_StageNote)  # stages/NAME.json
CLAIM: FileShape = TypeAdapter(Annotated[_AttemptClaim | _CloseClaim | _ReopenClaim, Field(discriminator="kind")])
VERDICT: FileShape = TypeAdapter(_Verdict)
RESULT: FileShape = TypeAdapter(_Result)
SEALS: FileShape = TypeAdapter(dict[str, dict[str, WholeNumber]], config=ConfigDict(strict=True))
SECRET_VALUES: FileShape = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))
CANCEL: FileShape = TypeAdapter(_CancelRequest)  # requests/cancel-N.json
PAUSE: FileShape = TypeAdapter(_PauseRequest)  # requests/pause-N.json
STOP: FileShape = TypeAdapter(_StopRequest)
MLFLOW_RUN: FileShape = TypeAdapter(_MlflowRun)  # mlflow.json, mlflow/run.json
UNDELIVERED: FileShape = TypeAdapter(_Undelivered)
TRACKED: FileShape = TypeAdapter(_Delivered)  # tracked.json
HINDRANCE: FileShape = TypeAdapter(_Hindrance)  # hindered.json
LATEST_START: FileShape = TypeAdapter(_LatestStart)  # latest_start.json
OUTCOME: FileShape = TypeAdapter(_Outcome)
ROW: FileShape = TypeAdapter(_Row)  # a line of metrics.jsonl or system.jsonl
EVENT: FileShape = TypeAdapter(_Event)  # a line of events.jsonl


def flaw_of(record: Mapping[str, Any], shape: FileShape) -> str | None:
    """The first thing in a record that is not as its shape says, in one line; None where nothing is."""
    try:
        shape.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        return f"{field}: {first['msg']}" if field else str(first["msg"])
    return None
