"""The `restricted` level of the Pod Security Standards as rules (kubernetes.io/docs/concepts/security).

Each rule is a function of a pod's spec that says whether the pod keeps to it.
"""

from collections.abc import Callable
from typing import Any

PodSpec = dict[str, Any]
VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def containers(pod: PodSpec) -> list[dict[str, Any]]:
    """The containers of every kind."""
    kinds = ("containers", "initContainers", "ephemeralContainers")
    return [container for kind in kinds for container in pod.get(kind, [])]


def contexts(pod: PodSpec) -> list[dict[str, Any]]:
    """The security contexts of the pod and its containers."""
    return [part.get("securityContext", {}) for part in (pod, *containers(pod))]


def setting(pod: PodSpec, container: dict[str, Any], name: str) -> Any:
    """What holds for a container: its own setting, else the pod's."""
    own = container.get("securityContext", {})
    return own.get(name, pod.get("securityContext", {}).get(name))


def shares_no_namespace(pod: PodSpec) -> bool:
    return not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


def is_unprivileged(pod: PodSpec) -> bool:
    return not any(context.get("privileged") for context in contexts(pod))


def is_no_host_process(pod: PodSpec) -> bool:
    return not any(context.get("windowsOptions", {}).get("hostProcess") for context in contexts(pod))


def has_plain_volumes(pod: PodSpec) -> bool:
    return all(volume.keys() - {"name"} <= VOLUMES for volume in pod.get("volumes", []))


def takes_no_host_port(pod: PodSpec) -> bool:
    ports = [port for container in containers(pod) for port in container.get("ports", [])]
    return not any(port.get("hostPort") for port in ports)


def keeps_selinux(pod: PodSpec) -> bool:
    options = [context.get("seLinuxOptions", {}) for context in contexts(pod)]
    return all(
        option.get("type") in SELINUX_TYPES and not option.get("user") and not option.get("role")
        for option in options
    )


def keeps_apparmor(pod: PodSpec) -> bool:
    profiles = [context.get("appArmorProfile", {}).get("type", "RuntimeDefault") for context in contexts(pod)]
    return set(profiles) <= {"RuntimeDefault", "Localhost"}


def keeps_proc_mask(pod: PodSpec) -> bool:
    return all(context.get("procMount", "Default") == "Default" for context in contexts(pod))


def has_safe_sysctls(pod: PodSpec) -> bool:
    sysctls = pod.get("securityContext", {}).get("sysctls", [])
    return {sysctl["name"] for sysctl in sysctls} <= SYSCTLS


def gains_no_privilege(pod: PodSpec) -> bool:
    own = [container.get("securityContext", {}) for container in containers(pod)]
    return all(context.get("allowPrivilegeEscalation") is False for context in own)


def is_not_root(pod: PodSpec) -> bool:
    return all(setting(pod, container, "runAsNonRoot") is True for container in containers(pod))


def has_no_root_user(pod: PodSpec) -> bool:
    return not any(context.get("runAsUser") == 0 for context in contexts(pod))


def filters_system_calls(pod: PodSpec) -> bool:
    profiles = [setting(pod, container, "seccompProfile") or {} for container in containers(pod)]
    return all(profile.get("type") in ("RuntimeDefault", "Localhost") for profile in profiles)


def drops_capabilities(pod: PodSpec) -> bool:
    capabilities = [container.get("securityContext", {}).get("capabilities", {}) for container in containers(pod)]
    return all(
        "ALL" in each.get("drop", []) and set(each.get("add", [])) <= {"NET_BIND_SERVICE"} for each in capabilities
    )


RULES: tuple[Callable[[PodSpec], bool], ...] = (
    *(shares_no_namespace, is_unprivileged, is_no_host_process, has_plain_volumes, takes_no_host_port),
    *(keeps_selinux, keeps_apparmor, keeps_proc_mask, has_safe_sysctls, gains_no_privilege),
    *(is_not_root, has_no_root_user, filters_system_calls, drops_capabilities),
)


def broken_rules(pod: PodSpec) -> set[str]:
    """The names of the rules that a pod does not keep to."""
    return {rule.__name__ for rule in RULES if not rule(pod)}
