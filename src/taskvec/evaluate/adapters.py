"""Rivals that change the model and not an activation, through peft: trained on the same prompts, scored like a vector.

A LoRA lives inside the model's own modules, so packed passes stay an identity (proved again on the adapted model). Soft
prompts and prefixes stand before every prompt: they run the plain way.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.errors import InputError, MissingPackage
from taskvec.evaluate.fitting import Fitting
from taskvec.evaluate.joint import Joint
from taskvec.evaluate.lessons import Lessons, rows_of
from taskvec.lm import LM, Encoded
from taskvec.progress import track
from taskvec.tasks import Split
from taskvec.vector import Origin, TaskVector

BARE = TaskVector(())


@dataclass(frozen=True)
class Training:
    """How an adapter is trained: AdamW, at most `steps` steps of `batch` prompts and `tokens` tokens in all (which
    bounds the time), with a look at dev every `check` steps; the best look is kept."""

    lr: float
    steps: int
    batch: int
    tokens: int
    queries: int
    check: int
    n_dev: int


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """An adapted model: a peft configuration and the adapter's weights."""

    config: Any
    weights: Mapping[str, Tensor]
    origin: Origin

    @property
    def parameters(self) -> int:
        """Numbers trained."""
        return sum(weight.numel() for weight in self.weights.values())

    @contextmanager
    def applied(self, lm: LM) -> Iterator[None]:
        """The model with the adapter; outside it is as before, bit for bit."""
        with adapted(lm, self.config) as trainable:
            with torch.no_grad():
                for name, weight in trainable.items():
                    weight.copy_(self.weights[name])
            yield


def peft() -> Any:
    """The package, imported on use."""
    try:
        import peft as package
    except ImportError:
        raise MissingPackage(
            "the package peft, for this rival", "it is not installed", "run: pip install peft"
        ) from None
    return package


@contextmanager
def adapted(lm: LM, config: Any) -> Iterator[dict[str, nn.Parameter]]:
    """The model with a fresh adapter inside, whose weights are yielded by name. Everything is put back after."""
    base = lm.model
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    _ = lm.fingerprint, lm.inner  # of the model as it is without
    soft = bool(config.is_prompt_learning)
    inside = None
    try:
        inside = wrapped(base, config)
        if soft:
            lm.model = _SoftPrompted(inside)
        with lm.unproved():
            if soft:
                lm.proofs["packed"] = "virtual tokens stand before every prompt"
            yield {name: p for name, p in inside.named_parameters() if p.requires_grad}
    finally:
        lm.model = base
        if inside is not None and not soft:
            inside.unload()
        for name, p in base.named_parameters():
            p.requires_grad = flags[name]
        if hasattr(base, "peft_config"):
            del base.peft_config


def wrapped(base: Any, config: Any) -> Any:
    """The model inside peft's, without a change to the global generator (peft draws its first weights from it)."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name on its way out, and tells what it has mended
        try:
            return peft().get_peft_model(base, config).eval()
        except ValueError as error:
            _put_back(base)
            found = str(error).splitlines()[0]
            raise InputError(
                "modules that the adapter fits", found, "name the model's own, e.g. lora.targets"
            ) from None


def _put_back(base: nn.Module) -> None:
    """The modules that peft had replaced before it gave up."""
    for name, module in list(base.named_modules()):
        if hasattr(module, "base_layer"):
            base.set_submodule(name, module.base_layer)


class _SoftPrompted(nn.Module):
    """A model behind virtual tokens: positions are peft's, and only the real tokens' logits come back."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        self.wrapped = wrapped
        in_input = wrapped.active_peft_config.peft_type == "PROMPT_TUNING"  # a prefix is keys and values: no tokens
        self.virtual_tokens = wrapped.active_peft_config.num_virtual_tokens if in_input else 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)

    def generate(self, **inputs: Any) -> Tensor:
        """As the wrapped model, row by row: padding would stand between the virtual tokens and the prompt."""
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        rows = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # positions are peft's business here
            for row, real in zip(ids, mask, strict=True):
                alone = row[real][None]
                out = self.wrapped.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **inputs)
                rows.append(out[0, alone.shape[1] :])
        new = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=inputs["pad_token_id"])
        return torch.cat([ids, new], dim=1)

    def forward(self, **inputs: Any) -> Any:
        """As the wrapped model, without position ids."""
        inputs.pop("position_ids", None)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        out = self.wrapped(**inputs)
        if not inputs.get("logits_to_keep"):
            out.logits = out.logits[:, -tokens.shape[1] :]
        return out


def train_adapter(
    fitting: Fitting, joint: Joint, config: Any, how: Training, *, init: float | None = None
) -> PeftAdapter:
    """Train on gold answers with their terminator behind zero-shot prompts, of one task or many. `init`: the standard
    deviation of a soft prompt's first weights (None: LoRA's own start). Raises `InputError` where no look at dev is
    finite."""
    lm = fitting.lm
    rows, looked = joint.rows(how.queries, seed=fitting.seed), joint.looks(how.n_dev)
    joint.count(fitting, rows, looked)
    generator = torch.Generator().manual_seed(fitting.seed)
    with lm.frozen(), adapted(lm, config) as weights:
        first_weights(weights, init, generator)
        lessons, looks = (_lessons(lm, splits) for splits in (rows, looked))
        best, found = _descend(lessons, looks, weights, how, generator)
    if best is None:
        raise InputError("a learning rate that trains", f"no finite dev loss with {fitting.method}", "lower its lr")
    count = sum(weight.numel() for weight in best.values())
    return PeftAdapter(config, best, joint.origin(fitting, {**found, "parameters": count}))


def _lessons(lm: LM, splits: Sequence[Split]) -> Lessons:
    """Whole prompts with gradients: nothing before an edited token may be kept, every weight's change reaches it."""
    return Lessons.together(lm, rows_of(lm, splits), whole=True)


def first_weights(weights: Mapping[str, nn.Parameter], init: float | None, generator: torch.Generator) -> None:
    """First weights from a generator of our own: LoRA's A uniform as Kaiming, its B zero; soft prompts normal."""
    with torch.no_grad():
        for name, weight in weights.items():
            if init is not None:
                fresh = init * torch.randn(weight.shape, generator=generator)
            elif "lora_A" in name or "lora_embedding_A" in name:
                bound = 1 / math.sqrt(weight[0].numel())
                fresh = bound * (2 * torch.rand(weight.shape, generator=generator) - 1)
            else:
                fresh = torch.zeros(weight.shape)
            weight.copy_(fresh)


def _descend(
    lessons: Lessons, looks: Lessons, weights: Mapping[str, nn.Parameter], how: Training, generator: torch.Generator
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """The weights of the best look at dev, and what happened."""
    n = len(lessons.targets)
    long = [len(p) + len(t) for p, t in zip(lessons.engine.prompts, lessons.targets, strict=True)]
    batch = min(how.batch, n)
    steps = max(1, min(how.steps, int(how.tokens / (batch * sum(long) / n))))
    optimizer = torch.optim.AdamW(weights.values(), lr=how.lr, weight_decay=0.0)
    best, best_loss, step = None, float("inf"), 0
    for step in track(range(1, steps + 1), "adapter", steps):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * min(1.0, 2 * (1 - (step - 1) / steps))  # level, then down to 0
        optimizer.zero_grad()
        lessons.descend([BARE], torch.randperm(n, generator=generator)[:batch].tolist())
        optimizer.step()
        if step % how.check == 0 or step == steps:
            (loss,) = looks.mean_losses([BARE])
            if loss < best_loss:
                best, best_loss = {k: w.detach().cpu().clone() for k, w in weights.items()}, loss
    return best, {"steps": step, "dev_loss": best_loss if best is not None else None}


def bounded(method: Any) -> Training:
    """The training fields of a rival."""
    return Training(method.lr, method.steps, method.batch, method.tokens, method.queries, method.check, method.n_dev)


@torch.no_grad()
def key_shape(lm: LM) -> tuple[int, int]:
    """(heads, width) of a layer's cached keys: read off a cache, not off a configuration."""
    batch = lm.batch([Encoded((0,))])
    keys = lm.call(**lm.inputs(batch), use_cache=True).past_key_values.layers[0].keys
    return keys.shape[1], keys.shape[-1]


def soft_prompt_spread(lm: LM) -> float:
    """The standard deviation of the model's embeddings: where a soft prompt starts."""
    weight: Tensor = lm.model.get_input_embeddings().weight
    return float(weight.detach().float().std())
