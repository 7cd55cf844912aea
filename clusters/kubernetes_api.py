"""The API of Kubernetes as runs need it, over the official client and the user's kubeconfig.

What the server says for good (`Rejected`) is told from what is worth another try: a lost connection, 429, 5xx,
and a 403 of what is not ready yet. Tries are repeated with pauses that grow; then nobody knows: Unreachable.
"""

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from clusters.base import Unreachable
from clusters.kubernetes_refusals import is_worth_a_try, message_of, wanted_pause

_TRIES = 5
_FIRST_PAUSE_S = 0.25  # it doubles with each try
_LONGEST_PAUSE_S = 8.0  # also of those that a server asks for
_LONGEST_TRIES_S = (
    40.0  # since the first one, until another one is begun: a server may take a request and say nothing
)
_API_CONNECT_S = 5.0
_ANSWER_OF_API_S = 30.0
_PAGE = 250  # objects of a list in one answer
JSON = {"Accept": "application/json", "Content-Type": "application/json"}
_PLURALS = {"RayJob": "rayjobs", "RayService": "rayservices"}  # by kind
_LIMITS = {"_request_timeout": (_API_CONNECT_S, _ANSWER_OF_API_S)}

ApiObject = dict[str, Any]
ApiCall = Callable[[], Any]


class Rejected(Unreachable):
    """A request that the server refuses for good, by its status and in its words; for a look, it is out of reach.

    `is_first`: no try before may have been taken without our knowing.
    """

    def __init__(self, status: int, message: str, is_first: bool) -> None:
        super().__init__(f"Kubernetes: {message}")
        self.status = status
        self.message = message
        self.is_first = is_first


@dataclass(frozen=True)
class KubernetesApi:
    """The objects of one namespace. Every method may raise Unreachable; all are safe to repeat."""

    context: str | None
    namespace: str
    _group: dict[str, str] = field(default_factory=lambda: {"group": "ray.io", "version": "v1"})

    def create(self, manifest: ApiObject, is_trial: bool = False) -> None:
        """Have an object of KubeRay's made; a trial changes nothing. Raises Rejected, also for a taken name (409)."""
        options = {"dry_run": "All"} if is_trial else {}
        self._ask(
            lambda: self._custom.create_namespaced_custom_object(
                **self._group,
                plural=_PLURALS[manifest["kind"]],
                namespace=self.namespace,
                body=manifest,
                field_validation="Strict",
                **options,
                **_LIMITS,
            )
        )

    def found(self, kind: str, name: str) -> ApiObject | None:
        """The object of a kind and a name; None where there is none."""
        plural = _PLURALS[kind]
        try:
            found: ApiObject = self._ask(
                lambda: self._custom.get_namespaced_custom_object(
                    **self._group, plural=plural, namespace=self.namespace, name=name, **_LIMITS
                )
            )
        except Rejected as rejected:
            if rejected.status != 404:
                raise
            return None
        return found

    def delete(self, found: ApiObject) -> None:
        """Remove an object of KubeRay's, which is no other one of its name; one that is gone is removed."""
        metadata = found["metadata"]
        plural = _PLURALS[found["kind"]]
        body = self._models.V1DeleteOptions(preconditions={"uid": metadata["uid"]}, propagation_policy="Background")
        try:
            self._ask(
                lambda: self._custom.delete_namespaced_custom_object(
                    **self._group,
                    plural=plural,
                    namespace=self.namespace,
                    name=metadata["name"],
                    body=body,
                    **_LIMITS,
                )
            )
        except Rejected as rejected:
            if rejected.status not in (404, 409):
                raise

    def listed(self, kind: str, selector: str) -> list[ApiObject]:
        """The objects of a kind of KubeRay's with these labels."""
        group = self._group["group"]
        version = self._group["version"]
        plural = _PLURALS[kind]
        path = f"/apis/{group}/{version}/namespaces/{self.namespace}/{plural}"
        found = self._all_pages(path, {"labelSelector": selector})
        return [{"kind": kind, **each} for each in found]  # a list need not say it of each

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: ApiObject | None = None,
        headers: Mapping[str, str] = JSON,
        tries: int = _TRIES,
    ) -> ApiObject:
        """What the server answers to any request by its path. Raises Rejected."""
        parameters = query or {}
        answer = partial(self._answer, method, path, parameters, body, headers)
        answered = self._ask(answer, tries)
        return _as_object(answered)

    def pods(self, selector: str, fields: str = "") -> list[ApiObject]:
        """The pods with these labels, and with these fields, where some are said."""
        query = {"labelSelector": selector}
        if fields:
            query["fieldSelector"] = fields
        return self._all_pages(f"/api/v1/namespaces/{self.namespace}/pods", query)

    def nodes(self) -> list[ApiObject]:
        """The nodes of the cluster."""
        return self._all_pages("/api/v1/nodes", {})

    def session(self, pod: str, command: Sequence[str]) -> Any:
        """A command in a pod, with all of its streams; what is printed there is for the caller to take."""
        core = self._models.CoreV1Api(self._client)  # which takes long to import, and nothing else needs
        from kubernetes.stream import stream

        return self._ask(
            lambda: stream(
                core.connect_get_namespaced_pod_exec,
                pod,
                self.namespace,
                command=[*command],
                stdin=True,
                stdout=True,
                stderr=True,
                tty=False,
                binary=True,
                _preload_content=False,
            )
        )

    @cached_property
    def _models(self) -> Any:
        try:
            import kubernetes.client
        except ImportError:
            raise Unreachable(
                "Kubernetes: its client is not installed here; install it: pip install 'fleetune[k8s]'"
            ) from None
        return kubernetes.client

    @cached_property
    def _client(self) -> Any:
        """A client by the user's kubeconfig, which tries nothing again by itself."""
        models = self._models
        from kubernetes import config
        from yaml import YAMLError

        path = os.environ.get("KUBECONFIG") or "~/.kube/config"  # as kubectl takes an empty one
        settings = models.Configuration()
        try:
            config.load_kube_config(path, self.context, client_configuration=settings)
        except (config.ConfigException, OSError, TypeError, ValueError, YAMLError) as error:
            words = " ".join(str(error).split())
            raise Unreachable(f"Kubernetes: kubeconfig: {words}") from None
        settings.retries = False
        return models.ApiClient(settings)

    @cached_property
    def _custom(self) -> Any:
        return self._models.CustomObjectsApi(self._client)

    def _answer(
        self, method: str, path: str, query: Mapping[str, str], body: ApiObject | None, headers: Mapping[str, str]
    ) -> Any:
        """The response to one try; raises the client's exception for what is no success."""
        client = self._client
        made = client.param_serialize(
            method,
            path,
            query_params=[*query.items()],
            header_params={**headers},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = client.call_api(*made, **_LIMITS)
        text = response.read().decode()
        if not 200 <= response.status <= 299:
            raise self._models.ApiException.from_response(http_resp=response, body=text, data=None)
        return response

    def _all_pages(self, path: str, query: Mapping[str, str]) -> list[ApiObject]:
        """All items of a list that comes in pages; from its beginning where it was too old to go on."""
        for number in range(_TRIES):
            if number:
                _rest(number, 0.0)
            try:
                return self._listed(path, query)
            except Rejected as rejected:
                if rejected.status != 410:
                    raise
                message = rejected.message
        raise Unreachable(f"Kubernetes: {message}")

    def _listed(self, path: str, query: Mapping[str, str]) -> list[ApiObject]:
        """The items of a list, page by page. Raises Rejected, by 410 where it is too old to go on."""
        items: list[ApiObject] = []
        page = {**query, "limit": str(_PAGE)}
        while True:
            answer = self.request("GET", path, page)
            items += answer["items"]
            token = answer["metadata"].get("continue")
            if not token:
                return items
            page["continue"] = token

    def _ask(self, call: ApiCall, tries: int = _TRIES) -> Any:
        """What the server answers, after some tries; raises Rejected for its refusal, Unreachable for none."""
        client = self._custom  # before what comes with it; raises Unreachable
        from urllib3.exceptions import HTTPError

        reason = ""
        is_first = True
        began = time.monotonic()
        for number in range(tries):
            if time.monotonic() - began > _LONGEST_TRIES_S:
                break
            try:
                return call()
            except self._models.ApiException as error:
                message = message_of(error.body, str(error.reason))
                if error.status == 401:
                    raise Unreachable(f"Kubernetes: {message}: log in again, as for kubectl") from None
                if not is_worth_a_try(error.status, message):
                    raise Rejected(error.status, message, is_first) from None
                reason = f"{error.status} {message}"
                pause_s = wanted_pause(error.headers)
                is_first = is_first and error.status == 429
            except (HTTPError, OSError) as error:
                reason = str(error).splitlines()[0]
                pause_s = 0.0
                is_first = False
            if number + 1 < tries:
                _rest(number, pause_s)
        raise Unreachable(f"Kubernetes: {client.api_client.configuration.host}: {reason}")


def _rest(number: int, pause_s: float) -> None:
    """Wait before the next try: longer each time, and not as long as others who wait."""
    spread = random.uniform(0.5, 1.5)
    backoff_s = _FIRST_PAUSE_S * 2.0**number * spread
    wanted_s = max(pause_s, backoff_s)
    time.sleep(min(_LONGEST_PAUSE_S, wanted_s))


def _as_object(answer: Any) -> ApiObject:
    """An answer as plain data, which it is already or is the text of."""
    if isinstance(answer, dict):
        return answer
    parsed: ApiObject = json.loads(answer.data)
    return parsed
