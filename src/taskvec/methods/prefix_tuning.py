"""Prefix-tuning (Li, Liang, arXiv 2101.00190), a rival: trained keys and values before every prompt.

**Idea.** Not a vector: `length` virtual tokens whose keys and values in every layer are trained. A cached few-shot
prompt is such a prefix that was never trained; this is the best one of its length, up to training.

**Formula.** Each attention head reads (1 - rho) of its own result and rho of the prefix': 2 L length d_kv numbers are
trained on the answer's loss with its terminator, behind zero-shot prompts.

**Where we differ.** Through the package peft, without the re-parameterising network. Bounded to `tokens` trained
tokens, about a minute on the default model and two cores.

**Cost.** Whole prompts forward and backward; a query attends to `length` more keys, like a cached prefix.

**When to use it.** When a cache may stand before every prompt, and demonstrations alone do not reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from taskvec.evaluate import Fitting, above_zero, at_least_one
from taskvec.evaluate.adapters import PeftAdapter, bounded, key_shape, peft, train_adapter
from taskvec.evaluate.joint import Joint
from taskvec.lm import LM
from taskvec.tasks import Dev, Train


@dataclass(frozen=True)
class PrefixTuning:
    """Fields.

    - `length`: virtual tokens; `init`: the standard deviation of their first keys and values.
    - `lr`, `steps`, `batch`: AdamW's; `tokens`: trained tokens at most; `queries`: examples a task at most.
    - `check`: steps between looks at dev, the best of which is kept; `n_dev`: dev items used.
    """

    name: ClassVar[str] = "prefix-tuning"
    cites: ClassVar[str] = "arXiv 2101.00190"
    sites: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    length: int = 8
    init: float = 0.5
    lr: float = 3e-2
    steps: int = 100
    batch: int = 16
    tokens: int = 7_000
    queries: int = 256
    check: int = 20
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> PeftAdapter:
        """Train on gold answers, keep the step that is best on dev. Takes one task or many."""
        at_least_one(self, "length", "steps", "batch", "tokens", "queries", "check", "n_dev")
        above_zero(self, "lr")
        joint = Joint.of(train, dev)
        with Fitting.of(lm, self, joint.trains[0], seed=seed) as fitting:
            heads, width = key_shape(lm)
            config = peft().PrefixTuningConfig(
                num_virtual_tokens=self.length,
                num_layers=lm.n_layers,
                num_attention_heads=heads,
                token_dim=heads * width,
                task_type="CAUSAL_LM",
            )
            return train_adapter(fitting, joint, config, bounded(self), init=self.init)
