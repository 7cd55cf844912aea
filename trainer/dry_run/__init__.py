"""A dry run: the trainer's own code on tensors that have shapes and no values, for the memory that it would take.

- `ledger.py`: the bytes that are alive, and their largest sum.
- `model.py`: a base of a few layers with the method attached, without values.
- `steps.py`: forward and backward passes and updates of it, as the trainer takes them.
- `kernels.py`: what the fast path would do on a GPU.
- `line.py`: two depths, and the straight line through them.
- `zero.py`: what of it each worker holds under ZeRO.
- `process.py`: whoever asks, without torch: the dry run is a process of its own.
- `fit.py`: whether what was foretold fits on a device, and which changes of the job would.

`python -m trainer.dry_run` takes a request and prints a forecast; it needs no GPU.
"""
