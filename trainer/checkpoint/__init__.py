"""Checkpoints without parallelism: fragments by parameter name and range, of whatever layout made them.

RUN_DIR/attempts/N/checkpoints/step-S/ holds one `shard-K.safetensors` per rank, whose tensors are 1-D and named
`kind/parameter/start` (one number for a whole parameter, like its number of steps, is 0-d), and beside it
`shard-K.json` with its hash. Rank 0 writes `manifest.json` when all shards are there: their hashes, and its own. A
checkpoint without one does not exist. Loading reads whatever ranges the new layout needs.

`saving` writes them, `lineage` says which count and which come next, `reading` loads them.
"""
