"""1,000 adapters, 50 clients, adapters that come and go: no error, nothing wrong, and memory stays as it is."""

import asyncio
import os
from pathlib import Path

import pytest
from adapters import Exported
from load import Clients, loaded_server
from waiting import until

SOAK_S = float(os.environ.get("SOAK_SECONDS", "600"))
SHORT_S = 20.0  # with what comes before, half a minute


def resident_bytes() -> int:
    """Memory of this process, server and clients together."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def work(clients: Clients, seconds: float) -> None:
    """Let 50 clients and 3 that swap adapters work, and look at what they saw."""
    counts = asyncio.run(clients.run(50, 3, seconds))
    assert not counts.wrong, counts.wrong[:5]
    assert set(counts.statuses) == {200, 201}, counts.statuses
    assert counts.checked > 10 and counts.swaps >= 3
    until(lambda: clients.server.service.under_way == 0)
    until(lambda: not clients.server.service.answering.streams)
    print(f"{counts.statuses.total()} requests, {counts.checked} checked, {counts.swaps} swaps")


def test_many_clients_and_adapters_for_half_a_minute(
    tiny_base: Path, served: dict[str, Exported], tmp_path: Path
) -> None:
    with loaded_server(tiny_base, served["lora"].folder, tmp_path) as clients:
        work(clients, SHORT_S)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_clients_and_adapters_for_ten_minutes(
    tiny_base: Path, served: dict[str, Exported], tmp_path: Path
) -> None:
    with loaded_server(tiny_base, served["lora"].folder, tmp_path) as clients:
        work(clients, SOAK_S / 5)
        settled = resident_bytes()
        for part in range(4):
            work(clients, SOAK_S / 5)
            print(f"{part}: {resident_bytes():,} bytes, {settled:,} after the first part")
        assert resident_bytes() < 1.02 * settled
