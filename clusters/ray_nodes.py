"""What Ray knows of its nodes, for a process that has joined it."""


def nodes_with_cores() -> int:
    """How many nodes are alive that have cores for workers."""
    return len(ids_with_cores())


def ids_with_cores() -> set[str]:
    """The ids of the nodes that are alive and have cores for workers; a head on Kubernetes has none."""
    import ray

    ids = set()
    for node in ray.nodes():
        cores = node["Resources"].get("CPU", 0)
        if node["Alive"] and cores > 0:
            ids.add(node["NodeID"])
    return ids
