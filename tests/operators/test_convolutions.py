"""Truth is the product of the program as the user wrote it; layouts are read from the program handed to XLA."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hessjax as hj
from hessjax.operators._convolutions import channel_last
from hessjax.operators._operator import quadratic_form

NCHW, NHWC = ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC")
# lhs shape, rhs shape, dimension numbers, and what differs from stride 1 and SAME
CASES = {
    "NCHW": ((2, 3, 6, 5), (4, 3, 3, 2), NCHW, {}),
    "NHWC": ((2, 6, 5, 3), (3, 2, 3, 4), NHWC, {}),
    "mixed axes": ((6, 2, 3, 5), (3, 4, 2, 3), ("HNCW", "IOWH", "WCHN"), {}),
    "one dimension": ((2, 3, 9), (4, 3, 3), ("NCH", "OIH", "NCH"), {}),
    "three dimensions": ((2, 2, 4, 5, 3), (3, 2, 2, 3, 1), ("NCDHW", "OIDHW", "NCDHW"), {"padding": "VALID"}),
    "no dimension": ((2, 3), (4, 3), ("NC", "OI", "NC"), {}),
    "strides": ((2, 3, 7, 6), (4, 3, 3, 3), NCHW, {"window_strides": (2, 3)}),
    "kernel dilation": ((2, 3, 7, 8), (4, 3, 2, 3), NCHW, {"rhs_dilation": (3, 2), "padding": "VALID"}),
    "transposed": ((2, 3, 4, 4), (4, 3, 3, 3), NCHW, {"lhs_dilation": (2, 3), "padding": ((1, 2), (2, 1))}),
    "negative padding": ((2, 3, 7, 6), (4, 3, 2, 2), NCHW, {"padding": ((-1, 2), (0, -2))}),
    "groups": ((2, 6, 5, 5), (9, 2, 3, 3), NCHW, {"feature_group_count": 3, "window_strides": (2, 1)}),
    "depthwise": ((2, 5, 5, 4), (3, 3, 1, 8), NHWC, {"feature_group_count": 4}),
    "batch groups": ((6, 2, 5, 5), (9, 2, 3, 3), NCHW, {"batch_group_count": 3}),
    "high precision": ((2, 3, 4, 4), (4, 3, 2, 2), NCHW, {"precision": "highest", "preferred_element_type": "float64"}),
}

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles four times faster


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def convolve(name, kernel, image=None):
    shape, _, numbers, options = CASES[name]
    options = {"window_strides": (1,) * (len(shape) - 2), "padding": "SAME", **options}
    image = normal(0, shape).astype(kernel.dtype) if image is None else image
    return lax.conv_general_dilated(image, kernel, dimension_numbers=numbers, **options)


def loss(name, kernel):
    """Kernel and image both depend on the parameters, so that every kind of derivative convolution is in a product."""
    return jnp.mean(convolve(name, kernel, normal(0, CASES[name][0]) * jnp.sum(kernel)) ** 3)


def product_at(name, kernel, vector):
    return jax.jvp(jax.grad(partial(loss, name)), (kernel,), (vector,))[1]


def product(name, vector):
    return product_at(name, normal(1, vector.shape), vector)


@pytest.fixture(scope="module")
def images():
    """Every case's Hessian product, as written and rewritten, in one program each."""
    with jax.enable_x64(True):
        vectors = {name: normal(2, case[1]) for name, case in CASES.items()}
        every = lambda vectors: {name: product(name, vector) for name, vector in vectors.items()}
        return [jax.tree.map(np.asarray, jit(function)(vectors)) for function in (every, channel_last(every))]


@pytest.mark.parametrize("name", CASES)
def test_product_is_that_of_the_program_as_written(name, images):
    written, rewritten = images[0][name], images[1][name]
    scale = np.max(np.abs(written))
    assert scale > 1e-3
    np.testing.assert_allclose(rewritten, written, rtol=1e-10, atol=1e-12 * scale)


LAYOUT = re.compile(r"stablehlo\.convolution.*dim_numbers = (.*?), window.*batch_group_count = (\d+)")


def layouts(function, *args, platform="cpu"):
    """The layouts of all convolutions in the program that XLA gets, each with its number of batch groups."""
    return LAYOUT.findall(jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text())


def assert_in_place(found, at_least):
    assert len(found) >= at_least
    for numbers, batch_groups in found:
        space = ", ".join(re.findall(r"\d", numbers.split("]")[0]))
        assert numbers == f"[b, {space}, f]x[{space}, i, o]->[b, {space}, f]"
        assert batch_groups == "1"


@pytest.mark.parametrize("name", [name for name in CASES if name != "no dimension"])
def test_every_convolution_is_in_place_on_the_cpu(name, x64):
    kernel = normal(2, CASES[name][1])
    assert_in_place(layouts(channel_last(partial(product, name)), kernel), at_least=3)


def test_other_platforms_get_the_program_as_written(x64):
    kernel = normal(2, CASES["NCHW"][1])
    written = layouts(partial(product, "NCHW"), kernel, platform="cuda")
    found = layouts(channel_last(partial(product, "NCHW")), kernel, platform="cuda")
    assert set(found) == set(written)
    assert all(numbers.startswith(("[b, f,", "[f, b,")) for numbers, _ in found)


@jax.custom_jvp
def with_jvp(kernel):
    return convolve("NCHW", kernel)


@with_jvp.defjvp
def _(primals, tangents):
    return with_jvp(*primals), 7 * convolve("NCHW", *tangents)


@jax.custom_vjp
def with_vjp(kernel):
    return convolve("NCHW", kernel)


with_vjp.defvjp(
    lambda kernel: (convolve("NCHW", kernel), kernel),
    lambda kernel, cotangent: (7 * jax.vjp(partial(convolve, "NCHW"), kernel)[1](cotangent)[0],),
)


def solved(kernel):
    """A linear solve by iteration, whose matrix needs a convolution."""
    matvec = lambda x: x + jnp.mean(convolve("NCHW", kernel * x[0]) * convolve("NCHW", kernel)) * x
    return jax.scipy.sparse.linalg.cg(matvec, normal(0, (1,)), maxiter=2)[0]


square = lambda kernel: convolve("NCHW", kernel)
# functions of one kernel in which the convolution stands inside another program
NESTED = {
    "jit": jax.jit(square),
    "checkpoint": jax.checkpoint(square),
    "scan": lambda k: lax.scan(lambda c, _: (c + convolve("NCHW", c).mean(), None), k, length=2)[0],
    "while": lambda k: lax.while_loop(lambda c: c.max() < 9, lambda c: c + 1 + convolve("NCHW", c).mean() ** 2, k),
    "while condition": lambda k: lax.while_loop(lambda c: jnp.abs(convolve("NCHW", c)).max() < 9, lambda c: 2 * c, k),
    "cond": lambda k: lax.cond(k[0, 0, 0, 0] < 9, square, lambda k: jnp.zeros((2, 4, 6, 5)), k),
    "switch": lambda k: lax.switch(jnp.argmax(k) // 99, [square, lambda k: square(2 * k)], k),
    "map": lambda k: lax.map(square, jnp.stack([k, 2 * k])),
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "linear solve": solved,
    "jit in scan in cond": lambda k: lax.cond(
        k[0, 0, 0, 0] < 9,
        lambda k: lax.scan(lambda c, _: (c + jax.jit(square)(c).mean(), None), k, length=2)[0],
        abs,
        k,
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_convolutions_inside_other_programs_are_rewritten(name, x64):
    kernel = normal(2, CASES["NCHW"][1])
    function = NESTED[name]
    assert_in_place(layouts(channel_last(function), kernel), at_least=1)
    np.testing.assert_allclose(jit(channel_last(function))(kernel), jit(function)(kernel), rtol=1e-10)


@pytest.mark.parametrize("function", [with_jvp, with_vjp])
def test_custom_derivatives_are_kept(function, x64):
    kernel = normal(2, CASES["NCHW"][1])
    gradient = jit(jax.grad(lambda kernel: jnp.sum(channel_last(function)(kernel))))
    expected = 7 * jax.grad(lambda kernel: jnp.sum(square(kernel)))(kernel)
    np.testing.assert_allclose(gradient(kernel), expected, rtol=1e-10)


def test_derivatives_and_batches_of_a_rewritten_program(x64):
    kernel, vector = normal(1, CASES["groups"][1]), normal(2, CASES["groups"][1])

    def forms(transform):
        def form(kernel, vector):
            return jnp.vdot(vector, transform(lambda vector: product_at("groups", kernel, vector))(vector))

        def looped(kernel):
            return lax.scan(lambda total, v: (total + form(kernel, v), None), 0.0, jnp.stack([vector, kernel]))[0]

        both = jnp.stack([kernel, vector]), jnp.stack([vector, kernel])
        derivatives = lambda: (jax.grad(looped)(kernel), jax.jvp(form, (kernel, vector), (vector, kernel)))
        return jit(lambda: (*derivatives(), jax.vmap(form)(*both), jax.vmap(form, (0, None))(both[0], vector)))()

    for got, expected in zip(jax.tree.leaves(forms(channel_last)), jax.tree.leaves(forms(lambda f: f)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12 * float(jnp.max(jnp.abs(expected))))


def test_types_are_kept():
    image, kernel = (jnp.zeros(shape, jnp.bfloat16) for shape in CASES["NCHW"][:2])
    for wide in (None, jnp.float32):
        convolution = partial(lax.conv, window_strides=(1, 1), padding="SAME", preferred_element_type=wide)
        assert jax.eval_shape(channel_last(convolution), image, kernel) == jax.eval_shape(convolution, image, kernel)


def test_a_program_without_convolutions_is_untouched():
    def function(x):
        y = lax.scan(lambda c, _: (jnp.tanh(jax.jit(jnp.cos)(c)), None), x, length=3)[0]
        return jax.nn.relu(y), {"sum": y.sum()}

    texts = []
    for f in (function, channel_last(function)):
        f.__name__ = "function"
        texts.append(jax.jit(f).lower(jnp.ones(4)).as_text())
    assert texts[0] == texts[1]


def test_effects_survive():
    seen = []

    def function(kernel):
        jax.debug.callback(lambda top: seen.append(float(top)), kernel.max())
        double = jax.pure_callback(lambda top: np.asarray(2 * top), jax.ShapeDtypeStruct((), jnp.float32), kernel.max())
        return double * convolve("NCHW", kernel)

    kernel = normal(1, CASES["NCHW"][1]).astype(jnp.float32)
    out = jax.jit(channel_last(function))(kernel)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [float(kernel.max())])
    np.testing.assert_allclose(out, 2 * kernel.max() * convolve("NCHW", kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_sharded_data(axis, x64):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis,))
    kernel = jax.device_put(normal(1, CASES["NCHW"][1]), NamedSharding(mesh, PartitionSpec()))
    image = jax.device_put(normal(0, CASES["NCHW"][0]), NamedSharding(mesh, PartitionSpec("batch")))

    def apply(transform, kernel, image):
        energy = lambda kernel: jnp.sum(jnp.tanh(lax.conv(image, kernel, (1, 1), "SAME")) ** 2)
        return transform(jax.grad(energy))(kernel)

    written = jit(partial(apply, lambda f: f))(kernel, image)
    rewritten = jit(partial(apply, channel_last))(kernel, image)
    np.testing.assert_allclose(rewritten, written, rtol=1e-10, atol=1e-12)
    assert rewritten.sharding == written.sharding


def test_without_jit_a_function_may_look_at_its_values():
    with jax.disable_jit():
        assert channel_last(lambda x: x if x > 0 else -x)(jnp.array(-2.0)) == 2.0


def test_a_rewritten_program_is_not_rewritten_again(x64):
    gradient = jax.grad(partial(loss, "NCHW"))
    once, twice = (
        jax.make_jaxpr(f)(normal(1, CASES["NCHW"][1]))
        for f in (channel_last(gradient), channel_last(channel_last(gradient)))
    )
    assert str(once) == str(twice)


def counted():
    traces = []

    def energy(kernel, image):
        traces.append(1)
        return jnp.mean(jnp.tanh(lax.conv(image, kernel, (1, 1), "SAME")) ** 2)

    return energy, traces, (normal(1, (8, 5, 3, 3)), normal(0, (4, 5, 6, 6)))


def test_one_trace(x64):
    energy, traces, arguments = counted()
    jax.make_jaxpr(channel_last(jax.grad(energy)))(*arguments)
    assert len(traces) == 1


USES = {
    "product": lambda op, key: op(op.like),
    "dense": lambda op, key: op.dense(),
    "eigsh": lambda op, key: hj.eigsh(op, 1, key, which="LA", ncv=6).eigenvalues,
    "lanczos": lambda op, key: hj.lanczos(op, 3, key).diagonal,
    "derivative": lambda op, key: quadratic_form(op, op.like),
    "sum in slices": lambda op, key: (op + op)(op.like),
    "operator of an operator": lambda op, key: hj.operator(lambda v: op(v), op.like)(op.like),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_an_operator_is_rewritten(use, x64, key):
    energy, _, arguments = counted()
    batch_size = 2 if use == "sum in slices" else None
    function = lambda *arguments: USES[use](hj.hvp(energy, batch_size=batch_size)(*arguments), key)
    assert_in_place(layouts(function, *arguments), at_least=2)
