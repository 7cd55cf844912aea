"""How long a run that pauses is cooled down before it is judged."""

COOLED = "eval_cooled_"  # what the metrics of such a judgement begin with
COOLED_LOSS = "eval_cooled_loss"


def cool_down_steps(share: float, step: int, steps: int) -> int:
    """The steps of the cool-down after a step: a share of those so far, one or more, and none beyond the last one."""
    if not share or step >= steps:
        return 0
    wanted = round(share * step)
    left = steps - step
    return min(left, max(1, wanted))
