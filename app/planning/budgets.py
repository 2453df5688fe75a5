"""What the engine keeps in memory at most: it holds to these, and the planner's estimate counts on them."""

from __future__ import annotations

DELTA_BYTES = 512_000_000  # Δ that takes long to form, kept between passes, of two tensors together
COLLECTED_BYTES = 1 << 28  # magnitudes near the thresholds, of all sources together
EXPERT_FACTOR_BYTES = 256_000_000  # of experts' factors, where a checkpoint has every expert by itself
# Up to here B·A in the caches costs less than writing it to memory and reading it back: the kernels form it on the way.
PRODUCT_RANK = 64
