"""Every verb, on runs whose folders only another process can see, with a queue that nobody serves."""

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from another_home import AnotherHome, NoRoute, far_cluster
from jobs import make_job, only_queued
from run_folders import claim, make_run, plan, step_row, steps

import fleetune
from clusters.base import Unreachable
from clusters.entry import entry_text
from clusters.local import Local
from clusters.remote import site as remote_site
from clusters.remote.cluster import RemoteCluster
from clusters.remote.far_side import FarSide
from clusters.remote.link import sockets_folder
from clusters.remote.site import RemoteSite
from fleetune import InputError
from orchestrator import backends, progress, runs
from orchestrator.logs import LogReader
from orchestrator.terminal.run_list import age, list_lines
from runfolder.appended import READ_AT_ONCE, Position
from runfolder.chain import close, result
from runfolder.digests import folder_digest
from runfolder.files import Damaged, sha256
from runfolder.loading import loading_lines
from runfolder.requests import cancel_requested
from runfolder.secrets import read_secrets
from runfolder.site import Appended, Positions, Refused

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def far_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The FLEETUNE_HOME of the other machine."""
    there = tmp_path / "there"
    there.mkdir()
    cluster = far_cluster("elsewhere", AnotherHome(there), there / "fleetune")
    monkeypatch.setitem(backends.CLUSTERS, "elsewhere", lambda: cluster)
    with only_queued(there / "fleetune"):
        yield there / "fleetune"
    cluster.far_side.close()


@pytest.mark.usefixtures("far_home")
@pytest.mark.parametrize("ahead_s", [-10_000.0, 10_000.0])
def test_a_laptop_with_a_wrong_clock_measures_by_that_of_the_cluster(
    ahead_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, clock = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + ahead_s)
    run_id = fleetune.submit(make_job(tmp_path), cluster="elsewhere").run_id
    (status,) = fleetune.list_runs("elsewhere")
    assert begin <= status.submitted <= status.looked_at <= clock()
    figures = fleetune.status(run_id).figures
    assert figures and 0 < figures.goodput.queued == figures.goodput.total <= clock() - begin
    (_, line) = list_lines([status], 160)
    assert re.split(" {2,}", line)[4] == age(status.looked_at - status.submitted)


def test_a_submitted_run_is_there_and_not_here(
    far_home: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = fleetune.submit(make_job(tmp_path), cluster="elsewhere")
    folder = far_home / "runs" / done.run_id
    assert (folder / "job.yaml").exists() and not (home / "runs").exists()
    assert read_secrets(folder) == {"HF_TOKEN": "hf_secret"}
    assert (folder / "secrets.json").stat().st_mode & 0o077 == 0
    (entry,) = Local(far_home).queue.list()
    dry = fleetune.dry_run(tmp_path / "job.yaml", cluster="elsewhere")
    assert entry.text == dry.replace(runs.RUN_ID.search(dry)[0], done.run_id)  # type: ignore[index]
    assert "hf_secret" not in entry.text
    found = fleetune.status(done.run_id)
    assert (found.cluster, found.state, found.run_dir) == ("elsewhere", "queued", str(folder))
    assert [run.run_id for run in fleetune.list_runs()] == [done.run_id]
    again = fleetune.submit(make_job(tmp_path), cluster="elsewhere", run_id=done.run_id)
    assert again.adopted
    with pytest.raises(InputError, match="is taken by another job"):
        fleetune.submit(make_job(tmp_path, method="rslora"), cluster="elsewhere", run_id=done.run_id)


def test_a_run_is_followed_cancelled_resumed_and_fetched(
    far_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PAUSE_S", 0.01)
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    run = runs.find(run_dir.name, "elsewhere")
    runs.remember(run_dir.name, "elsewhere")
    first = claim(run_dir)
    plan(first)
    steps(first, 1, 9)
    (first.folder / "logs").mkdir()
    (first.folder / "logs" / "rank-0.log").write_bytes(b"one\n\xff\xfe torn")
    found = fleetune.status("fake")
    assert (found.step, found.attempt) == (9, 1)
    assert found.figures and found.figures.seconds_per_step == 1.0
    assert fleetune.logs("fake").startswith("=== attempt 1, rank 0 ===\none\n")
    with pytest.raises(InputError, match="--rank: found 3; allowed: 0"):
        fleetune.logs("fake", rank=3)
    reader = LogReader(run)
    assert reader.read() == "=== attempt 1, rank 0 ===\none\n"

    fleetune.cancel("fake")
    assert cancel_requested(run_dir)
    worker = threading.Thread(target=lambda: close(run_dir, {"state": "cancelled", "reason": "by request"}))
    worker.start()
    assert fleetune.wait("fake").state == "cancelled"
    worker.join()
    with pytest.raises(InputError, match=r"data\.train|base"):  # its invented data are nowhere
        make_changed(run_dir)
        fleetune.resume("fake")
    assert run.site.fetch(run.run_id, tmp_path / "here").joinpath("job.yaml").exists()
    assert "cancelled" in (tmp_path / "here" / "result.json").read_text()
    capsys.readouterr()


def test_a_log_goes_on_where_it_was_when_the_link_is_back(
    far_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PAUSE_S", 0.01)
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    attempt = claim(run_dir)
    logs = attempt.folder / "logs"
    logs.mkdir()
    for rank in (0, 1):
        (logs / f"rank-{rank}.log").write_text(f"one of {rank}\n")
    run = runs.find(run_dir.name, "elsewhere")
    cluster = run.cluster
    assert isinstance(cluster, RemoteCluster)
    reader = CutReader(run, cluster.far_side, lambda: finish(run_dir, logs))
    assert progress.follow(run, reader).state == "failed"
    assert reader.cuts == 1
    assert capsys.readouterr().out == (
        "=== attempt 1 ===\nrank 0 | one of 0\nrank 1 | one of 1\nrank 0 | two of 0\nrank 1 | two of 1\n"
    )


class CutReader(LogReader):
    """Reads the logs of all ranks; the link is cut as it reads for the second time."""

    def __init__(self, run: runs.Handle, far_side: FarSide, then: Callable[[], None]) -> None:
        super().__init__(run, None)
        self.far_side = far_side
        self.then = then
        self.reads = self.cuts = 0

    def parts(self, final: bool = False) -> Iterator[str]:
        """What is new; the process there ends before the second answer."""
        self.reads += 1
        if self.reads == 2:
            assert self.far_side._process
            self.far_side._process.kill()
        try:
            yield from super().parts(final)
        except Unreachable:
            self.cuts += 1
            self.then()
            raise


def finish(run_dir: Path, logs: Path) -> None:
    """Let the workers write once more, and the run end."""
    for rank in (0, 1):
        with (logs / f"rank-{rank}.log").open("a") as log:
            log.write(f"two of {rank}\n")
    close(run_dir, {"state": "failed", "reason": "boom"})


def make_changed(run_dir: Path) -> None:
    """Give the run data that are not those of its submission."""
    record = (run_dir / "job.yaml").read_text()
    (run_dir / "job.yaml").write_text(record.replace("train: train.jsonl", f"train: {run_dir / 'gone.jsonl'}"))


def test_what_cannot_be_reached_is_unknown_and_nothing_else(far_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    runs.remember(run_dir.name, "elsewhere")
    down = far_cluster("elsewhere", NoRoute(), far_home)
    monkeypatch.setitem(backends.CLUSTERS, "elsewhere", lambda: down)
    found = fleetune.status(run_dir.name)
    assert (found.state, found.reason) == ("unknown", "cluster elsewhere: no route")
    with pytest.raises(Unreachable, match="no route"):
        fleetune.cancel(run_dir.name)
    assert result(run_dir) is None


def test_five_hundred_runs_are_looked_at_in_one_trip(
    far_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(far_home / "runs", runs.new_id("fake"), None)
    for number in range(5):
        attempt = claim(first, 10 * number or None)
        plan(attempt)
        steps(attempt, 10 * number + 1, 10 * number + 12)
        attempt.write_verdict({"kind": "node_lost", "reason": "", "evidence": ""})
    run_ids = [first.name] + [f"fake-{runs.new_id('x')[2:10]}{number:02d}" for number in range(10, 99)]
    run_ids += [f"more-{runs.new_id('x')[2:8]}{number:04d}" for number in range(410)]
    for run_id in run_ids[1:]:
        shutil.copytree(first, far_home / "runs" / run_id, copy_function=os.link)
    far = Local(far_home)
    for run_id in run_ids[:250]:
        far.queue.add(run_id, entry_text(far.site.root / run_id, 1, {}))
    for run_id in run_ids:
        runs.remember(run_id, "elsewhere")
    asked = []
    ask = FarSide.ask
    monkeypatch.setattr(
        FarSide, "ask", lambda far_side, request: asked.append(request["verb"]) or ask(far_side, request)
    )
    runs.find(first.name)
    assert asked == []
    fleetune.status(first.name)  # starts the process there
    for look in (fleetune.list_runs, lambda: fleetune.list_runs("elsewhere")):
        asked.clear()
        began = time.monotonic()
        found = look()
        with capsys.disabled():
            print(f"\n{len(found)} runs of 5 attempts, over a far process: {time.monotonic() - began:.2f} s")
        assert asked == ["look"]
        assert len(found) == len(set(run_ids)) == 500
        assert {(status.state, status.attempt, status.step) for status in found} == {
            ("preempted", 5, 52),
            ("unknown", 5, 52),
        }


def test_a_damaged_run_is_named_and_holds_nobody_up(far_home: Path) -> None:
    good, bad = (make_run(far_home / "runs", runs.new_id(name), None) for name in ("good", "bad"))
    (bad / "run.json").unlink()
    for run in (good, bad):
        runs.remember(run.name, "elsewhere")
    for text in ("", "[]", "{", "format: 2", "a: &a [*a]", "cluster: local"):
        (bad / "job.yaml").write_text(text)
        found = {status.run_id: status for status in fleetune.list_runs()}
        assert found[good.name].reason == "this cluster has not got the run; fleetune resume submits it again"
        assert (found[bad.name].state, str(bad) in str(found[bad.name].reason)) == ("unknown", True), text


def test_files_and_bases_are_sent_once_and_go_on_where_they_were_cut(far_home: Path, tmp_path: Path) -> None:
    site = backends.open_cluster("elsewhere").site
    assert isinstance(site, RemoteSite)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bytes(range(256)) * 40_000)
    heard: list[tuple[int, int]] = []
    there = site.bring(file, lambda done, total: heard.append((done, total)))
    assert there.is_relative_to(far_home / "files") and there.read_bytes() == file.read_bytes()
    assert heard[-1] == (file.stat().st_size, file.stat().st_size) and len(heard) > 2
    stamp = there.stat().st_mtime_ns
    assert site.bring(file, lambda *_: None) == there and there.stat().st_mtime_ns == stamp
    shutil.rmtree(there.parent)
    (far_home / "files" / f".{there.parent.name}").write_bytes(file.read_bytes()[:1000])  # of a client that was cut
    assert site.bring(file, lambda *_: None).read_bytes() == file.read_bytes()
    shutil.rmtree(there.parent)
    (far_home / "files" / f".{there.parent.name}").write_bytes(b"something else")
    with pytest.raises(Refused, match="did not come whole"):
        site.bring(file, lambda *_: None)
    assert site.bring(file, lambda *_: None).read_bytes() == file.read_bytes()

    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert site.bring(empty, lambda *_: None).read_bytes() == b""

    make_job(tmp_path)
    base = site.bring(tmp_path / "base", lambda *_: None)
    assert folder_digest(base, scratch=False) == folder_digest(tmp_path / "base", scratch=False)
    assert site.bring(tmp_path / "base", lambda *_: None) == base


def test_a_file_of_the_cluster_is_looked_for_there(far_home: Path, tmp_path: Path) -> None:
    rows = far_home.parent / "there.jsonl"
    job = make_job(tmp_path, data={"train": f"cluster:{rows}", "seq_len": 16})
    with pytest.raises(InputError, match=r"data: cluster:/.*there\.jsonl: the cluster has no such file"):
        fleetune.submit(job, cluster="elsewhere")
    assert runs.handles("elsewhere") == []
    rows.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    done = fleetune.submit(job, cluster="elsewhere")
    record = runs.find(done.run_id, "elsewhere").site.record(done.run_id)
    assert record["job"]["data"]["train"] == f"cluster:{rows}"
    assert record["digests"]["data.train"] == sha256(rows)


def test_an_output_is_fetched_and_fetched_on(far_home: Path, tmp_path: Path) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    output = run_dir / "output" / "merged"
    output.mkdir(parents=True)
    (output / "weights").write_bytes(b"w" * 9_000_000)
    runs.remember(run_dir.name, "elsewhere")
    to = tmp_path / "here"
    (to / "output" / "merged").mkdir(parents=True)
    (to / "output" / "merged" / ".weights.part").write_bytes(b"w" * 5_000_000)
    assert fleetune.fetch(run_dir.name, to) == to
    assert (to / "output" / "merged" / "weights").read_bytes() == (output / "weights").read_bytes()
    assert not list(to.rglob("*.part")) and (to / "job.yaml").exists()
    (to / "output" / "merged" / ".weights.part").write_bytes(b"x" * 5_000_000)
    (to / "output" / "merged" / "weights").unlink()
    with pytest.raises(Unreachable, match="did not come whole"):
        fleetune.fetch(run_dir.name, to)
    fleetune.fetch(run_dir.name, to)
    assert (to / "output" / "merged" / "weights").read_bytes() == (output / "weights").read_bytes()
    site = runs.find(run_dir.name).site
    for path in ("secrets.json", "output/../secrets.json", "/etc/passwd"):
        with pytest.raises(Refused, match="allowed: files of job.yaml, output"):
            site._ask("part", run_id=run_dir.name, path=path, offset=0, length=1)  # type: ignore[attr-defined]


def test_what_was_fetched_is_loaded_from_here_on_the_base_that_is_here(far_home: Path, tmp_path: Path) -> None:
    done = fleetune.submit(make_job(tmp_path), cluster="elsewhere")
    output = far_home / "runs" / done.run_id / "output"
    output.mkdir()
    (output / "adapter_config.json").write_text("{}")
    to = fleetune.fetch(done.run_id, tmp_path / "here")
    (far_home / "files").rename(tmp_path / "of-another-machine")
    assert loading_lines(to) == [
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})",
        f"model = PeftModel.from_pretrained(model, {str(to / 'output')!r})",
    ]


def test_a_folder_has_what_was_fetched_of_one_run(far_home: Path, tmp_path: Path) -> None:
    first, second = (make_run(far_home / "runs", runs.new_id("fake"), None) for _ in range(2))
    for run_dir in (first, second):
        (run_dir / "output").mkdir()
        (run_dir / "output" / f"weights-{run_dir.name}").write_bytes(b"w")
        runs.remember(run_dir.name, "elsewhere")
    to = fleetune.fetch(first.name, tmp_path / "here")
    with pytest.raises(InputError, match=f"run {first.name} was fetched into it; allowed: another folder"):
        fleetune.fetch(second.name, to)
    assert [path.name for path in (to / "output").iterdir()] == [f"weights-{first.name}"]
    assert fleetune.fetch(first.name, to) == to


def test_a_proxy_of_this_machine_stays_on_it(far_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:password@127.0.0.1:3128")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = fleetune.submit(make_job(tmp_path), cluster="elsewhere")
    assert read_secrets(far_home / "runs" / done.run_id) == {"HF_TOKEN": "hf_secret"}


def test_a_job_that_its_cluster_never_takes_sends_nothing(far_home: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, resources={"workers_per_node": 9999})
    with pytest.raises(InputError, match="found 9999 workers"):
        fleetune.submit(job, cluster="elsewhere")
    assert not (far_home / "files").exists()


def test_a_long_log_comes_in_many_answers(far_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    runs.remember(run_dir.name, "elsewhere")
    lines = "".join(f"line {number}\n" for number in range(400_000))
    bar = "\r50 % done" * 300_000  # of a progress bar: a line without an end
    for number, text in enumerate((lines, f"{bar}\nlast")):
        attempt = claim(run_dir, start=0 if number else None)
        (attempt.folder / "logs").mkdir()
        (attempt.folder / "logs" / "rank-0.log").write_text(text)
    sizes = []
    ask = RemoteSite.read

    def noted(site: RemoteSite, run_id: str, since: Positions) -> Appended:
        answer = ask(site, run_id, since)
        sizes.append(sum(len(chunk.data) for chunks in answer.values() for chunk in chunks))
        return answer

    monkeypatch.setattr(RemoteSite, "read", noted)
    text = fleetune.logs(run_dir.name)
    assert max(sizes) <= 2 * READ_AT_ONCE and len(sizes) > 4
    _, of_first, of_second = re.split("=== attempt ., rank 0 ===\n", text)
    assert of_first == lines
    assert of_second.replace("\n", "") == f"{bar}last"


def test_two_who_fetch_into_one_folder_get_it_whole(
    far_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    (run_dir / "output").mkdir()
    weights = bytes(range(256)) * 256
    (run_dir / "output" / "weights").write_bytes(weights)
    runs.remember(run_dir.name, "elsewhere")
    monkeypatch.setattr(remote_site, "_MESSAGE_BYTES", 1 << 10)
    with ThreadPoolExecutor(2) as pool:
        fetches = [pool.submit(fleetune.fetch, run_dir.name, tmp_path / "here") for _ in range(2)]
        assert {fetch.result() for fetch in fetches} == {tmp_path / "here"}
    assert (tmp_path / "here" / "output" / "weights").read_bytes() == weights


def test_there_is_nothing_to_fetch_of_a_run_that_waits(far_home: Path, tmp_path: Path) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    with pytest.raises(InputError, match="it has not ended, and has no output yet"):
        fleetune.fetch(run_dir.name, tmp_path / "here", cluster="elsewhere")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("path", ["output/../../outside", "/tmp/outside", "../outside"])
def test_a_far_side_writes_nothing_outside_of_the_folder(
    far_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    site = runs.find(run_dir.name, "elsewhere").site
    listed = {"path": path, "size": 0, "sha256": ""}
    monkeypatch.setattr(RemoteSite, "_ask", lambda *_, **__: [listed])
    with pytest.raises(Damaged, match="cluster elsewhere: what it sent is refused: the path"):
        site.fetch(run_dir.name, tmp_path / "here")


def test_a_file_that_cannot_be_written_there_is_told_in_one_line(far_home: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (far_home / "runs").write_text("no folder")
    with pytest.raises(Unreachable) as error:
        fleetune.submit(job, cluster="elsewhere")
    told, again = str(error.value).splitlines()
    assert told.startswith(f"cluster elsewhere: {far_home}/runs") and "Traceback" not in told
    assert again == "the same command again is safe, and makes one run"
    (far_home / "runs").unlink()
    assert fleetune.submit(job, cluster="elsewhere").cluster == "elsewhere"


def test_a_file_is_read_from_where_it_was_left(far_home: Path) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    site = runs.find(run_dir.name, "elsewhere").site
    first = claim(run_dir)
    step_row(first, 1)
    (chunk,) = site.read(run_dir.name, {"metrics.jsonl": Position()})["metrics.jsonl"]
    assert (chunk.after.attempt, chunk.sealed) == (1, False)
    step_row(first, 2)
    second = claim(run_dir, start=1)
    step_row(first, 3)  # behind the seal
    step_row(second, 2)
    rest = site.read(run_dir.name, {"metrics.jsonl": chunk.after})["metrics.jsonl"]
    assert [(part.after.attempt, part.data.count(b"\n"), part.sealed) for part in rest] == [
        (1, 1, True),
        (2, 1, False),
    ]


def test_the_sockets_of_connections_have_short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    for home in (long, Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))):
        monkeypatch.setenv("FLEETUNE_HOME", str(home))
        assert len(str(sockets_folder() / ("c" * 40))) < 104
    assert sockets_folder() == home / "links"
    shutil.rmtree(home)
