"""What came of a run, and what it reported on the way, as it is named, shown and judged."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.comparison.axis import EVERYTHING, Bounds


@dataclass(frozen=True)
class Measure:
    """A result: its name and heading, how it is shown, whether more is better (None: neither), and what it can be."""

    key: str
    title: str
    show: Callable[[float], str]
    more_is_better: bool | None = False
    bounds: Bounds = EVERYTHING

    @property
    def of_test_rows(self) -> bool:
        """Whether it is of rows by which nothing was chosen."""
        return self.key.startswith(OF_TEST_ROWS)

    @property
    def is_share_of_rows(self) -> bool:
        """Whether it is the share of rows with the right answer, whose differences are points."""
        return self.key.endswith(EXACT_MATCH)


OF_TEST_ROWS = "eval_test_"  # what measures of test rows begin with
EXACT_MATCH = "exact_match"  # what shares of right answers end with
_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_count(value: float) -> str:
    """A number of things with three digits: 950, 1.23 M, 8.03 B."""
    for unit_size, unit in _COUNT_UNITS:
        if abs(value) >= unit_size:
            return f"{value / unit_size:.3g} {unit}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """A number of bytes in binary units: 512 B, 3 MiB, 2.50 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def format_hours(hours: float) -> str:
    """Hours that are a forecast, with two digits: 45 s, 12 min, 3.1 h, 140 h."""
    if 3600 * hours < 1:
        return "under 1 s"
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.2g} h" if hours < 100 else f"{hours:,.0f} h"


def format_duration(value: float) -> str:
    """Seconds, as 4.2 s, 3 m 05 s or 2 h 10 m."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} m {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m"


def _decimals(value: float) -> str:
    if abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.3g}"


_OF_ALL = (0.0, 1.0)
MEASURES = (
    Measure("eval_test_exact_match", "test exact match", "{:.1%}".format, True, _OF_ALL),
    Measure("eval_test_accuracy", "test accuracy", "{:.1%}".format, True, _OF_ALL),
    Measure("eval_test_loss", "test loss", _decimals),
    Measure("eval_exact_match", "exact match", "{:.1%}".format, True, _OF_ALL),
    Measure("eval_accuracy", "accuracy", "{:.1%}".format, True, _OF_ALL),
    Measure("eval_loss", "eval loss", _decimals),
    Measure("loss", "loss", _decimals),
    Measure("best_loss", "best loss", _decimals),
    Measure("forgetting", "forgetting", "{:+.4f}".format),
    Measure("trained", "trained", format_count, None),
    Measure("peak_memory_bytes", "peak memory", format_bytes),
    Measure("train_s", "train time", format_duration),
    Measure("tokens_per_second", "tokens/s", format_count, True),
)


@dataclass(frozen=True)
class CurveKind:
    """Something that runs report at steps: its name and title, how it is shown, and what it can be."""

    key: str
    title: str
    show: Callable[[float], str] = "{:.4g}".format
    bounds: Bounds = EVERYTHING


CURVE_KINDS = (
    CurveKind("loss", "Training loss"),
    CurveKind("eval_loss", "Evaluation loss"),
    CurveKind("eval_exact_match", "Exact match", "{:.0%}".format, _OF_ALL),
    CurveKind("accuracy", "Accuracy in training", "{:.0%}".format, _OF_ALL),
    CurveKind("eval_accuracy", "Accuracy on held-out pairs", "{:.0%}".format, _OF_ALL),
    CurveKind("reward_margin", "Reward margin in training"),
    CurveKind("eval_reward_margin", "Reward margin of held-out pairs"),
    CurveKind("reward_chosen", "Reward of chosen answers"),
    CurveKind("reward_rejected", "Reward of rejected answers"),
    CurveKind("reward_desirable", "Reward of desirable answers"),
    CurveKind("reward_undesirable", "Reward of undesirable answers"),
    CurveKind("reward", "Reward"),
    CurveKind("eval_reward", "Reward on held-out prompts"),
    CurveKind("groups_without_signal", "Share of groups without signal", "{:.0%}".format, _OF_ALL),
    CurveKind("answer_tokens", "Tokens of answers"),
    CurveKind("answers_cut", "Share of answers without an end", "{:.0%}".format, _OF_ALL),
    CurveKind("kl", "KL to the reference"),
    CurveKind("divergence", "KL to the reference, a token"),
    CurveKind("labels_chosen", "Tokens of chosen answers"),
    CurveKind("labels_rejected", "Tokens of rejected answers"),
    CurveKind("eval_score_length_correlation", "Correlation of score and length", bounds=(-1.0, 1.0)),
)
