"""Text from a model: continued, mapped or filled.

from xtcli.generate import Options, Sampling, generate
answer = generate(model, tokenizer, ["def "], Options(max_tokens=64, seed=0))
answer.written[0].text
"""

from xtcli.generate.engine import generate, task_of
from xtcli.generate.options import Answer, Options, Written
from xtcli.generate.sampling import Sampling

__all__ = ["Answer", "Options", "Sampling", "Written", "generate", "task_of"]
