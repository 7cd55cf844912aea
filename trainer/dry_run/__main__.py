"""`python -m trainer.dry_run`: requests as lines of JSON on stdin; for each a forecast as a line of JSON, at once."""

import contextlib
import gc
import json
import logging
import os
import queue
import sys
import threading
import warnings


def lines_of_parent() -> "queue.SimpleQueue[str]":
    """Where requests come in; this process ends with the one that makes them, whatever it does then."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main() -> None:
    """Answer requests for as long as there is somebody who makes them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # PEFT imports it where it is: seconds for nothing
    warnings.simplefilter("ignore")
    answers = sys.stdout
    gc.disable()  # what is imported stays, however often it is looked through
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        import torch._inductor.compile_fx

        from trainer.dry_run.forecast import Forecaster

        gc.freeze()
        gc.enable()
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        forecaster = Forecaster()
        lines = lines_of_parent()
        while True:
            request = json.loads(lines.get())
            said = json.dumps(forecaster.reply(request))
            print(said, file=answers, flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
