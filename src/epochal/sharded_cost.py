"""What one GPU holds and sends under each profile, from shapes alone: for plans of 8 to 1,024 GPUs. No torch.

N parameters, of which M elements lie in matrices that an optimizer steps whole; W GPUs; weights, gradients and their
exchange are float32 (a Run's bf16 is autocast). Activations are not counted: they depend on the micro-batch.

    per step and GPU          gradients             weights              matrices (`optim/sharding.py`)
    ddp     all-reduce        8 N (W-1)/W                                4 M (W-1)/W  broadcasts, on average
    zero1   all-reduce        8 N (W-1)/W           4 N (W-1)/W          8 M (W-1)/W^2 all-to-all, at most
    zero2   reduce-scatter    4 N (W-1)/W           4 N (W-1)/W          the same
    zero3   reduce-scatter    4 N (W-1)/W           8 N (W-1)/W forward and backward, the same
    fsdp2   as zero3
"""

from dataclasses import dataclass

GPUS = (8, 16, 64, 256, 1024)
PROFILES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class ShardedCost:
    """Bytes on one GPU: held between two steps (weights, gradients, optimizer state), and sent in a step."""

    held: float
    sent: float


def sharded_cost(
    profile: str, gpus: int, *, parameters: int, matrix_elements: int = 0, state_per_parameter: float = 8.0
) -> ShardedCost:
    """Return what one of `gpus` GPUs holds and sends; `state_per_parameter` in bytes (8: two float32 moments).

    Raises ValueError for a profile that is not known.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}; choose from {', '.join(PROFILES)}.")
    n, m, share = 4.0 * parameters, 4.0 * matrix_elements, (gpus - 1) / gpus
    state = state_per_parameter * parameters
    owned = state_per_parameter * matrix_elements
    exchange = 2 * m * share / gpus
    if profile == "ddp":
        return ShardedCost(2 * n + state - owned + owned / gpus, 2 * n * share + m * share)
    if profile == "zero1":
        return ShardedCost(2 * n + n / gpus + state / gpus, 3 * n * share + exchange)
    if profile == "zero2":
        return ShardedCost(n + 2 * n / gpus + state / gpus, 2 * n * share + exchange)
    masters = n / gpus if profile == "zero3" else 0.0  # DeepSpeed keeps a second float32 copy of its shard
    return ShardedCost(masters + (2 * n + state) / gpus, 3 * n * share + exchange)


def cost_lines(name: str, parameters: int, matrix_elements: int) -> list[str]:
    """Return a small table for people: GB held and GB sent per step on one GPU, by profile and number of GPUs."""
    lines = [f"{name}, {parameters:,} parameters: GB held / GB sent a step on each GPU, activations not counted"]
    lines.append("  GPUs   " + "".join(f"{profile:>17}" for profile in PROFILES))
    for gpus in GPUS:
        cells = [sharded_cost(p, gpus, parameters=parameters, matrix_elements=matrix_elements) for p in PROFILES]
        lines.append(f"  {gpus:>5}  " + "".join(f"{c.held / 1e9:>9.2f} / {c.sent / 1e9:>5.2f}" for c in cells))
    return lines
