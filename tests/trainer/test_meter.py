"""What a worker prints of a step."""

import pytest

from trainer.meter import as_clock


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "00:00:00"), (3661, "01:01:01"), (86_399.9, "23:59:59"), (30 * 3600, "30:00:00")]
)
def test_remaining_time_loses_no_day(seconds: float, text: str) -> None:
    assert as_clock(seconds) == text
