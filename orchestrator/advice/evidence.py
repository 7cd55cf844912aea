"""Rules that evidence supports, each with its source and its strength, for a base, an amount of data and hardware."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Strength = Literal["strong", "medium", "weak", "folklore"]
TOKENS_FOR_FULL = 100_000_000  # of training, below which full fine-tuning has not been seen to win
_WITH_HIGH_RATES = ("ia3", "vera", "prefix", "prompt", "ptuning")
_MANY_SEQUENCES = 32  # of a batch
_TINKER = "482 public runs of Tinker's cookbook (tulu3, 35 bases, one seed)"
_PEFT = "PEFT's method_comparison (MetaMathQA to GSM8K, Llama-3.2-3B, one seed)"
_SCHULMAN = 'Schulman et al. 2025, "LoRA Without Regret"'
# Of rank 128 over rank 4, by the parameters of the base up to which that was seen: percent of test loss.
_GAINS_OF_RANK = ((2e9, 5.1), (5e9, 3.8), (12e9, 1.6), (math.inf, 0.7))
_PER_PAIR = 7.85  # (1.96 + 0.84) squared: 5 % on two sides, power 80 %
_DISAGREEMENT = 0.25  # share of the rows of which one model has the right answer, and the other not


@dataclass(frozen=True)
class Recommendation:
    """What to do about one question, how well that is supported, and by what."""

    question: str
    advice: str
    strength: Strength
    source: str

    def to_json(self) -> dict[str, str]:
        """The rule as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Situation:
    """What rules depend on; None for what is not known from here.

    `rates`: the default of each method on this base; `tokens`: of different text that the training sees; `sequences`:
    of a batch; `lora_fits`, `full_fits`: on the hardware, with `lora_change` of the job where it needs one.
    """

    rates: Mapping[str, float]
    parameters: int | None
    tokens: int | None
    sequences: float | None
    eval_rows: int | None
    lora_fits: bool | None
    lora_change: str | None
    qlora_fits: bool | None
    full_fits: bool | None


def rules_for(situation: Situation) -> list[Recommendation]:
    """The rules for a situation, those about the method first."""
    rules = [*_of_methods(situation), *_of_rates(situation), *_of_sizes(situation), *_of_judging(situation)]
    rules.append(
        Recommendation(
            "alpha, dropout, warm-up",
            "leave them: nothing was found that supports one value over another",
            "folklore",
            "none",
        )
    )
    return rules


def _of_methods(situation: Situation) -> Iterator[Recommendation]:
    """Which method to take."""
    yield Recommendation(
        "variants of LoRA",
        "expect no more than 1 to 2 % from dora, rslora, pissa and others once both rates are tuned",
        "medium",
        "arXiv 2602.04998 and 2602.09492 (nine variants)",
    )
    tokens = situation.tokens
    if tokens is not None and tokens < TOKENS_FOR_FULL:
        advice = f"take an adapter: {tokens:,} tokens of text are few for full, which was no better on so many"
    elif situation.full_fits is False:
        advice = "take an adapter, as full does not fit here: with much new text it would learn more, and forget more"
    else:
        advice = "try full beside lora: with much new text it learns more, and forgets more"
    yield Recommendation("full or an adapter", advice, "medium", f"Biderman et al. 2024, arXiv 2405.09673; {_PEFT}")
    if situation.lora_fits:
        change = f" with {situation.lora_change}" if situation.lora_change else ""
        advice = f"lora in 16 bits fits{change}: do not take qlora, which costs some accuracy and no less time"
    elif situation.qlora_fits is False:
        advice = "neither lora in 16 bits nor qlora fits here"
    else:
        advice = "lora in 16 bits does not fit here: take qlora, and compare it with the base in 16 bits"
    if situation.lora_fits is not None:
        yield Recommendation(
            "a base in 4 bits", advice, "weak", "arXiv 2404.14047; no comparison at equal tuning is known"
        )
    yield Recommendation(
        "which layers",
        "all linear ones; the MLP's before attention's where only some can be had",
        "strong",
        f"{_SCHULMAN}; arXiv 2405.09673; {_PEFT}",
    )


def _of_rates(situation: Situation) -> Iterator[Recommendation]:
    """Which learning rates to begin with."""
    rates = situation.rates
    rate = rates["lora"]
    low = 0.3 * rate
    high = 3 * rate
    tenth = rate / 10
    full_rate = rates["full"]
    ratios = [rates[kind] / rate for kind in _WITH_HIGH_RATES]
    times = f"{min(ratios):.0f} to {max(ratios):.0f} times LoRA's"
    yield Recommendation(
        "the rate of LoRA",
        f"start at {rate:.2g}, and try {low:.2g} and {high:.2g}: three times too far costs about 0.4 % of test loss",
        "strong",
        _TINKER,
    )
    yield Recommendation(
        "the rate of full",
        f"start at {full_rate:.2g}, and try {tenth:.2g}: a tenth of LoRA's was best in one careful study",
        "strong",
        _SCHULMAN,
    )
    yield Recommendation(
        "rates of prompt kinds, ia3 and vera",
        f"start at those of the table, {times}: at LoRA's rate they look far worse than they are",
        "strong",
        f"{_PEFT}: ia3 31 to 45 %, prefix 18 to 42 %, prompt 6 to 34 %",
    )


def _of_sizes(situation: Situation) -> Iterator[Recommendation]:
    """Which rank and which batch to take."""
    parameters = situation.parameters
    if parameters is not None:
        gain = next(gain for bound, gain in _GAINS_OF_RANK if parameters < bound)
        yield Recommendation(
            "the rank",
            f"raise it before you change the method: 128 over 4 took {gain:g} % off the test loss of such bases",
            "strong",
            f"{_TINKER}, some 100,000 chats",
        )
    sequences = situation.sequences
    if sequences is not None and sequences > _MANY_SEQUENCES:
        yield Recommendation(
            "the batch",
            f"try a smaller one: this has about {sequences:.0f} sequences, and LoRA suffers beyond {_MANY_SEQUENCES}",
            "medium",
            f"{_SCHULMAN}; arXiv 2602.09492 finds that it must be tuned",
        )


def _of_judging(situation: Situation) -> Iterator[Recommendation]:
    """What so many held-out rows can show."""
    rows = situation.eval_rows
    if not rows:
        yield Recommendation(
            "judging", "hold out rows (data.eval): nothing can be compared without", "strong", "arithmetic"
        )
        return
    points = 100 * smallest_visible(rows)
    yield Recommendation(
        "judging",
        f"{rows:,} held-out rows show differences of exact match from about {points:.1f} points on; more seeds do "
        "not help beyond that, the loss of each row does",
        "strong",
        "power of a paired test of two models that disagree on a quarter of the rows",
    )


def smallest_visible(rows: int) -> float:
    """The smallest difference between two shares of right answers that is seen in 80 of 100 cases on so many rows.

    n = 7.85 (d - D^2) / D^2 rows for a difference D between models that disagree on a share d of them.
    """
    variance = _PER_PAIR * _DISAGREEMENT
    return math.sqrt(variance / (rows + _PER_PAIR))
