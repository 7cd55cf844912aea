"""One start of the job of a run, of several that may live at the same time."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runfolder.chain import last_slot, see_slots
from runfolder.files import list_names, refresh
from runfolder.latest_start import note_latest_start


@dataclass(frozen=True)
class JobStart:
    """One start of a run: by its submission, and by how often that was started again.

    Of two starts of a run (a node that was cut off lives on while its job was requeued, or the run was submitted
    again) the later one works: each leaves its name in RUN_DIR/starts.
    """

    run_dir: Path
    submission: int
    requeues: int

    def note(self) -> None:
        """Let earlier starts, which may live on, know of this one, and later ones which slot was the last then."""
        folder = self.run_dir / "starts"
        folder.mkdir(exist_ok=True)
        see_slots(self.run_dir)
        slot = note_latest_start(self.run_dir)
        (folder / f"{self.submission}.{self.requeues}").write_text(str(slot))

    def fruitless(self) -> int:
        """How many starts of the submission in a row, right before this one, took the run no attempt further."""
        folder = self.run_dir / "starts"
        slot = str(last_slot(self.run_dir))
        noted = list_names(folder)
        count = 0
        for requeues in reversed(range(self.requeues)):
            name = f"{self.submission}.{requeues}"
            if name not in noted:  # its node could not start it
                continue
            if (folder / name).read_text() != slot:
                break
            count += 1
        return count

    def is_latest(self) -> bool:
        """Whether the run was not started again since."""
        folder = self.run_dir / "starts"
        with suppress(OSError):  # on a full disk, what this host knows has to do
            refresh(folder)
        return latest_noted(folder) <= (self.submission, self.requeues)


def latest_noted(folder: Path) -> tuple[int, int]:
    """The submission of the latest start that left its name in a folder, and its number; (0, 0) where none did."""
    noted = noted_starts(folder)
    return max(noted, default=(0, 0))


def noted_starts(folder: Path) -> list[tuple[int, int]]:
    """The starts that left their names in a folder: the number of the submission, and that of the start."""
    noted = []
    for name in list_names(folder):
        submission, _, number = name.partition(".")
        if submission.isdigit() and number.isdigit():
            noted.append((int(submission), int(number)))
    return noted
