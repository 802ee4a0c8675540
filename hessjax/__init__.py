"""Curvature of neural networks in JAX: Hessians, their eigenpairs and their spectra, in one compiled program."""

__version__ = "0.1.0"

from hessjax._model import Model as Model
from hessjax.interop import as_lineax as as_lineax
from hessjax.interop import as_scipy as as_scipy
from hessjax.interop import check_hvp as check_hvp
from hessjax.interop import from_equinox as from_equinox
from hessjax.interop import from_flax as from_flax
from hessjax.interop import from_haiku as from_haiku
from hessjax.interop import from_keras as from_keras
from hessjax.interop import from_tensorflow as from_tensorflow
from hessjax.interop import from_torch as from_torch
from hessjax.interop import load_params as load_params
from hessjax.interop import save_params as save_params
from hessjax.interop import torch_operator as torch_operator
from hessjax.krylov import Eigenpairs as Eigenpairs
from hessjax.krylov import Lanczos as Lanczos
from hessjax.krylov import Solution as Solution
from hessjax.krylov import eigsh as eigsh
from hessjax.krylov import lanczos as lanczos
from hessjax.krylov import memory_estimate as memory_estimate
from hessjax.krylov import solve as solve
from hessjax.operators import Operator as Operator
from hessjax.operators import adam_preconditioner as adam_preconditioner
from hessjax.operators import compose as compose
from hessjax.operators import deflate as deflate
from hessjax.operators import empirical_fisher as empirical_fisher
from hessjax.operators import fisher as fisher
from hessjax.operators import ggn as ggn
from hessjax.operators import ggn_gram as ggn_gram
from hessjax.operators import ggn_residual as ggn_residual
from hessjax.operators import gradient_covariance as gradient_covariance
from hessjax.operators import hvp as hvp
from hessjax.operators import map_blocks as map_blocks
from hessjax.operators import ntk as ntk
from hessjax.operators import operator as operator
from hessjax.operators import per_block as per_block
from hessjax.operators import precondition as precondition
from hessjax.operators import restrict as restrict
from hessjax.training import CurvatureState as CurvatureState
from hessjax.training import edge_of_stability as edge_of_stability
from hessjax.training import track_curvature as track_curvature
