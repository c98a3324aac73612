"""The running maximum and sum of exponentials, for kernels that read a row of logits once instead of twice.

    m' = max(m, z);  s' = s exp(m - m') + exp(z - m');      at the end log sum exp(z) = m + log s

Each lane of a block keeps its own pair (m, s), from (-inf, 0), and `online_end` joins the lanes: two exponentials per
logit instead of a second pass over memory.
"""

# The arguments of kernels are Triton's own numbers.
# mypy: disable-error-code="no-untyped-def"

from triton_kernels.backend import jit, tl


@jit
def online(m, s, z):
    """Return (m', s') of each lane; a maximum may drop a NaN, the sum does not."""
    new = tl.maximum(m, z)
    safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet, or impossible tokens only
    return new, s * tl.exp(m - safe) + tl.exp(z - safe)


@jit
def online_end(m, s):
    """Join the lanes: return (top, total) with log sum exp = top + log(total); (0, 0) for a sum over nothing."""
    top = tl.max(m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(s * tl.exp(m - top), 0)
