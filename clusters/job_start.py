"""One start of the job of a run, of several that may live at the same time."""

from dataclasses import dataclass
from pathlib import Path

from runfolder.files import list_names, refresh


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
        """Let earlier starts, which may live on, know of this one."""
        folder = self.run_dir / "starts"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.submission}.{self.requeues}").touch()

    def is_latest(self) -> bool:
        """Whether the run was not started again since."""
        folder = self.run_dir / "starts"
        refresh(folder)
        for name in list_names(folder):
            submission, _, requeues = name.partition(".")
            if submission.isdigit() and (int(submission), int(requeues)) > (self.submission, self.requeues):
                return False
        return True
