"""What Kubernetes takes for names, labels, images and taints, checked where the clusters file is read.

The rules are those of the API server (k8s.io/apimachinery, `validation.go`; images: the grammar of
distribution/reference). A value that passes here stands in a manifest as it is.
"""

import re
import reprlib
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_OBJECT = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_LONGEST_OBJECT = 253
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_VALUE = re.compile(rf"({_WORD})?")
_KEY_NAME = re.compile(_WORD)
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_PATH_IN_POD = re.compile(r"(/[\w.@+-]{1,128}){1,16}", re.ASCII)
_HOST = r"[A-Za-z0-9]([-A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}")
_REPOSITORY = re.compile(
    rf"({_HOST}(\.{_HOST})*(:\d{{1,5}})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][\w.-]{0,127})?",
    re.ASCII,
)
_LONGEST_IMAGE = 400
_OF_THE_IMAGE = re.compile(
    r"/(s?bin|boot|dev|etc|lib(64)?|opt/fleetune|proc|sys|usr)(/.*)?|/(home|opt|root|run|tmp|var)"
)


class Taint(NamedTuple):
    """A taint that pods tolerate. Without `value` any, without `effect` every effect of that key."""

    key: str
    value: str | None
    effect: str | None


def parse_taint(text: str) -> Taint:
    """The taint in `key`, `key:effect` or `key=value:effect`, as `kubectl taint` has it; raises ValueError."""
    before, colon, effect = text.partition(":")
    key, equals, value = before.partition("=")
    is_known = effect in _EFFECTS or not colon
    is_taint = _is_key(key) and _is_value(value)
    if not is_taint or not is_known:
        allowed = ", ".join(_EFFECTS)
        raise ValueError(f"a taint must be like `kubectl taint` has it, key=value:effect or key:effect; of {allowed}")
    given_value = value if equals else None
    return Taint(key, given_value, effect or None)


def parse_secret_key(text: str) -> tuple[str, str]:
    """The name of a Secret and the key in it, of `secret/key`; raises ValueError."""
    name, _, key = text.partition("/")
    if not is_object_name(name) or not re.fullmatch(r"[-\w.]{1,253}", key, re.ASCII):
        raise ValueError(
            f"found {reprlib.repr(text)}; allowed: like hf/token, the name of a Secret and the key in it"
        )
    return name, key


def is_object_name(name: str) -> bool:
    """Whether an object may have this name."""
    if len(name) > _LONGEST_OBJECT:
        return False
    return _OBJECT.fullmatch(name) is not None


def _object_name(name: str) -> str:
    if not is_object_name(name):
        raise ValueError("must be a name of Kubernetes: a-z, 0-9, - and . of at most 253 characters")
    return name


def _namespace_name(name: str) -> str:
    if not re.fullmatch(_LABEL, name):
        raise ValueError("must be a name of at most 63 characters: a-z, 0-9 and -, not - first or last")
    return name


def _label_key(key: str) -> str:
    if not _is_key(key):
        allowed = "a label like gpu or example.org/gpu, at most 63 letters, digits and - _ . behind the /"
        raise ValueError(f"found {reprlib.repr(key)}; allowed: {allowed}")
    return key


def _label_value(value: str) -> str:
    if not _is_value(value):
        allowed = "a label's value, at most 63 letters, digits and - _ . between letters or digits"
        raise ValueError(f"found {reprlib.repr(value)}; allowed: {allowed}")
    return value


def _resource_name(name: str) -> str:
    domain, slash, _ = name.partition("/")
    if not slash or not _is_key(name) or domain.endswith("kubernetes.io"):
        raise ValueError("must be a resource of a device plugin, like nvidia.com/gpu")
    return name


def _image(image: str) -> str:
    name, _, _ = image.partition("@")
    if len(image) > _LONGEST_IMAGE or not _REPOSITORY.fullmatch(name):
        raise ValueError("must be an image, like registry.example.org/team/fleetune, and its digest behind @sha256:")
    if not _DIGEST.fullmatch(image.removeprefix(name)):
        why = "what a tag names may change during a run"
        raise ValueError(f"must end with @sha256: and the 64 digits that docker push prints as digest: {why}")
    return image


def _path_in_pod(path: str) -> str:
    is_plain = not {".", ".."} & set(path.split("/"))
    if not is_plain or not _PATH_IN_POD.fullmatch(path):
        raise ValueError("must be an absolute path of letters, digits and _ . @ + -, as it is in the pod")
    return path


def _mount_path(path: str) -> str:
    if _OF_THE_IMAGE.fullmatch(_path_in_pod(path)):
        raise ValueError("would hide what the image has there; allowed: another place, like /fleetune")
    return path


def _is_key(key: str) -> bool:
    domain, slash, name = key.rpartition("/")
    if slash and not is_object_name(domain):
        return False
    return _KEY_NAME.fullmatch(name) is not None


def _is_value(value: str) -> bool:
    return bool(_VALUE.fullmatch(value))


def _taint(text: str) -> str:
    parse_taint(text)
    return text


def _secret_key(text: str) -> str:
    parse_secret_key(text)
    return text


ObjectName = Annotated[str, AfterValidator(_object_name)]
NamespaceName = Annotated[str, AfterValidator(_namespace_name)]
QueueName = Annotated[str, AfterValidator(_object_name), AfterValidator(_label_value)]  # which is in a label, too
LabelKey = Annotated[str, AfterValidator(_label_key)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
ResourceName = Annotated[str, AfterValidator(_resource_name)]
ImageName = Annotated[str, AfterValidator(_image)]
PathInPod = Annotated[str, AfterValidator(_path_in_pod)]
MountPath = Annotated[str, AfterValidator(_mount_path)]
TaintText = Annotated[str, AfterValidator(_taint)]
SecretKeyText = Annotated[str, AfterValidator(_secret_key)]
