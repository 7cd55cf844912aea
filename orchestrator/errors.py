"""What can go wrong on the laptop, as the exit code that says so."""


class InputError(ValueError):
    """What the user gave is wrong (exit code 2). One line per problem: where, what was found, what is allowed."""


class RunEnded(InputError):
    """The run that a submission made or would go on with has ended: who submits the job anew gets another one."""


class JobRefused(InputError):
    """A job that its cluster does not take: it certainly has nothing of it, and another one may take it."""


class RunRefused(RunEnded, JobRefused):
    """The same, where a run was made for it before: that is closed."""


class JobFailed(RuntimeError):
    """A job that was waited for did not succeed (exit code 1)."""


class JobStopped(RuntimeError):
    """A job that was waited for was cancelled or paused by somebody (exit code 4)."""
