# The public face, for type checkers: __init__.py imports each name when it is first asked for.

from dymoe_runtime.bundle.bundle import Bundle as Bundle
from dymoe_runtime.engine.load import load_model as load_model
from dymoe_runtime.engine.load import load_scorer as load_scorer
from dymoe_runtime.engine.model import Model as Model
from dymoe_runtime.engine.model import Scorer as Scorer
from dymoe_runtime.engine.options import RunOptions as RunOptions
from dymoe_runtime.errors import DymoeError as DymoeError
from dymoe_runtime.kernels import load_kernels as load_kernels
from dymoe_runtime.kernels.interface import Kernels as Kernels
from dymoe_runtime.text.generate import Token as Token
from dymoe_runtime.text.generate import generate as generate
from dymoe_runtime.text.generate import generate_async as generate_async
from dymoe_runtime.text.sampling import SamplingParams as SamplingParams
from dymoe_runtime.text.session import Session as Session
from dymoe_runtime.text.tokenizer import Tokenizer as Tokenizer
from dymoe_runtime.tools.likelihood import LogLikelihood as LogLikelihood
from dymoe_runtime.tools.likelihood import log_likelihoods as log_likelihoods
from dymoe_runtime.tools.likelihood import rolling_log_likelihood as rolling_log_likelihood

__version__: str
