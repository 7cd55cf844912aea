"""`python -m trainer.dry_run`: requests as lines of JSON on stdin; for each a forecast as a line of JSON, at once."""

import contextlib
import gc
import json
import logging
import os
import sys
import warnings


def main() -> None:
    """Answer requests until there are no more."""
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
        for line in sys.stdin:
            request = json.loads(line)
            said = json.dumps(forecaster.reply(request))
            print(said, file=answers, flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
