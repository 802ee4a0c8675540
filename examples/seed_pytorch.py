"""A two-layer network trained in PyTorch, analysed from its printed parameters: no PyTorch needed.

You will see the output, the loss and the six eigenvalues of largest magnitude beside the published ones. Takes 15 s.
"""

import jax
import jax.numpy as jnp
import numpy as np

import hessjax as hj

PARAMS = {
    "fc1.weight": [[0.3645523, 0.9664639], [-0.5033512, -0.4280049]],
    "fc1.bias": [-0.0550507, 0.2033689],
    "fc2.weight": [[0.9411813, -0.4964321]],
    "fc2.bias": [0.6310059],
}
DATA = ([[1.0, 2.0], [3.0, 4.0]], [[5.0], [6.0]])
OUTPUT, LOSS = 3.3154101, 1.6968625
EIGENVALUES = np.array([-1.1432382, -0.61654264, 0.1918977, 1.1418587, 1.3489572, 76.840744])


def forward(params: dict, x: jax.Array) -> jax.Array:
    """Two linear layers with the identity between them."""
    hidden = params["fc1.weight"] @ x + params["fc1.bias"]
    return params["fc2.weight"] @ hidden + params["fc2.bias"]


def squared_norm(output: jax.Array, target: jax.Array) -> jax.Array:
    """‖output - target‖². Not `jnp.linalg.norm(...) ** 2`, whose gradient at a perfect fit is NaN."""
    return jnp.sum((output - target) ** 2)


def main() -> None:
    """Prints each published number beside ours, and asserts that they agree."""
    model = hj.Model(PARAMS, DATA, forward, squared_norm)
    model.verify(loss=LOSS, rtol=1e-5)
    pairs = hj.eigsh(model.hessian(), k=6, key=jax.random.key(0), which="LM")

    print(f"output at [1, 2]   {model.outputs()[0, 0]:.7f}   published {OUTPUT}")
    print(f"loss               {model.loss_value():.7f}   published {LOSS}")
    print("eigenvalue      published       residual")
    for ours, published, residual in zip(pairs.eigenvalues, EIGENVALUES, pairs.residuals, strict=True):
        print(f"{ours:11.6f}   {published:11.6f}   {residual:10.1e}")

    np.testing.assert_allclose(model.outputs()[0, 0], OUTPUT, rtol=1e-6)
    np.testing.assert_allclose(pairs.eigenvalues, EIGENVALUES, atol=2e-5)
    assert bool(pairs.converged.all())


if __name__ == "__main__":
    main()
