import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from aten_cases import CASES, NO_CASE

from hessjax.interop._torch._program import Instruction, Program, Ref
from hessjax.interop._torch._rules import RULES, find

torch = pytest.importorskip("torch")
as_data = pytest.importorskip("hessjax.interop._torch._export").as_data  # which fills the table
plain_attention = pytest.importorskip("hessjax.interop._torch._reference").plain_attention

# How many of the results count: the others are indices, or statistics that torch does not differentiate.
COUNTED = {
    "native_layer_norm.default": 1,
    "log_sigmoid_forward.default": 1,
    "_native_batch_norm_legit_no_training.default": 1,
    "native_group_norm.default": 1,
    "_weight_norm_interface.default": 1,
    **{f"max_pool{d}d_with_indices.default": 1 for d in (2, 3)},
    **{f"adaptive_max_pool{d}d.default": 1 for d in (1, 2, 3)},
}
# Where torch's second derivative is wrong, missing, or (of lgamma) right to nine digits: differences of its first.
NO_SECOND_IN_TORCH = {
    "_weight_norm.default", "_weight_norm_interface.default", "hardsigmoid.default", "lgamma.default",
    "digamma.default",
}  # fmt: skip
INEXACT_IN_TORCH = {"digamma.default": 1e-8, "hardsigmoid.default": 1e-7}  # it keeps a sixth in float32
# Torch differentiates these not even once; graphs hold them for other ends.
NO_FIRST_IN_TORCH = {
    "remainder.Scalar_Tensor", "floor_divide.default", "floor_divide.Scalar", "copy.default", "linspace.Tensor_Scalar",
    "linspace.Scalar_Tensor", "linspace.Tensor_Tensor",
}  # fmt: skip
STEP = 1e-5  # of differences
CONSTANT = {  # positions of the running statistics, which torch does not differentiate
    name: (3, 4)
    for name in ("batch_norm.default", "_native_batch_norm_legit_no_training.default", "instance_norm.default")
}


def overload_of(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def key_of(name):
    """The rule's own name in the table."""
    full = f"aten.{name}".removesuffix(".default")
    return f"aten.{name}" if f"aten.{name}" in RULES else full if full in RULES else full.rpartition(".")[0]


def is_tensor(value):
    return isinstance(value, np.ndarray)


def in_torch(value, needs=True):
    if isinstance(value, np.dtype):
        return getattr(torch, str(value))
    if not is_tensor(value):
        return torch.device(value) if value == "cpu" else value
    return torch.from_numpy(value.copy()).requires_grad_(needs and value.dtype == float)


def computed_overloads(key):
    """The overloads of a rule's operation that compute tensors from tensors or numbers."""
    _, packet, *overload = key.split(".")
    for name in getattr(torch.ops.aten, packet).overloads():
        schema = getattr(getattr(torch.ops.aten, packet), name)._schema
        text = str(schema)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if overload in ([], [name]) and "Tensor" in text and "Dimname" not in text and not writes:
            yield f"{packet}.{name}"


def test_every_rule_and_overload_has_a_case():
    assert set(RULES) == {key_of(name) for name in (*CASES, *NO_CASE)} & set(RULES)
    wanted = {name for key in RULES for name in computed_overloads(key)}
    wanted = {name for name in wanted if not name.endswith((".out", "_out", "_copy.str"))}
    assert wanted - set(NO_CASE) == set(CASES)


class Compared:
    """One call in torch and by its rule: results, and of a weighted sum of them gradient and product."""

    def __init__(self, name, args, kwargs):
        self.name, self.op = name, overload_of(name)
        self.leaves, self.tree = jtu.tree_flatten((args, kwargs), is_leaf=lambda x: x is None)
        real = [n for n, leaf in enumerate(self.leaves) if is_tensor(leaf) and leaf.dtype == float]
        constant = real if name in NO_FIRST_IN_TORCH else CONSTANT.get(name, ())
        self.real = [n for n in real if n not in constant]
        self.vectors = [
            np.cos(np.arange(leaf.size)).reshape(leaf.shape) for leaf in map(self.leaves.__getitem__, self.real)
        ]

    def in_torch(self):
        """Results, gradient, and the gradient's derivative along `vectors`."""
        outputs, gradient, graph = self._gradient_in_torch(0.0)
        if self.name in NO_SECOND_IN_TORCH:
            high, low = (self._gradient_in_torch(h)[1] for h in (STEP, -STEP))
            product = [(a - b) / (2 * STEP) for a, b in zip(high, low, strict=True)]
        else:
            pairs = [(g, torch.from_numpy(v)) for g, v in zip(gradient, self.vectors, strict=True) if g.requires_grad]
            product = [torch.zeros_like(x) for x in graph]
            if pairs:
                slopes, along = zip(*pairs, strict=True)
                with plain_attention():
                    product = torch.autograd.grad(slopes, graph, along, materialize_grads=True)
        as_numpy = lambda parts: [np.asarray(p.detach() if isinstance(p, torch.Tensor) else p) for p in parts]
        return as_numpy(outputs), as_numpy(gradient), as_numpy(product)

    def _gradient_in_torch(self, step):
        tensors = [in_torch(leaf, n in self.real) for n, leaf in enumerate(self.leaves)]
        real = [tensors[n] for n in self.real]
        with torch.no_grad():
            for x, v in zip(real, self.vectors, strict=True):
                x += step * torch.from_numpy(v)
        args, kwargs = jtu.tree_unflatten(self.tree, tensors)
        with plain_attention():
            outputs = self.op(*args, **kwargs)
            self.several = isinstance(outputs, list | tuple)
            outputs = list(outputs)[: COUNTED.get(self.name)] if self.several else [outputs]
            self.dtypes = tuple(str(o.dtype)[6:] if isinstance(o, torch.Tensor) else None for o in outputs)
            smooth = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
            total = sum((weights(o.shape, torch) * torch.sin(o)).sum() for o in smooth)
            if not smooth or not real:
                return outputs, [torch.zeros_like(x) for x in real], real
            return outputs, torch.autograd.grad(total, real, create_graph=True, materialize_grads=True), real

    def by_rule(self):
        positions = [n for n, leaf in enumerate(self.leaves) if is_tensor(leaf)]
        names = [f"x{n}" for n in positions]
        nodes = [Ref(f"x{n}") if n in positions else in_torch(leaf) for n, leaf in enumerate(self.leaves)]
        args, kwargs = jtu.tree_unflatten(self.tree, nodes)
        rule = find(str(self.op), {})
        kwargs = {key: as_data(part) for key, part in kwargs.items()}
        call = Instruction("y", rule, as_data(args), kwargs, self.dtypes, str(self.op), "")
        parts = [
            Instruction(
                f"y{n}", lambda y, n=n: jnp.asarray(y[n] if self.several else y), (Ref("y"),), {}, (dtype,), "", ""
            )
            for n, dtype in enumerate(self.dtypes)
        ]
        program = Program((call, *parts), tuple(names), {}, tuple(Ref(part.name) for part in parts))

        def outputs_of(real):
            leaves = list(self.leaves)
            for n, x in zip(self.real, real, strict=True):
                leaves[n] = x
            return program.run({}, [jnp.asarray(leaves[n]) for n in positions])

        def total(real):
            outputs = [o for o in outputs_of(real) if o.dtype == float]
            return sum((jnp.sum(weights(o.shape, jnp) * jnp.sin(o)) for o in outputs), jnp.zeros(()))

        real = [jnp.asarray(self.leaves[n]) for n in self.real]
        vectors = [jnp.asarray(v) for v in self.vectors]
        gradient, product = jax.jvp(jax.grad(total), (real,), (vectors,))
        return outputs_of(real), gradient, product


def weights(shape, library):
    return library.cos(library.arange(int(np.prod(shape)), dtype=library.float64) * 0.7 + 1).reshape(tuple(shape))


QUICK = {f"{n}.default" for n in ("layer_norm", "convolution", "max_pool2d", "scaled_dot_product_attention", "elu")}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about deprecated overloads
def test_results_gradient_and_product_are_those_of_torch(x64, name):
    for args, kwargs in CASES[name]:
        compared = Compared(name, args, kwargs)
        theirs, ours = compared.in_torch(), compared.by_rule()
        for mine, other in zip(ours[0], theirs[0], strict=True):
            assert mine.shape == other.shape
            assert mine.dtype == other.dtype
            np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13)
        first = INEXACT_IN_TORCH.get(name, 1e-10)
        second = max(first, 1e-8 if name in NO_SECOND_IN_TORCH else 0)
        for mine, other in zip(ours[1], theirs[1], strict=True):
            np.testing.assert_allclose(mine, other, rtol=first, atol=first / 100)
        for mine, other in zip(ours[2], theirs[2], strict=True):
            known = np.isfinite(other)  # at the norm of zeros torch has no number
            np.testing.assert_allclose(np.asarray(mine)[known], other[known], rtol=second, atol=second)
