"""DeepSpeed: its engine, which rank owns which part of which trained parameter, and how sharded weights become whole.

The only folder that touches DeepSpeed's private names; it refuses another version than the one it was written for.

- `engine.py`: the version, the configuration of each stage, and the engine.
- `layout.py`: the fragments of trained parameters that a rank owns, stage by stage.
- `by_layer.py`: decoder layers as the units of stage 3.
- `frozen.py`: stage 3 of a frozen base without DeepSpeed's hooks.
- `linear.py`: linear layers whose weights stage 3 has sharded.
- `gather.py`: weights that stage 3 has sharded, made whole for a while.
- `chunked.py`, `lanes.py`: AdamW's step with its moments in the host's memory.
- `sharded.py`: a model under the engine, and what happens in a step.
"""
