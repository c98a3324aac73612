"""The sharpness of a trained model: the largest eigenvalue of the Hessian of its training loss.

Gradient descent with a learning rate lr is stable at minima with eigenvalues up to 2 / lr (arXiv 2305.17490 has the bounds
of SGD). Our schedules end at lr = 0, so no bound holds there; the eigenvalue says how flat the minimum is that a run chose.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from epochal.data.store import Stream, Tokens

Array = npt.NDArray[np.float64]

SEQUENCES = 4  # of the training text, on which the loss is taken: a batch of small scales
TOLERANCE = 0.01  # relative
STEP = 1e-4  # of the difference of gradients, relative to the norm of the weights; in float64


def sharpness(model: torch.nn.Module, stream: Stream) -> float:
    """Return the sharpness on the first training sequences.

    The loss is in nats per token. `model` is on any device and left in float64.
    """
    count = min(SEQUENCES, stream.sequences_per_epoch)
    return top_eigenvalue(model, np.stack([stream.sequence(number) for number in range(count)]).astype(np.int64))


def top_eigenvalue(model: torch.nn.Module, sequences: Tokens) -> float:
    """Return the largest eigenvalue on sequences (n, T), by Lanczos iteration."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    weights = list(model.double().eval().parameters())
    tokens = torch.from_numpy(sequences).to(weights[0].device)
    start = parameters_to_vector(weights).detach().clone()
    step = STEP * float(start.norm())

    def gradient(at: torch.Tensor) -> torch.Tensor:
        vector_to_parameters(at, weights)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    def product(vector: Array) -> Array:
        direction = torch.from_numpy(vector.astype(np.float64).ravel()).to(start)
        ahead = step * direction / direction.norm()
        change = gradient(start + ahead) - gradient(start - ahead)
        return np.asarray((change * direction.norm() / (2 * step)).cpu())

    hessian = LinearOperator((len(start), len(start)), matvec=product, dtype=np.float64)
    first = np.random.default_rng(0).standard_normal(len(start))
    (value,) = eigsh(hessian, k=1, which="LA", v0=first, tol=TOLERANCE, return_eigenvectors=False)
    vector_to_parameters(start, weights)
    return float(value)
