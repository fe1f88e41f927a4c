"""A language model seen from outside: its sites, its tokenizer, its forward pass. No hooks here."""

from taskvec.lm.encode import Batch, Encoded, Running
from taskvec.lm.load import ALIASES, Alias
from taskvec.lm.model import LM

__all__ = ["ALIASES", "LM", "Alias", "Batch", "Encoded", "Running"]
