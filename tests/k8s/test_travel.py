"""Files to the volume and back through the reader's pod, over a network that is cut in the middle."""

import random
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from api_server import Cluster, served, write_kubeconfig
from cut_proxy import CutProxy
from run_folders import make_run
from sampling import SEED

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters.base import Unreachable
from clusters.kubernetes import Kubernetes
from clusters.remote import site as remote_site
from clusters.remote.site import RemoteSite
from orchestrator.backends import open_cluster
from runfolder.chain import close

RUN_ID = "a-0123456789"
SIZE = 1_000_000
MESSAGE = 100_000


@pytest.fixture
def network(laptop: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CutProxy]:
    """The network between laptop and API server; messages are small."""
    assert laptop.exists()
    monkeypatch.setattr(remote_site, "_MESSAGE_BYTES", MESSAGE)
    with served(cluster) as address:
        proxy = CutProxy(urlsplit(address).port or 0)
        write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{proxy.port}", "client")
        yield proxy
        proxy.close()


def opened() -> Kubernetes:
    """The cluster, with its code there."""
    backend = open_cluster("k8s")
    assert isinstance(backend, Kubernetes)
    assert backend.site.ids() is not None
    return backend


def test_what_was_cut_on_its_way_there_goes_on(network: CutProxy, laptop: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(rng.randbytes(SIZE))
    site = opened().site
    network.cut_after("request", rng.randrange(SIZE // 3, SIZE))
    with pytest.raises(Unreachable):
        site.bring(rows, lambda *_: None)
    assert network.was_cut
    (arriving,) = (laptop / "files").glob(".*")
    there = arriving.stat().st_size
    assert MESSAGE <= there < SIZE
    heard: list[int] = []
    path = site.bring(rows, lambda done, _: heard.append(done))
    assert path.read_bytes() == rows.read_bytes() and path.is_relative_to(laptop / "files")
    assert heard[0] > there
    assert not arriving.exists()


def test_what_was_cut_on_its_way_here_goes_on(
    network: CutProxy, laptop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(SEED + 1)
    run_dir = make_run(laptop / "runs", RUN_ID, None)
    weights = rng.randbytes(SIZE)
    (run_dir / "output").mkdir()
    (run_dir / "output" / "adapter_model.safetensors").write_bytes(weights)
    close(run_dir, {"state": "failed", "reason": ""})
    site = opened().site
    to = tmp_path / "here"
    network.cut_after("answer", rng.randrange(SIZE // 3, SIZE))
    with pytest.raises(Unreachable):
        site.fetch(RUN_ID, to)
    assert network.was_cut
    (part,) = to.rglob(".*.part")
    here = part.stat().st_size
    assert MESSAGE <= here < SIZE
    asked: list[int] = []
    part_of = RemoteSite._part

    def spied(site: RemoteSite, run_id: str, path: str, offset: int) -> bytes:
        asked.append(offset)
        return part_of(site, run_id, path, offset)

    monkeypatch.setattr(RemoteSite, "_part", spied)
    site.fetch(RUN_ID, to)
    assert (to / "output" / "adapter_model.safetensors").read_bytes() == weights
    assert min(offset for offset in asked if offset) == here  # files that are small come whole
    assert not [*to.rglob("*.part")]
