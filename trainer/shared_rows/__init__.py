"""Rows whose positions several ranks share, as DeepSpeed-Ulysses has it (Jacobs et al. 2023, arXiv 2309.14509).

Each rank of a sequence group computes an equal part of the positions of every row. Around attention alone, an
all-to-all turns parts of the positions into parts of the heads: each rank then attends over whole rows, with some of
the heads. So attention knows masks, documents and patterns as if it were alone, and what a rank holds of activations
falls with the size of the group.

- `group.py`: the ranks of a group, and what they exchange.
- `attention.py`: attention between two all-to-alls, whatever attention a base has.
- `check.py`: whether a base mixes positions elsewhere too, which this cannot know.

The losses of labels are brought together where they are computed (trainer/objectives/labels.py), so objectives see
whole rows: all ranks of a group give the same share of a step's loss, and each counts for one of them.
"""
