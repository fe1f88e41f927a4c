"""Prompt tuning (Lester, Al-Rfou, Constant, arXiv 2104.08691), a rival: trained embeddings before every prompt.

**Idea.** Not a vector: `length` virtual tokens whose embeddings are trained; the smallest change to a prompt that
gradients can make.

**Formula.** length x d numbers, trained on the answer's loss with its terminator, behind zero-shot prompts.

**Where we differ.** Through the package peft. It starts from a normal of the embeddings' own spread. The logits are
read at the true last token, past the virtual ones. Bounded to `tokens` trained tokens, about a minute on the default
model and two cores; soft prompts are slow to train, and the tables show it.

**Cost.** Whole prompts forward and backward; a query is `length` tokens longer.

**When to use it.** As the weakest trained rival; when only the input of a model can be changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from taskvec.evaluate import Fitting, above_zero, at_least_one
from taskvec.evaluate.adapters import PeftAdapter, bounded, peft, soft_prompt_spread, train_adapter
from taskvec.evaluate.joint import Joint
from taskvec.lm import LM
from taskvec.tasks import Dev, Train


@dataclass(frozen=True)
class PromptTuning:
    """Fields.

    - `length`: virtual tokens.
    - `lr`, `steps`, `batch`: AdamW's; `tokens`: trained tokens at most; `queries`: examples a task at most.
    - `check`: steps between looks at dev, the best of which is kept; `n_dev`: dev items used.
    """

    name: ClassVar[str] = "prompt-tuning"
    cites: ClassVar[str] = "arXiv 2104.08691"
    sites: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    length: int = 8
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
        config = peft().PromptTuningConfig(num_virtual_tokens=self.length, task_type="CAUSAL_LM")
        with Fitting.of(lm, self, joint.trains[0], seed=seed) as fitting:
            return train_adapter(fitting, joint, config, bounded(self), init=soft_prompt_spread(lm))
