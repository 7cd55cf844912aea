"""Which points are on a Pareto front."""

from orchestrator.comparison.chart import Point, Points


def pareto(points: Points, more_is_better: bool) -> list[bool]:
    """For each (cost, quality): whether no other point is at least as good in both and better in one."""
    sign = -1 if more_is_better else 1
    costs = []  # less is better in both
    for cost, quality in points:
        costs.append((cost, sign * quality))
    return [not _is_dominated(point, costs) for point in costs]


def _is_dominated(point: Point, others: Points) -> bool:
    """Whether another point is at most as high in both, and lower in one."""
    x, y = point
    for other in others:
        other_x, other_y = other
        is_at_most = other_x <= x and other_y <= y
        if is_at_most and other != point:
            return True
    return False
