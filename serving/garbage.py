"""Python's garbage collections, kept short in processes that a device must not wait for."""

import gc


def leave_to_no_collection() -> None:
    """Have garbage collections pass over all that is there now: libraries, models, and what was compiled.

    It stays, and to look through it takes a tenth of a second, now and then, while the device waits.
    """
    gc.collect()
    gc.freeze()
