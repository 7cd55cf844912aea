"""Student's t: how many standard errors an interval reaches on each side to hold in 9 of 10 cases."""

NORMAL = 1.645
BY_FREEDOM = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)  # of 1, 2, ... degrees


def t_quantile(freedom: int) -> float:
    """The 95 % quantile of Student's t with so many degrees of freedom, at least 1."""
    if freedom <= len(BY_FREEDOM):
        return BY_FREEDOM[freedom - 1]
    return NORMAL * (1 + 1 / freedom)  # a little more than it is
