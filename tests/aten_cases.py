"""For every rule of `hj.from_torch` and every overload it answers for: calls with their arguments, as NumPy arrays.

Floating-point arrays are differentiated with respect to; where a function has a kink, one argument lies on it.
"""

import numpy as np

INF = float("inf")
SIN = np.sin(np.arange(1.0, 241.0) * 1.7)  # no two alike


def f(*shape, at=0, scale=1.0):
    """Numbers between -1 and 1, others for another `at`."""
    return scale * np.roll(SIN, -at)[: int(np.prod(shape))].reshape(shape)


def positive(*shape, at=0):
    return 0.6 + 0.5 * f(*shape, at=at)  # between 0.1 and 1.1


def i(*values):
    return np.array(values)


def call(*args, **kwargs):
    return args, kwargs


X, Y = f(3, 4), f(3, 4, at=50)
UNIT = 0.9 * X
P, Q = positive(3, 4), positive(3, 4, at=50)
LARGE = 1.5 + P
KINKS = np.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 0.3, -0.3, 2.0, -7.0]).reshape(3, 4)
HALVES = np.array([-1.5, -0.5, 0.5, 1.2, 2.5, -2.7, 0.1, 3.5])
SPECIAL = np.array([1.0, np.nan, INF, -INF, -2.0])
MASK = X > 0
BITS, OTHER_BITS = i(1, 2, 12, 255), i(3, 5, 10, 7)
IMAGE, LINE, BLOCK = f(2, 4, 6, 5), f(2, 4, 7), f(1, 2, 4, 5, 4)
TIES = np.round(2 * f(2, 2, 6, 6))  # as after a blank image
WEIGHT, BIAS, MEAN, VARIANCE = f(4, at=9), f(4, at=19), f(4, at=29), positive(4, at=39)
BY_DTYPE = {"dtype": np.dtype("float64")}


def unary(names, *arguments):
    return {f"{name}.default": [call(x) for x in arguments] for name in names.split()}


def binary(names, overload, *pairs):
    return {f"{name}.{overload}": [call(*pair) for pair in pairs] for name in names.split()}


def reduced(name, dims="dim", x=X):
    return {
        f"{name}.default": [call(x)],
        f"{name}.{dims}": [call(x, 1), call(x, -1, True)],
    }


ELEMENTWISE = {
    **unary("sin cos tan atan sinh cosh tanh asinh exp exp2 expm1 neg sigmoid erf erfc square sinc silu mish", X),
    **unary("relu relu6 abs hardswish hardshrink softshrink selu log_sigmoid elu", X, KINKS),
    **unary("hardsigmoid", X, LARGE * 3),
    **unary("hardtanh leaky_relu celu gelu", X, KINKS),
    **unary("asin acos atanh erfinv", UNIT),
    **unary("acosh", LARGE),
    **unary("log log2 log10 log1p sqrt rsqrt reciprocal lgamma", P),
    **unary("digamma", LARGE),
    **unary("floor ceil trunc sign signbit", X, KINKS, HALVES),
    **unary("isnan isinf isfinite", SPECIAL),
    **unary("logical_not", MASK, KINKS),
    **unary("bitwise_not", BITS, MASK),
    **binary("add sub rsub mul div true_divide", "Tensor", (X, P), (X, P[0])),
    **binary("atan2 hypot logaddexp", "default", (X, P), (X, P[0])),
    **binary("maximum minimum fmax fmin", "default", (X, Y), (KINKS, np.round(KINKS))),
    **binary("logical_and logical_or logical_xor", "default", (MASK, Y > 0)),
    **binary("bitwise_and bitwise_or bitwise_xor", "Tensor", (BITS, OTHER_BITS), (MASK, Y > 0)),
    **binary("bitwise_and bitwise_or bitwise_xor", "Scalar", (BITS, 6)),
    **binary("bitwise_and bitwise_or bitwise_xor", "Scalar_Tensor", (6, BITS)),
    **binary("eq ne lt le gt ge", "Tensor", (KINKS, np.round(KINKS))),
    **binary("eq ne lt le gt ge", "Scalar", (KINKS, 0.5)),
    **binary("mul div true_divide", "Scalar", (X, 3), (X, 0.7)),
    **binary("fmod remainder", "Tensor", (X * 5, P), (KINKS, P), (BITS - 5, OTHER_BITS)),
    **binary("fmod remainder", "Scalar", (X * 5, 0.7), (KINKS, -2.0)),
    "remainder.Scalar_Tensor": [call(2.5, P)],
    "floor_divide.default": [call(X * 5, P), call(BITS - 5, OTHER_BITS)],
    "floor_divide.Scalar": [call(X * 5, 0.7), call(BITS - 5, 3)],
    "div.Tensor_mode": [
        *(call(X * 5, P, rounding_mode=mode) for mode in (None, "floor", "trunc")),
        *(call(BITS - 5, OTHER_BITS, rounding_mode=mode) for mode in ("floor", "trunc")),
    ],
    "div.Scalar_mode": [call(X * 5, -0.7, rounding_mode=mode) for mode in (None, "floor", "trunc")],
    "add.Tensor": [call(X, P[0]), call(X, P, alpha=2), call(MASK, MASK)],
    "add.Scalar": [call(X, 2), call(X, 2, 0.5)],
    "sub.Tensor": [call(X, P[0]), call(X, P, alpha=2)],
    "sub.Scalar": [call(X, 2), call(X, 2, 0.5)],
    "rsub.Tensor": [call(X, P[0]), call(X, P, alpha=2)],
    "rsub.Scalar": [call(X, 2), call(X, 2, 0.5)],
    "pow.Tensor_Scalar": [call(KINKS, 2), call(KINKS, 3), call(KINKS, 1), call(KINKS, 0), call(P, 0.5), call(P, -1.5)],
    "pow.Tensor_Tensor": [call(P, X), call(P, X[0])],
    "pow.Scalar": [call(1.7, X)],
    "xlogy.Tensor": [call(X, P)],
    "xlogy.Scalar_Other": [call(X, 1.7)],
    "xlogy.Scalar_Self": [call(1.7, P)],
    "where.self": [call(MASK, X, Y), call(MASK[0], X, Y[:, :1])],
    "where.ScalarOther": [call(MASK, X, 2.0)],
    "where.ScalarSelf": [call(MASK, 2.0, X)],
    "where.Scalar": [call(MASK, 2.0, 3.0)],
    "round.default": [call(HALVES)],
    "round.decimals": [call(X, decimals=1)],
    "addcmul.default": [call(X, Y, P), call(X, Y, P, value=0.5)],
    "addcdiv.default": [call(X, Y, P), call(X, Y, P, value=0.5)],
    "lerp.Scalar": [call(X, Y, 0.3)],
    "lerp.Tensor": [call(X, Y, P)],
    **{f"{name}.default": [call(KINKS, -0.5, 0.5), call(X, -0.3), call(X, None, 0.3)] for name in ("clamp", "clip")},
    **{f"{name}.Tensor": [call(X, Y, P), call(X, Y), call(X, None, Y)] for name in ("clamp", "clip")},
    **binary("clamp_min clamp_max", "default", (KINKS, 0.5)),
    **binary("clamp_min clamp_max", "Tensor", (X, Y)),
    "hardtanh.default": [call(KINKS), call(KINKS, -0.5, 0.5)],
    "masked_fill.Scalar": [call(X, MASK, -INF), call(X, MASK[0], 2.0)],
    "masked_fill.Tensor": [call(X, MASK, np.array(1.3))],
    "gelu.default": [call(X), call(X, approximate="tanh")],
    "leaky_relu.default": [call(KINKS), call(KINKS, 0.3)],
    "prelu.default": [call(KINKS, f(1)), call(IMAGE, WEIGHT), call(f(3), f(1, at=3))],
    "_prelu_kernel.default": [call(KINKS, f(1, 4))],
    "elu.default": [call(KINKS), call(KINKS, 0.5, 1.3, 0.7)],
    "celu.default": [call(KINKS), call(KINKS, 0.5)],
    "softplus.default": [call(KINKS), call(KINKS, 2, 3)],
    "log_sigmoid_forward.default": [call(KINKS)],
    "hardshrink.default": [call(KINKS), call(KINKS, 0.3)],
    "softshrink.default": [call(KINKS), call(KINKS, 0.3)],
    "threshold.default": [call(KINKS, 0.5, 0.2)],
    "glu.default": [call(X), call(f(4, 3), 0)],
    "nan_to_num.default": [call(SPECIAL), call(SPECIAL, 0.5, 2.0, -3.0)],
    "logit.default": [call(0.1 + 0.5 * P), call(np.array([0.01, 0.5, 0.99]), 0.1)],
    **{f"{name}.default": [call(X, 0.5, False)] for name in ("dropout", "feature_dropout", "alpha_dropout")},
    "feature_alpha_dropout.default": [call(X, 0.5, False)],
}

REDUCTIONS = {
    **reduced("sum", "dim_IntList"),
    **reduced("mean"),
    **reduced("prod", "dim_int", P),
    **reduced("max", x=KINKS),
    **reduced("min", x=KINKS),
    **reduced("any", x=MASK),
    **reduced("all", x=MASK),
    "sum.dim_IntList": [call(X, [1]), call(X, [0, -1], True), call(X, None), call(X, [])],
    "sum.default": [call(X), call(BITS, **BY_DTYPE)],
    "nansum.default": [call(SPECIAL[:2]), call(SPECIAL[:2], [0])],
    "mean.default": [call(X), call(BITS, **BY_DTYPE)],
    "mean.dim": [call(X, [1]), call(X, [0, -1], True)],
    "any.dims": [call(MASK, [0, 1])],
    "all.dims": [call(MASK, [0, 1])],
    "amax.default": [call(X, [1]), call(X), call(np.round(X), [0, 1], True)],
    "amin.default": [call(X, [1]), call(X), call(np.round(X), [0, 1], True)],
    "argmax.default": [call(X), call(X, 1), call(X, 0, True)],
    "argmin.default": [call(X), call(X, 1), call(X, 0, True)],
    **{
        f"{n}.dim": [call(X, [1]), call(X, [0], False), call(X, [1], True, True), call(X, None)] for n in ("var", "std")
    },
    **{
        f"{n}.correction": [call(X), call(X, [1], correction=0), call(X, [0, 1], correction=2, keepdim=True)]
        for n in ("var", "std", "var_mean")
    },
    "logsumexp.default": [call(X, [1]), call(X, [0, 1], True)],
    "cumsum.default": [call(X, 1), call(X, -2)],
    "cumprod.default": [call(P, 1), call(P, -2)],
    "sort.default": [call(X), call(X, 0, True)],
    "sort.stable": [call(np.round(X), stable=True), call(np.round(X), stable=True, dim=0, descending=True)],
    "argsort.default": [call(X), call(X, 0, True)],
    "argsort.stable": [call(np.round(X), stable=True), call(np.round(X), stable=True, dim=0, descending=True)],
    "topk.default": [call(X, 2), call(X, 2, 0, False)],
    "linalg_vector_norm.default": [
        *(call(X, order, [1]) for order in (2, 1, 3, INF, -INF)),
        call(X),
        call(X, 2, [0, 1], True),
        call(np.array([[0.0, 0.0], [3.0, 4.0]]), 2, [1]),
    ],
    "norm.Scalar": [call(X), call(X, 3)],
    "norm.ScalarOpt_dim": [call(X, None, [1]), call(X, 1, [0], True)],
    "_softmax.default": [call(X, 1, False), call(X, 0, False)],
    "softmax.int": [call(X, -1), call(X, 0, np.dtype("float64"))],
    "_safe_softmax.default": [call(X, -1), call(np.where([[True], [False], [True]], X, -INF), -1)],
    "_log_softmax.default": [call(X, 1, False)],
    "log_softmax.int": [call(X, -1), call(X, 0, np.dtype("float64"))],
}

SHAPES = {
    "permute.default": [call(IMAGE, [0, 2, -1, 1])],
    "transpose.int": [call(IMAGE, 1, -1)],
    "t.default": [call(X), call(X[0])],
    "unsqueeze.default": [call(X, 1), call(X, -1)],
    "squeeze.default": [call(X[:, None, :1])],
    "squeeze.dim": [call(X[:, None, :1], 1), call(X, 0)],
    "squeeze.dims": [call(X[:, None, :1], [1, -1])],
    "cat.default": [call([X, Y[:2]]), call([X, np.zeros(0), Y[:, :1]], -1)],
    "stack.default": [call([X, Y]), call([X, Y], -1)],
    "flip.default": [call(X, [0, -1])],
    "detach.default": [call(X)],
    "movedim.int": [call(IMAGE, 1, -1)],
    "movedim.intlist": [call(IMAGE, [0, 1], [-1, 0])],
    "sym_size.int": [call(X, 1)],
    "sym_size.default": [call(X)],
    "sym_numel.default": [call(X)],
    "scalar_tensor.default": [call(2.5), call(2, **BY_DTYPE)],
    "tril.default": [call(X), call(IMAGE, -1)],
    "triu.default": [call(X), call(IMAGE, 1)],
    "diagonal.default": [call(X), call(IMAGE, 1, -1, 1)],
    "select.int": [call(X, 1, 2), call(X, 0, -1)],
    "narrow.default": [call(X, 1, 1, 2)],
    "unbind.int": [call(X), call(X, -1)],
    "repeat.default": [call(X, [2, 1, 3])],
    "zeros.default": [call([2, 3]), call([2, 3], **BY_DTYPE)],
    "ones.default": [call([2, 3]), call([2, 3], **BY_DTYPE)],
    "full.default": [call([2, 3], 2.5), call([2, 3], 2, **BY_DTYPE)],
    "new_zeros.default": [call(X, [2]), call(BITS, [2], **BY_DTYPE)],
    "new_ones.default": [call(X, [2]), call(BITS, [2], **BY_DTYPE)],
    "new_full.default": [call(X, [2], 3), call(BITS, [2], 3.5, **BY_DTYPE)],
    "zeros_like.default": [call(X), call(BITS, **BY_DTYPE)],
    "ones_like.default": [call(X), call(BITS, **BY_DTYPE)],
    "full_like.default": [call(X, 3), call(BITS, 3.5, **BY_DTYPE)],
    "eye.default": [call(3)],
    "eye.m": [call(3, 2)],
    **{f"{name}.default": [call(X)] for name in ("clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh")},
    "copy.default": [call(X, Y), call(X, Y[0])],
    "fill.Scalar": [call(X, 2)],
    "fill.Tensor": [call(X, np.array(2.5))],
    "_to_copy.default": [call(X), call(BITS, **BY_DTYPE), call(X, dtype=np.dtype("int64"))],
    "to.dtype": [call(BITS, np.dtype("float64"))],
    "to.device": [call(BITS, "cpu", np.dtype("float64"))],
    "to.dtype_layout": [call(BITS, **BY_DTYPE)],
    "to.other": [call(BITS, X)],
    "type_as.default": [call(BITS, X)],
    **{f"{name}.default": [call(X, [2, -1])] for name in ("view", "reshape", "_unsafe_view", "view_copy")},
    "view.dtype": [call(BITS, np.dtype("float64"))],
    "view_copy.dtype": [call(BITS, np.dtype("float64"))],
    "flatten.using_ints": [call(IMAGE), call(IMAGE, 1), call(IMAGE, 1, 2)],
    "unflatten.int": [call(X, 1, [2, -1]), call(X, -2, [3, 1])],
    "expand.default": [call(X[:, :1], [3, 4]), call(X, [2, -1, 4])],
    "split.Tensor": [call(X, 3, 1), call(X, 2)],
    "split.sizes": [call(X, [1, 3], 1)],
    "split_with_sizes.default": [call(X, [1, 3], -1)],
    "chunk.default": [call(X, 3, 1), call(X, 2)],
    "slice.Tensor": [call(X, 1, 1, 9223372036854775807, 2), call(X, 0, -2), call(X, 1, None, -1)],
    "slice_scatter.default": [call(X, Y[:, :2], 1, 0, 4, 2), call(X, Y[:2], 0, -2)],
    "select_scatter.default": [call(X, Y[0], 0, 1), call(X, Y[:, 0], -1, -1)],
    "roll.default": [call(X, [1]), call(X, [1, -2], [0, 1])],
    "constant_pad_nd.default": [call(X, [1, 2]), call(IMAGE, [1, -1, 0, 2], 0.5)],
    "pad.default": [
        call(X, [1, 2], "constant", 0.5),
        *(call(LINE, [2, 1], mode) for mode in ("reflect", "replicate", "circular")),
        *(call(IMAGE, [2, 1, 0, 1], mode) for mode in ("reflect", "replicate", "circular")),
    ],
    "arange.default": [call(5), call(2.5, **BY_DTYPE)],
    "arange.start": [call(2, 5)],
    "arange.start_step": [call(2, 9, 3), call(1.0, 0.0, -0.25)],
    "linspace.default": [call(0, 1, 5)],
    "linspace.Tensor_Scalar": [call(np.array(0.5), 2, 5)],
    "linspace.Scalar_Tensor": [call(0.5, np.array(2.0), 5)],
    "linspace.Tensor_Tensor": [call(np.array(0.5), np.array(2.0), 5)],
    "unfold.default": [call(LINE, 2, 3, 2), call(X, 0, 2, 1)],
    "pixel_shuffle.default": [call(f(1, 8, 2, 3), 2)],
    "meshgrid.default": [call([X[0], Y[0]])],
    "meshgrid.indexing": [call([X[0], Y[0, :2]], indexing="xy")],
}

INDEXING = {
    "embedding.default": [call(X, i(2, 0, 0)), call(X, i(2, 1, 0), 1), call(X, i(2, 1, 0), 2)],
    **{
        f"{name}.Tensor": [
            call(IMAGE, [None, i(0, 3, 3)]),
            call(IMAGE, [i(0, 1), None, i(1, -1)]),
            call(IMAGE, [i(0, 1)[:, None], i(1, 2, 3)]),
        ]
        for name in ("index", "_unsafe_index")
    },
    **{
        f"{name}.default": [
            call(X, [i(0, 2)], Y[:2]),
            call(X, [i(0, 0), i(1, 1)], Y[0, :2], True),
            call(X, [None, i(1, -1)], Y[:, :2]),
        ]
        for name in ("index_put", "_unsafe_index_put")
    },
    "index_select.default": [call(X, 1, i(3, 0, 0))],
    "gather.default": [call(X, 1, i([0, 3], [1, 1], [2, 0])), call(X, 0, i([0, 2, 1]))],
    "take_along_dim.default": [call(X, i([0, 3], [1, 1], [2, 0]), 1), call(X, i(5, 0))],
    "scatter.src": [
        call(X, 1, i([0, 3], [1, 2]), Y[:2, :2]),
        call(i([1, 2, 3], [4, 5, 6]), 1, i([0, 2], [1, 2]), i([7, 8, 9], [3, 2, 1])),
    ],
    "scatter.value": [call(X, 0, i([0, 2, 1]), 1.5)],
    "scatter_add.default": [
        call(X, 1, i([0, 3, 0], [1, 2, 2]), Y[:2, :3]),
        call(i([1, 2, 3]), 1, i([0, 2]), i([7, 8, 9])),
    ],
    "index_add.default": [call(X, 1, i(0, 3, 0), Y[:, :3]), call(X, 0, i(1), Y[:1], alpha=0.5)],
    "one_hot.default": [call(i(0, 2, 1), 4)],
    "bucketize.Tensor": [call(X, np.sort(Y[0])), call(i(1, 2), i(1, 2, 3), right=True)],
}

PRODUCTS = {
    "mm.default": [call(X, Y.T)],
    "bmm.default": [call(f(2, 3, 4), f(2, 4, 5, at=30))],
    "matmul.default": [call(X, Y.T), call(X, Y[0]), call(X[0], Y[0]), call(f(2, 1, 3, 4), f(5, 4, 2, at=30))],
    "dot.default": [call(X[0], Y[0])],
    "vdot.default": [call(X[0], Y[0])],
    "mv.default": [call(X, Y[0])],
    "outer.default": [call(X[0], Y[:, 0])],
    "ger.default": [call(X[0], Y[:, 0])],
    "linear.default": [call(IMAGE, f(3, 5)), call(X, f(2, 4, at=9), f(2, at=3))],
    "addmm.default": [call(f(3), X, Y.T), call(f(3, 3), X, Y.T, beta=0.5, alpha=2)],
    "baddbmm.default": [call(f(2, 3, 5), f(2, 3, 4), f(2, 4, 5, at=30), beta=0.5, alpha=2)],
    "addmv.default": [call(f(3), X, Y[0]), call(f(3), X, Y[0], beta=0.5, alpha=2)],
    "einsum.default": [call("ij,kj->ik", [X, Y]), call("...c,c->...", [f(2, 3, 4), X[0]])],
    "bilinear.default": [call(f(3, 2), f(3, 4, at=7), f(5, 2, 4, at=11), f(5)), call(f(2), f(4), f(5, 2, 4))],
    "convolution.default": [
        call(LINE, f(6, 4, 3), f(6, at=9), [2], [1], [1], False, [0], 1),
        call(LINE, f(6, 4, 3), None, [1], [0], [2], False, [0], 1),
        call(IMAGE, f(6, 2, 3, 2), f(6, at=9), [2, 1], [1, 0], [1, 2], False, [0, 0], 2),
        call(IMAGE, f(4, 3, 3, 2), f(6, at=9), [2, 3], [1, 0], [1, 2], True, [1, 2], 2),
        call(LINE, f(4, 3, 3), None, [2], [1], [1], True, [1], 1),
        call(BLOCK, f(3, 2, 2, 2, 2), f(3, at=9), [1, 2, 1], [0, 1, 0], [1, 1, 2], False, [0, 0, 0], 1),
        call(BLOCK, f(2, 3, 2, 2, 2), f(3, at=9), [1, 2, 1], [0, 1, 0], [1, 1, 2], True, [0, 1, 0], 1),
    ],
    "max_pool1d.default": [call(LINE, [3]), call(LINE[0], [3], [2], [1], [2], True)],
    **{
        f"{name}.default": [
            call(IMAGE, [2, 3]),
            call(IMAGE, [3, 2], [2, 2], [1, 0], [1, 2], True),
            call(IMAGE[0], [2]),
            call(TIES, [2, 2]),
            call(TIES, [3], [2], [1]),
        ]
        for name in ("max_pool2d", "max_pool2d_with_indices")
    },
    **{
        f"{name}.default": [call(BLOCK, [2, 2, 2]), call(BLOCK, [2], [1, 2, 2], [1, 0, 1], [1], True)]
        for name in ("max_pool3d", "max_pool3d_with_indices")
    },
    "avg_pool1d.default": [call(LINE, [3]), call(LINE, [3], [2], [1], True, False)],
    "avg_pool2d.default": [
        call(IMAGE, [2, 3]),
        call(IMAGE, [3, 2], [2, 2], [1, 0], True, True),
        call(IMAGE, [3, 2], [2, 2], [1, 1], True, False),
        call(IMAGE, [2], [], 0, False, True, 3),
        call(IMAGE[0], [2]),
    ],
    "avg_pool3d.default": [call(BLOCK, [2, 2, 2]), call(BLOCK, [2], [2], [1], True, False)],
    "adaptive_avg_pool1d.default": [call(LINE, [3])],
    **{f"{n}.default": [call(IMAGE, [4, 2])] for n in ("adaptive_avg_pool2d", "_adaptive_avg_pool2d")},
    **{f"{n}.default": [call(BLOCK, [3, 2, 4])] for n in ("adaptive_avg_pool3d", "_adaptive_avg_pool3d")},
    "adaptive_max_pool1d.default": [call(LINE, [3])],
    "adaptive_max_pool2d.default": [call(IMAGE, [4, 2])],
    "adaptive_max_pool3d.default": [call(BLOCK, [3, 2, 4])],
}

NORMS = {
    "native_layer_norm.default": [call(X, [4], WEIGHT, BIAS, 1e-5), call(IMAGE, [6, 5], None, None, 1e-3)],
    "layer_norm.default": [call(X, [4], WEIGHT, BIAS, 1e-5), call(IMAGE, [6, 5])],
    "rms_norm.default": [call(X, [4], WEIGHT, 1e-5), call(X, [4])],
    "group_norm.default": [call(IMAGE, 2, WEIGHT, BIAS, 1e-5), call(LINE, 4)],
    "native_group_norm.default": [call(IMAGE, WEIGHT, BIAS, 2, 4, 30, 2, 1e-5)],
    "batch_norm.default": [
        call(IMAGE, WEIGHT, BIAS, MEAN, VARIANCE, False, 0.1, 1e-5, False),
        call(X, None, None, MEAN, VARIANCE, False, 0.1, 1e-5, False),
    ],
    "_native_batch_norm_legit_no_training.default": [call(IMAGE, WEIGHT, BIAS, MEAN, VARIANCE, 0.1, 1e-5)],
    "instance_norm.default": [
        call(IMAGE, WEIGHT, BIAS, None, None, True, 0.1, 1e-5, False),
        call(LINE, None, None, MEAN, VARIANCE, False, 0.1, 1e-5, False),
    ],
    "_weight_norm.default": [call(X, P[:, :1]), call(X, P[:1], 1)],
    "_weight_norm_interface.default": [call(X, P[:, :1]), call(X, P[:1], 1)],
    "cosine_similarity.default": [call(X, Y), call(X, Y[0], -1)],
}


def attention_heads(heads=2):
    return f(2, heads, 3, 4), f(2, heads, 5, 4, at=20), f(2, heads, 5, 4, at=60)


def cells(gates, biases=True, layers=2, directions=2, size=3, inputs=4):
    """The parameters of a recurrent layer, in torch's order."""
    parameters = []
    for layer in range(layers):
        for _ in range(directions):
            width = inputs if layer == 0 else size * directions
            shapes = [(gates * size, width), (gates * size, size), *[(gates * size,)] * 2 * biases]
            parameters += [0.5 * f(*shape, at=7 * len(parameters)) for shape in shapes]
    return parameters


SEQUENCE, STATE = f(5, 2, 4), f(4, 2, 3, at=80)

LAYERED = {
    "scaled_dot_product_attention.default": [
        call(*attention_heads()),
        call(*attention_heads(), None, 0.0, True),
        call(*attention_heads(), np.arange(15).reshape(3, 5) % 4 > 0, scale=0.3),
        call(*attention_heads(), np.array([[True] * 5, [False] * 5, [True] * 5])),
        call(*attention_heads(), f(3, 5, at=33)),
        call(f(2, 4, 3, 4), *attention_heads()[1:], enable_gqa=True),
    ],
    "lstm.input": [
        call(SEQUENCE, [STATE, 0.5 * STATE], cells(4), True, 2, 0.0, False, True, False),
        call(SEQUENCE, [STATE[:1], STATE[1:2]], cells(4, False, 1, 1), False, 1, 0.0, False, False, False),
    ],
    "gru.input": [call(SEQUENCE.swapaxes(0, 1), STATE, cells(3), True, 2, 0.0, False, True, True)],
    "rnn_tanh.input": [
        call(SEQUENCE, STATE, cells(1), True, 2, 0.0, False, True, False),
        call(SEQUENCE, STATE[:1], cells(1, False, 1, 1), False, 1, 0.0, False, False, False),
    ],
    "rnn_relu.input": [call(SEQUENCE, STATE, cells(1), True, 2, 0.0, False, True, False)],
}

CASES = {**ELEMENTWISE, **REDUCTIONS, **SHAPES, **INDEXING, **PRODUCTS, **NORMS, **LAYERED}

# Overloads that a rule's name covers and that no exported graph holds, or that nothing can compute.
NO_CASE = {
    "eq.Tensor_list": "compares lists, not tensors",
    "ne.Tensor_list": "compares lists, not tensors",
    "mm.dtype": "on CUDA only",
    "bmm.dtype": "on CUDA only",
    "addmm.dtype": "on CUDA only",
    "baddbmm.dtype": "on CUDA only",
    "copy.Dict_Tensor": "TorchScript's",
    "einsum.sublist": "takes no list of tensors from Python",
    "to.prim_Device": "TorchScript's",
    "to.prim_dtype": "TorchScript's",
    "to.prim_other": "TorchScript's",
    "split.default": "TorchScript's",
    "split.str": "TorchScript's",
    "where.default": "the shape of its result depends on values",
    "bucketize.Scalar": "torch returns a number's index by another path",
    "narrow.Tensor": "reads a number out of a tensor",
    "index_put.hacked_twin": "TorchScript's",
    "_unsafe_index_put.hacked_twin": "TorchScript's",
    "empty.memory_format": "its values are those of the memory",
    "empty_like.default": "its values are those of the memory",
}
