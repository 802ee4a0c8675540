"""From a loss to a symmetric operator."""

from hessjax.operators._blocks import map_blocks as map_blocks
from hessjax.operators._blocks import per_block as per_block
from hessjax.operators._blocks import restrict as restrict
from hessjax.operators._compose import compose as compose
from hessjax.operators._compose import deflate as deflate
from hessjax.operators._fisher import fisher as fisher
from hessjax.operators._ggn import ggn as ggn
from hessjax.operators._ggn import ggn_residual as ggn_residual
from hessjax.operators._gradients import empirical_fisher as empirical_fisher
from hessjax.operators._gradients import gradient_covariance as gradient_covariance
from hessjax.operators._hessian import hvp as hvp
from hessjax.operators._ntk import ggn_gram as ggn_gram
from hessjax.operators._ntk import ntk as ntk
from hessjax.operators._operator import Operator as Operator
from hessjax.operators._operator import operator as operator
from hessjax.operators._optax import adam_preconditioner as adam_preconditioner
from hessjax.operators._precondition import precondition as precondition
