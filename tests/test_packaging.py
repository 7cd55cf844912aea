"""The plain package, as a laptop installs it, and what an installation promises."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from jobs import write_tokenizer

from fleetune_start import unshadowed

ROOT = Path(__file__).parent.parent
ROOMS = ("orchestrator", "clusters", "runfolder", "k8s", "trainer", "methods", "serving")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the plain package, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("plain")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fleetune.py", "fleetune_start.py"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "venv",
    ]  # its own would take as long as all else
    install = [*pip, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", source]
    subprocess.run(install, check=True, cwd=folder)
    return folder / "venv" / "bin"


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    """A folder of a user who likes our names: files that would break everything if they were imported."""
    for name in (*ROOMS, "fleetune", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')\n")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    base = tmp_path / "base"
    base.mkdir()
    write_tokenizer(base)
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096}
    (base / "config.json").write_text(json.dumps(config))
    job = {
        "name": "sums",
        "base": {"model": "base", "init": "scratch"},
        "data": "train.jsonl",
        "train": {"steps": 3},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    return tmp_path


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"FLEETUNE_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin"}
    if (folder / "on_path").exists():
        environment["PYTHONPATH"] = os.pathsep.join([".", str(folder), str(folder / "on_path")])
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_plain_package_submits_without_torch(plain: Path, laptop: Path) -> None:
    has_torch = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('ray'))"
    assert run([plain / "python", "-P", "-c", has_torch], laptop).stdout == "None None\n"
    done = run([plain / "fleetune", "submit", "--dry-run", "job.yaml"], laptop)
    assert done.returncode == 0
    warning, *_ = done.stderr.splitlines()
    assert warning.startswith("warning: data: rows were not looked at as tokens (transformers, ")
    assert json.loads(done.stdout)["run_id"].startswith("sums-")


def test_the_plain_package_says_what_it_lacks(plain: Path, laptop: Path) -> None:
    done = run([plain / "fleetune", "submit", "job.yaml"], laptop)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "fleetune[train]" in done.stderr
    assert not (laptop / "home" / "runs").exists()
    assert run([plain / "fleetune", "doctor"], laptop).returncode == 0
    done = run([plain / "fleetune", "compare", "--uri", "http://127.0.0.1:1"], laptop)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "MLflow is not installed" in done.stderr


def test_data_files_are_packed(plain: Path) -> None:
    files = [
        "orchestrator/comparison/report.html",
        "methods/support.json",
        "clusters/remote/constraints.txt",
        "k8s/image/Dockerfile",
        "k8s/manifests/base/kustomization.yaml",
        *(f"{room}/py.typed" for room in ROOMS),
    ]
    for data in files:
        (packed,) = plain.parent.glob(f"lib/python*/site-packages/{data}")
        assert packed.read_text() == (ROOT / data).read_text()


def test_files_of_the_user_do_not_shadow_ours(laptop: Path) -> None:
    done = run([Path(sys.executable).parent / "fleetune", "plan", "job.yaml"], laptop)
    assert (done.returncode, done.stderr) == (0, "")
    # Detached processes are started with -P, by which the current folder stays off sys.path.
    done = run([sys.executable, "-P", "-c", "import trainer, runfolder.job, clusters.local"], laptop)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def hostile(laptop: Path) -> Path:
    """The same, with PYTHONPATH full of our names: modules, and packages."""
    (laptop / "torch.py").unlink()  # what is not ours may be replaced on PYTHONPATH, as ever
    for name in ("serving", "trainer"):
        (laptop / f"{name}.py").rename(laptop / f"{name}.old")
        package = laptop / "on_path" / name
        package.mkdir(parents=True)
        (laptop / f"{name}.old").rename(package / "__init__.py")
    return laptop


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "job.yaml"], ["submit", "--dry-run", "job.yaml"], ["list"]]
)
def test_neither_do_those_on_pythonpath(plain: Path, hostile: Path, arguments: list[str]) -> None:
    for command in (plain / "fleetune", Path(sys.executable).parent / "fleetune"):  # installed, and editable
        done = run([command, *arguments], hostile)
        assert done.returncode == 0
        said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert said == (["no runs yet"] if arguments == ["list"] else [])


def test_nor_for_the_module_and_in_python(plain: Path, hostile: Path) -> None:
    for name in ("orchestrator", "fleetune"):
        (hostile / f"{name}.py").unlink()  # Python itself looks for these two
    use = "import fleetune; print(fleetune.plan('job.yaml').steps)"
    for python in (plain / "python", Path(sys.executable)):
        assert run([python, "-m", "orchestrator", "plan", "job.yaml"], hostile).returncode == 0
        done = run([python, "-c", use], hostile)
        assert (done.stdout, done.stderr) == ("3\n", "")
        (hostile / "methods.py").write_text("")
        done = run([python, "-c", f"import methods; {use}"], hostile)
        told = f"ImportError: {hostile}/methods.py was imported as 'methods', which is a name of Fleetune's"
        assert told in done.stderr.splitlines()[-1]


def test_what_is_started_finds_ours(hostile: Path) -> None:
    other = hostile / "other"
    other.mkdir()
    (other / "trainer").mkdir()  # no package: it comes after ours
    mixed = os.pathsep.join([str(hostile), str(other), "", str(ROOT)])
    found = unshadowed({"PYTHONPATH": mixed, "HOME": "/"})
    assert found == {"PYTHONPATH": os.pathsep.join([str(other), str(ROOT)]), "HOME": "/"}
    assert unshadowed({"PYTHONPATH": str(hostile)}) == {}


def test_the_lock_covers_what_is_installed() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    assert all("+" not in version for version in locked.values())
    assert locked["torch"] == "2.13.0"
    # Only what pip put there: Ray, once imported, has distributions of its own on sys.path.
    site = [sysconfig.get_path("purelib")]
    installed = {re.sub(r"[-_.]+", "-", d.name).lower() for d in distributions(path=site)}
    covered = {re.sub(r"[-_.]+", "-", name).lower() for name in locked}
    free = {"fleetune", "pip", "setuptools", "wheel"}
    assert {
        name for name in installed - covered - free if not name.startswith(("nvidia-", "cuda-", "triton"))
    } == set()


def test_every_requirement_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["data"], *extras["train"]]
    assert {re.split(r"[\[=<>]", requirement)[0].lower() for requirement in wanted} - {"fleetune"} <= locked
