"""From and to the neighbours: other frameworks' models, SciPy and lineax."""

from hessjax.interop._check import check_hvp as check_hvp
from hessjax.interop._equinox import from_equinox as from_equinox
from hessjax.interop._files import load_params as load_params
from hessjax.interop._files import save_params as save_params
from hessjax.interop._flax import from_flax as from_flax
from hessjax.interop._from_torch import from_torch as from_torch
from hessjax.interop._from_torch import torch_operator as torch_operator
from hessjax.interop._haiku import from_haiku as from_haiku
from hessjax.interop._keras import from_keras as from_keras
from hessjax.interop._lineax import as_lineax as as_lineax
from hessjax.interop._scipy import as_scipy as as_scipy
from hessjax.interop._tensorflow import from_tensorflow as from_tensorflow
