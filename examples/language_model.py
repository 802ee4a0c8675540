"""A GPT-2-shaped language model, made from a configuration in PyTorch: its sharpness in JAX.

You will see the port's distance from PyTorch, and the largest eigenvalue of the Hessian beside the Rayleigh quotient of
its eigenvector by PyTorch's own product. Takes 40 s on two cores. Needs `pip install 'hessjax[torch]' transformers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hessjax as hj


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of every token given those before it, for one sequence."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits[:-1], tokens[1:])
    return jnp.mean(losses)


def torch_loss(output: object, tokens: torch.Tensor) -> torch.Tensor:
    """The same in PyTorch, for a batch."""
    logits = output.logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def main() -> None:
    """Builds, converts, solves, compares."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config)
    tokens = torch.randint(0, 50, (6, 12))

    model = hj.from_torch(module, ({"input_ids": tokens}, tokens), next_token_loss, use_cache=False)
    print(model.parity, "\n")
    hessian = model.hessian()
    pairs = hj.eigsh(hessian, k=1, key=jax.random.key(0), which="LM", tol=1e-4)

    in_torch = hj.torch_operator(torch_loss, module, [({"input_ids": tokens}, tokens)])
    vector = jax.tree.map(lambda leaf: leaf[0], pairs.eigenvectors)
    image = in_torch(vector)
    quotient = sum(float(jnp.vdot(vector[name], image[name])) for name in vector)
    print(f"{hessian.size} parameters; the embedding is also the last layer, and counted once")
    print(f"eigenvalue {float(pairs.eigenvalues[0]):.6f}, Rayleigh quotient of its vector in PyTorch {quotient:.6f}")
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(quotient, pairs.eigenvalues[0], rtol=1e-3)


if __name__ == "__main__":
    main()
