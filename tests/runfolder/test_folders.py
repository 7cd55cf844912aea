"""Where things are kept when HOME cannot be written."""

from pathlib import Path

import pytest

from runfolder import folders


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: below it nobody, root included, can make a folder. FLEETUNE_HOME is elsewhere."""
    for name in ("FLEETUNE_CACHE", "XDG_CACHE_HOME", "TRITON_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "fleetune"))
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_the_cache_is_below_fleetunes_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file / "home"))
    assert folders.cache() == file.parent / "fleetune" / "cache"
    assert folders.cache().is_dir()
    monkeypatch.setenv("FLEETUNE_CACHE", str(file.parent / "mine"))
    assert folders.cache() == file.parent / "mine"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEETUNE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(OSError, match="FLEETUNE_HOME: not set, and this user has no home"):
        folders.home()


@pytest.mark.parametrize("name", ["FLEETUNE_CACHE", "FLEETUNE_HOME"])
def test_a_cache_that_cannot_be_is_named(file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, str(file / "cache"))
    told = rf"^{name}: {file}/cache.* for tokenised data cannot be written \(Not a directory\); set {name} to"
    with pytest.raises(ValueError, match=told):
        folders.cache()


def test_libraries_stay_where_they_are_unless_home_has_no_place(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    assert folders.library_folders() == {}
    monkeypatch.setenv("HOME", str(file / "home"))
    place = str(file.parent / "fleetune" / "cache" / "libraries")
    assert folders.library_folders() == {"XDG_CACHE_HOME": place, "TRITON_HOME": place}
    monkeypatch.setenv("TRITON_HOME", "/triton")
    assert folders.library_folders() == {"XDG_CACHE_HOME": place}


def test_a_cache_of_the_hub_in_a_home_that_is_read_only_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = file.parent / ".cache" / "huggingface"
    hub.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setattr(folders, "writable", lambda _: False)
    assert folders.library_folders()["HF_HOME"] == str(hub)
