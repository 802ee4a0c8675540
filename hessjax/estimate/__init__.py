"""From an operator to densities, traces, diagonals and counts: every number with its error."""

from hessjax.estimate._apply_function import Applied as Applied
from hessjax.estimate._apply_function import apply_function as apply_function
from hessjax.estimate._density import Density as Density
from hessjax.estimate._diagonal import Diagonal as Diagonal
from hessjax.estimate._diagonal import diagonal as diagonal
from hessjax.estimate._frobenius import frobenius_norm as frobenius_norm
from hessjax.estimate._result import Estimate as Estimate
from hessjax.estimate._spectral_density import spectral_density as spectral_density
from hessjax.estimate._summaries import effective_dimension as effective_dimension
from hessjax.estimate._summaries import nuclear_norm as nuclear_norm
from hessjax.estimate._summaries import num_negative as num_negative
from hessjax.estimate._summaries import spectral_entropy as spectral_entropy
from hessjax.estimate._summaries import stable_rank as stable_rank
from hessjax.estimate._trace import trace as trace
from hessjax.estimate._trace_of import logdet as logdet
from hessjax.estimate._trace_of import trace_of as trace_of
