"""A network trained in PyTorch, converted, proven, and its Hessian's spectrum computed in JAX.

You will see how far the port is from PyTorch (about 1e-15), and the three largest eigenvalues beside SciPy's answer
over PyTorch's own double backward. Takes 20 s on two cores. Needs `pip install 'hessjax[torch,examples]'`.
"""

import jax
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn

import hessjax as hj


def train(module: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 100) -> None:
    """Full-batch Adam in PyTorch."""
    optimizer, criterion = torch.optim.Adam(module.parameters(), 3e-3), nn.CrossEntropyLoss()
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()


def scipy_over_torch(module: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> np.ndarray:
    """The top eigenvalues by SciPy, every product by a double backward in float64."""
    module = module.double().eval()
    parameters = list(module.parameters())
    loss = nn.CrossEntropyLoss()(module(x.double()), y)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def product(v: np.ndarray) -> np.ndarray:
        parts = torch.autograd.grad(flat, parameters, torch.from_numpy(v.reshape(-1)), retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]).numpy()

    matrix = LinearOperator((len(flat), len(flat)), product, dtype=np.float64)
    return np.sort(eigsh(matrix, k, which="LA", tol=1e-6, return_eigenvectors=False))


def main() -> None:
    """Trains, converts, solves, and compares."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[:500] / 16, dtype=torch.float32), torch.tensor(digits.target[:500])
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(72, 10),
    )
    train(module, x, y)

    model = hj.from_torch(module, (x, y), nn.CrossEntropyLoss())
    print(model.parity, "\n")
    pairs = hj.eigsh(model.hessian(), k=3, key=jax.random.key(0), which="LA", tol=1e-4)
    reference = scipy_over_torch(module, x, y, 3)
    print("eigenvalue   SciPy over PyTorch   residual")
    for ours, theirs, residual in zip(pairs.eigenvalues, reference, pairs.residuals, strict=True):
        print(f"{ours:10.5f}   {theirs:18.5f}   {residual:8.1e}")
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(pairs.eigenvalues, reference, rtol=1e-3)


if __name__ == "__main__":
    main()
