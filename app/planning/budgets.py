"""What the engine keeps in memory at most: it holds to these, and the planner's estimate counts on them."""

from __future__ import annotations

DELTA_BYTES = 512_000_000  # Δ that takes long to form, kept between passes, of two tensors together
COLLECTED_BYTES = 1 << 28  # magnitudes near the thresholds, of all sources together
EXPERT_FACTOR_BYTES = 256_000_000  # of experts' factors, where a checkpoint has every expert by itself
# The base and the result of a block this large stay in a core's second-level cache or near it, the interpreter's share
# of a block is small (about 0.1 ms beside several), and a small matrix still is more than one block.
BLOCK_VALUES = 1 << 19
# A block's memory in bytes a value: of its own, and for each source, with what a method needs for a moment.
BLOCK_BYTES, SOURCE_BYTES = 40, 24
RESULTS_AHEAD = 2  # blocks begun beyond the one that is written, for each thread
SPARE_RESULTS = 4  # that wait for the writer while the next blocks are worked on
THREADS = 8  # that the estimate counts on; how many a worker has is not known where it is made
# Up to here B·A in the caches costs less than writing it to memory and reading it back: the kernels form it on the way.
PRODUCT_RANK = 64
