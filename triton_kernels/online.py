"""Running maximum and sum of exponentials (online softmax): log sum exp in one pass.

    m' = max(m, z);  s' = s exp(m - m') + exp(z - m');      at the end log sum exp(z) = m + log s

Shapes: z, m, s (BLOCK,). Each lane of a block has its own pair (m, s), initially (-inf, 0); `online_end` reduces the
lanes. The price is two exponentials per logit instead of a second pass over memory.
"""

# Kernel arguments are Triton tensors, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from triton_kernels.backend import jit, tl


@jit
def online(m, s, z):
    """Return (m', s') of each lane. A NaN always reaches s', though not always m'."""
    new = tl.maximum(m, z)
    safe = tl.where(new == float("-inf"), 0.0, new)  # no logit yet, or only -inf
    return new, s * tl.exp(m - safe) + tl.exp(z - safe)


@jit
def online_end(m, s):
    """Reduce the lanes to (top, total): log sum exp = top + log(total), and (0, 0) for an empty sum."""
    top = tl.max(m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(s * tl.exp(m - top), 0)
