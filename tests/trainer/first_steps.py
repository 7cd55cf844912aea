"""Objectives on preferences whose first loss is known, and methods that they are tried with."""

from typing import Any

LN_2 = 0.6931471805599453
DPO = {"kind": "dpo", "beta": 0.1}
FIRST: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": (DPO, LN_2),
    "smoothed": (DPO | {"label_smoothing": 0.2}, LN_2),
    "per-token": (DPO | {"per_token": True}, LN_2),
    "ipo": (DPO | {"loss": "ipo"}, 25.0),
    "ipo-summed": (DPO | {"loss": "ipo", "beta": 0.5, "per_token": False}, 1.0),
    "hinge": (DPO | {"loss": "hinge"}, 1.0),
    "kto": ({"kind": "kto", "desirable": 1.5, "undesirable": 1.5}, 0.75),
    "reward": ({"kind": "reward"}, LN_2),
}
PISSA = {"kind": "lora", "rank": 4, "init": "pissa"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "dora", "rank": 4},
    "pissa": PISSA,
    "prefix": {"kind": "prefix", "tokens": 3},
    "galore": {"kind": "galore", "rank": 4},
}
