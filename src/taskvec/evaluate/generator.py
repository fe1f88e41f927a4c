"""A generator: a language model that reads a query, and whose last state says what to inject.

    z(x) = the state before the generator's head at the last token of what it reads of x

It reads the whole bare prompt, or the query's own words; the same in training and in use. Its weights may be trained
(`Tuning`): a copy of the model then carries them, so that a target that is its own generator stays as it is.

Shapes: n prompts, g width of the states.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from taskvec.errors import InputError, PromptTooLong, VectorMismatch
from taskvec.evaluate.adapters import first_weights, peft, wrapped
from taskvec.evaluate.shared import states_of
from taskvec.hooks import capture
from taskvec.lm import LM, Encoded
from taskvec.sites import Site
from taskvec.vector import ModelId

HEAD = Site("lm_head_in")
ROWS = 16
Reads = Literal["prompt", "query"]
Tunes = Literal["nothing", "lora", "full"]


@dataclass(frozen=True, eq=False)
class Tuning:
    """What was trained of a generator: the weights of a LoRA of some rank, or all weights, by name."""

    kind: Tunes = "nothing"
    rank: int = 0
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Generator:
    """A language model and what it reads of a prompt."""

    lm: LM
    reads: Reads = "prompt"

    @property
    def model(self) -> ModelId:
        """How a saved source names it."""
        return ModelId(id=self.lm.id, revision=self.lm.revision, fingerprint=self.lm.fingerprint)

    def texts(self, target: LM, prompts: Sequence[Encoded]) -> list[Encoded]:
        """What it reads of each prompt of `target`, without an answer that is forced behind it. Raises
        `PromptTooLong` beyond its context, `InputError` for prompts without text."""
        try:
            return [self._text(target, prompt) for prompt in prompts]
        except PromptTooLong as error:
            found = f"{error} (this is the generator, {self.lm.id})"
            raise PromptTooLong("queries that fit the generator's context", found, "shorten them") from None

    def _text(self, target: LM, prompt: Encoded) -> Encoded:
        if self.reads == "prompt" and self.lm.tokenizer_hash == target.tokenizer_hash and prompt.ids:
            return self.lm.encode(Encoded(prompt.ids[: prompt.prompt_length]))
        text = prompt.text if self.reads == "prompt" else prompt.query
        if not text.strip():
            raise InputError("prompts with their text, for a generator", "none", "make them with a prompt format")
        return self.lm.encode(text)

    def states(self, texts: Sequence[Encoded]) -> Float[Tensor, "n g"]:
        """z of each text, in batches. Gradients flow where they are on; else a bench's cells share them."""
        if "shared" in self.lm.proofs and not torch.is_grad_enabled():
            return states_of(self.lm, texts, (HEAD,))[0][HEAD].to(self.lm.device)
        parts = [self._states(texts[i : i + ROWS]) for i in range(0, len(texts), ROWS)]
        return torch.cat(parts)

    def _states(self, texts: Sequence[Encoded]) -> Float[Tensor, "n g"]:
        batch = self.lm.batch(texts, side="left")  # the last tokens stand in the last column
        keep = {"logits_to_keep": 1} if "logits_to_keep" in self.lm.accepts else {}
        with capture(self.lm, [HEAD]) as seen:
            self.lm.forward(batch, **keep)
        states: Tensor = seen[HEAD][:, -1].float()
        return states


def generator_of(target: LM, name: str, reads: Reads) -> Generator:
    """The generator of that alias, folder or Hub id; the target itself for the empty name or its own."""
    own = name in ("", target.id)
    return Generator(target if own else LM.load(name, device=str(target.device)), reads)


def named(target: LM, model: ModelId, reads: Reads, tuning: Tuning) -> Generator:
    """The generator that a saved source names: the target itself where it is that model. Raises `VectorMismatch`
    where what is loaded is another one."""
    lm = target
    if target.fingerprint != model.fingerprint:
        lm = LM.load(model.id, device=str(target.device), revision=model.revision)
    check_generator(lm, model)
    if tuning.weights is not None:
        lm, weights = tunable(lm, tuning.kind, tuning.rank)
        set_weights(weights, tuning.weights)
    return Generator(lm, reads)


def check_generator(lm: LM, model: ModelId) -> None:
    """Refuse a generator that is not the one the vectors were trained with."""
    if lm.fingerprint != model.fingerprint:
        raise VectorMismatch(
            f"the generator it was trained with, {model.id} (fingerprint {model.fingerprint[:12]})",
            f"{lm.id} (fingerprint {lm.fingerprint[:12]})",
            "load that model, or fit again with this one",
        )


def tunable(lm: LM, kind: Tunes, rank: int) -> tuple[LM, dict[str, nn.Parameter]]:
    """A copy of the model with the weights that may be trained, by name: a fresh LoRA's on every linear map, or all."""
    model = copy.deepcopy(lm.model)
    if kind == "lora":
        options: dict[str, Any] = {"lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear"}
        model = wrapped(model, peft().LoraConfig(r=rank, task_type="CAUSAL_LM", **options))
    else:
        model.requires_grad_(True)
    fresh = LM(model, lm.tokenizer, name=lm.id, revision=lm.revision)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return fresh, weights


def start_lora(weights: Mapping[str, nn.Parameter], seed: int) -> None:
    """A LoRA's first weights, from a generator of our own: no change to the model."""
    first_weights(weights, None, torch.Generator().manual_seed(seed))


def set_weights(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into weights of the same names."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])
