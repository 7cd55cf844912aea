"""The RayService of a service, as KubeRay's operator takes it (ray.io/v1): a pure function, without a client.

The gateway and its engines are one application of Ray Serve, which KubeRay hands to the cluster and keeps healthy:
engines are on worker pods, each with a GPU where there are GPUs, and `NAME-serve-svc` is where clients reach it.
"""

from collections.abc import Mapping
from typing import Any

from k8s.planned import PlannedPods
from k8s.rayjob import DIGEST_ANNOTATION, LONGEST_NAME, Manifest, digest_of, ray_cluster
from k8s.settings import KubernetesSettings
from k8s.text import manifest_text

APPLICATION = "serving.gateway.ray_application:build"
PORT = 8000  # KubeRay's own of services


def rayservice(pods: PlannedPods, settings: KubernetesSettings, arguments: Mapping[str, Any]) -> Manifest:
    """The whole manifest; `arguments` are those of the application. Raises ValueError for a name that is too long."""
    if len(pods.name) > LONGEST_NAME:
        raise ValueError(f"found {pods.name!r}; allowed: at most {LONGEST_NAME} characters, which KubeRay starts")
    spec = {
        "serveConfigV2": manifest_text(serve_config(arguments)),
        "rayClusterConfig": ray_cluster(pods, settings),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": pods.name,
            "namespace": settings.namespace,
            "labels": pods.labels,
            "annotations": {DIGEST_ANNOTATION: digest_of(spec)},
        },
        "spec": spec,
    }


def serve_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray Serve is to run."""
    application = {
        "name": "fleetune",
        "import_path": APPLICATION,
        "route_prefix": "/",
        "args": dict(arguments),
    }
    return {"http_options": {"host": "0.0.0.0", "port": PORT}, "applications": [application]}
