"""First-order meta-gradient of half batches (NanoGPT Slowrun, pull request 98).

The first half's gradient g1 is taken at w, the second half's at w - radius g1 / |g1|; the optimizer steps w with their mean. As
many passes as without. `radius` follows the schedule of the learning rate, which did best there.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from epochal.training.regularizers.moved import copied_gradients, moved

# Adds the gradient of rows and returns their loss; both count as their share of the whole batch.
Accumulate = Callable[[Tensor, int], Tensor]


def look_ahead(
    accumulate: Accumulate, parameters: Sequence[Tensor], tokens: Tensor, first_row: int, radius: float
) -> Tensor:
    """Add the mean of both gradients to `parameters` and return the mean loss; tokens (b, T) with an even b."""
    half = len(tokens) // 2
    loss = accumulate(tokens[:half], first_row)
    gradients = copied_gradients(parameters)
    with moved(parameters, gradients, -radius):
        return loss + accumulate(tokens[half:], first_row + half)
