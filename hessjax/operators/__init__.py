"""From a loss to a symmetric operator."""

from hessjax.operators._hessian import hvp as hvp
from hessjax.operators._operator import Operator as Operator
from hessjax.operators._operator import operator as operator
