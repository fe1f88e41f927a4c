"""LM: a Hugging Face causal language model and its tokenizer, with named sites. It registers no hooks.

Shapes: B rows, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from taskvec.errors import InputError, MissingSite, PromptTooLong
from taskvec.lm.encode import Batch, Encoded, Running, token_roles
from taskvec.lm.identity import fingerprint, tokenizer_hash
from taskvec.lm.load import load, on_device, parse_dtype
from taskvec.lm.structure import Block, find_blocks, in_width, out_width
from taskvec.prompts import Prompt, PromptFormat
from taskvec.sites import Site

Text = str | Prompt | Encoded
# What a checkpoint's generation_config.json may set, and greedy decoding must not obey.
_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "top_k")),
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None},
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
}


@dataclass(eq=False)
class Meter:
    """Tokens and forward passes counted while it is open."""

    tokens: int = 0
    passes: int = 0


@dataclass(frozen=True, eq=False)
class Point:
    """The module behind a site, and whether the site is its input or its output."""

    module: nn.Module
    side: Literal["in", "out"]


class LM:
    """A frozen causal language model.

    `model` is any transformers causal LM, already loaded (quantised, sharded and PEFT-wrapped ones too); `tokenizer`
    may be None where prompts carry embeddings. The model is put into evaluation mode; nothing else about it is changed.
    `proofs` keeps what was proved about it at first use (see `hooks.prove` and `replay.packs`). `answers_numbers` is
    True where an answer is one number, the model's only output (a function learner), not tokens.
    """

    answers_numbers = False

    def __init__(
        self, model: Any, tokenizer: Any = None, *, name: str | None = None, revision: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.revision = model.eval(), tokenizer, revision
        self.id: str = name or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
        self.config = model.config.get_text_config()
        self.blocks: tuple[Block, ...] = find_blocks(model, self.config.num_hidden_layers, self.n_heads)
        self.running: Running | None = None
        self.proofs: dict[str, Any] = {}
        self._meters: list[Meter] = []

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> "LM":
        """The model of that alias (`taskvec models` lists them), folder or Hub id."""
        wanted = dtype if isinstance(dtype, torch.dtype) else parse_dtype(dtype)
        model, tokenizer, found = load(name, revision=revision, dtype=wanted)
        if device is not None:
            model = on_device(model, device)
        return cls(model, tokenizer, name=name, revision=found)

    # --- what the model is -------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Number of query heads of a layer."""
        return int(self.config.num_attention_heads)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def max_length(self) -> int | None:
        """The context in tokens, where the model states one."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the model's own forward, in order."""
        return tuple(inspect.signature(self.inner.forward).parameters)

    @cached_property
    def accepts(self) -> frozenset[str]:
        """The same as a set."""
        return frozenset(self.arguments)

    @cached_property
    def inner(self) -> Any:
        """The transformers model itself: the wrapped one where `model` is PEFT's."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of eight values of every weight, rounded to bfloat16 (so that a cast of the
        same checkpoint keeps it). A full hash would cost seconds; this one changes with any training."""
        return fingerprint(self.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer (empty without one)."""
        return tokenizer_hash(self.tokenizer)

    # --- sites -------------------------------------------------------------------------------------------------------

    def sites(self) -> tuple[Site, ...]:
        """Every site of the model, heads taken whole."""
        kinds: tuple[Literal["resid", "attn", "mlp", "heads"], ...] = ("resid", "attn", "mlp", "heads")
        layered = [Site(kind, layer) for layer in range(self.n_layers) for kind in kinds]
        return tuple(s for s in (Site("embed"), *layered, Site("lm_head_in")) if self._point(s) is not None)

    def point(self, site: Site) -> Point:
        """The module behind a site. Raises `MissingSite` where the model has none."""
        if site.layer is not None and site.layer >= self.n_layers:
            raise MissingSite(
                f"a layer from 0 to {self.n_layers - 1} of {self.id}", str(site), "name a layer the model has"
            )
        if site.head is not None and site.head >= self.n_heads:
            raise MissingSite(f"a head from 0 to {self.n_heads - 1} of {self.id}", str(site), "name a head it has")
        point = self._point(site)
        if point is None:
            raise MissingSite(f"{site} in {type(self.model).__name__}", "no such part", "name another site")
        return point

    def width(self, site: Site) -> int:
        """The width of the activations at a site."""
        point = self.point(site)
        if site.kind == "heads":
            whole = in_width(point.module)
            return whole if site.head is None else whole // self.n_heads
        if site.kind == "lm_head_in":
            return in_width(point.module)
        projection = self.blocks[0].out_projection
        return out_width(projection) if projection is not None else int(self.config.hidden_size)

    def _point(self, site: Site) -> Point | None:
        if site.kind == "lm_head_in":
            head = self.model.get_output_embeddings()
            return None if head is None else Point(head, "in")
        block = self.blocks[site.layer or 0]
        modules: dict[str, nn.Module | None] = {
            "embed": block.module,
            "resid": block.module,
            "attn": block.attn,
            "mlp": block.mlp,
            "heads": block.out_projection,
        }
        module = modules[site.kind]
        return None if module is None else Point(module, "in" if site.kind in ("embed", "heads") else "out")

    # --- text --------------------------------------------------------------------------------------------------------

    def encode(self, prompt: Text) -> Encoded:
        """The prompt in tokens, with the tokens of each role. Raises `PromptTooLong` beyond the model's context."""
        if isinstance(prompt, Encoded):
            return self._fitting(prompt)
        if isinstance(prompt, str):
            prompt = Prompt(prompt)
        ids, offsets = self._tokenize(prompt.text, prompt.special_tokens)
        query = next((prompt.text[span.start : span.stop] for span in prompt.spans if span.role == "input"), "")
        return self._fitting(Encoded(ids, None, token_roles(prompt, offsets), text=prompt.text, query=query))

    def answer_ids(self, prompt: Prompt, output: str, format: PromptFormat, *, terminator: bool) -> tuple[int, ...]:
        """The tokens of an answer behind `prompt`, with or without its terminator.

        They are cut from the tokens of the whole text, followed by the start of a next example, so that spaces and line
        ends merge as they do in a few-shot prompt. Only where the answer's first characters merge into the prompt's
        last token is the answer encoded by itself: that is what the model, given the prompt, has to produce.
        """
        stop = len(prompt.text) + len(format.answer(output)) + (len(format.terminator) if terminator else 0)
        known, _ = self._tokenize(prompt.text, prompt.special_tokens)
        ids, offsets = self._tokenize(prompt.text + format.following(output), prompt.special_tokens)
        if ids[: len(known)] == known:
            after = [i for i, (start, end) in zip(ids, offsets, strict=True) if start < stop and end > start]
            before = sum(1 for _, (start, end) in zip(known, offsets, strict=False) if end > start)
            return tuple(after[before:])
        alone = format.answer(output) + (format.terminator if terminator else "")
        return self._tokenize(alone, False)[0]

    def chat_format(self, instruction: str = "") -> PromptFormat:
        """The tokenizer's chat template as a prompt format: demonstrations are earlier turns of the conversation."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise InputError("a tokenizer with a chat template", f"none in {self.id}", "use --format qa or arrow")
        system = [{"role": "system", "content": instruction}] if instruction else []
        turns = [[("{input}", "{output}")], [("\x01", "\x02"), ("{input}", "{output}")]]
        one, two = (self._chat(system, pairs) for pairs in turns)
        # one = header + turn; two = header + turn + turn, once its first turn's placeholders are put back.
        two = two.replace("\x01", "{input}").replace("\x02", "{output}")
        turn = two[len(one) :]
        header = one[: len(one) - len(turn)]
        if not turn or header + turn != one or one + turn != two:
            found = "turns that depend on their place"
            raise InputError("a chat template of equal turns", found, "write the template out with --format")
        return PromptFormat(turn, header, "chat", special_tokens=False)

    def _chat(self, system: list[dict[str, str]], pairs: list[tuple[str, str]]) -> str:
        turns = [
            {"role": role, "content": c} for pair in pairs for role, c in zip(("user", "assistant"), pair, strict=True)
        ]
        return str(self.tokenizer.apply_chat_template(system + turns, tokenize=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special tokens shown, blanks untouched."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""
        ends = [self.model.generation_config.eos_token_id, getattr(self.tokenizer, "eos_token_id", None)]
        return frozenset(i for end in ends if end is not None for i in (end if isinstance(end, list) else [end]))

    def _tokenize(self, text: str, special: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        if self.tokenizer is None:
            raise InputError("a tokenizer", f"{self.id} was loaded without one", "pass encoded prompts")
        out = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return tuple(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]

    def _fitting(self, prompt: Encoded) -> Encoded:
        if self.max_length is not None and len(prompt) > self.max_length:
            found = f"{len(prompt)} tokens"
            raise PromptTooLong(
                f"a prompt of at most {self.max_length} tokens", found, "use fewer shots or shorter inputs"
            )
        return prompt

    # --- running -----------------------------------------------------------------------------------------------------

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """Count the tokens and passes computed inside."""
        meter = Meter()
        self._meters.append(meter)
        try:
            yield meter
        finally:
            self._meters.remove(meter)

    def charge(self, tokens: int) -> None:
        """Count tokens that were computed for an earlier, equal request."""
        for meter in self._meters:
            meter.tokens += tokens

    @contextmanager
    def announced(self, prompts: Sequence[Encoded]) -> Iterator[None]:
        """Tell `inject` which prompts the model runs on inside."""
        before, self.running = self.running, Running(tuple(prompts))
        try:
            yield
        finally:
            self.running = before

    @contextmanager
    def unproved(self) -> Iterator[None]:
        """Inside, packed passes are proved anew: for a model that was changed. What was known before counts after."""
        kept = self.proofs
        self.proofs = {name: proof for name, proof in kept.items() if name not in ("packed", "staggered", "shared")}
        try:
            yield
        finally:
            self.proofs = kept

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight takes part in gradients inside: a backward pass then costs about a forward one. Restored after."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        for p in trainable:
            p.requires_grad = False
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad = True

    def call(self, **inputs: Any) -> Any:
        """The model's own forward, counted. Arguments it does not know are an error of ours."""
        shape = inputs["input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"].shape
        for meter in self._meters:
            meter.tokens += shape[0] * (shape[1] + getattr(self.model, "virtual_tokens", 0))
            meter.passes += 1
        return self.model(**inputs)

    def batch(self, prompts: Sequence[Text], *, side: Literal["left", "right"] = "right") -> Batch:
        """The prompts in one padded batch."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return Batch.of([self.encode(p) for p in prompts], pad=0 if pad is None else pad, side=side)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """A batch as arguments of the model: ids or embeddings, mask, and position ids from the mask."""
        mask = batch.mask.to(self.device)
        out: dict[str, Any] = {"attention_mask": mask}
        if batch.ids is not None:
            out["input_ids"] = batch.ids.to(self.device)
        elif batch.embeds is not None:
            out["inputs_embeds"] = batch.embeds.to(self.device, self.dtype)
        if "position_ids" in self.accepts:
            out["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        return out

    def forward(self, batch: Batch, **extra: Any) -> Float[Tensor, "B T V"]:
        """Logits of every token, without a cache. Inside `inject` the vector acts as its `where` says."""
        with self.announced(batch.prompts):
            return self.call(**self.inputs(batch), use_cache=False, **extra).logits  # type: ignore[no-any-return]

    @overload
    def generate(self, prompts: Text, *, max_new_tokens: int = ..., stop: str | None = ...) -> str: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[Text], *, max_new_tokens: int = ..., stop: str | None = ...) -> list[str]: ...
    def generate(
        self, prompts: Text | Sequence[Text], *, max_new_tokens: int = 32, stop: str | None = None
    ) -> str | list[str]:
        """Greedy continuations by transformers' own `generate`, cut at `stop` and at the model's end tokens."""
        if isinstance(prompts, str | Prompt | Encoded):
            return self.generate([prompts], max_new_tokens=max_new_tokens, stop=stop)[0]
        rows = self.generate_ids(prompts, max_new_tokens=max_new_tokens, stop=stop)
        texts = [self.decode(row) for row in rows]
        return texts if stop is None else [text.split(stop, 1)[0] for text in texts]

    def generate_ids(
        self, prompts: Sequence[Text], *, max_new_tokens: int, stop: str | None = None, use_cache: bool = True
    ) -> list[list[int]]:
        """The new tokens of each prompt, without end tokens."""
        batch = self.batch(prompts, side="left")
        start = batch.mask.shape[1] if batch.ids is not None else 0
        options = {"stopping_criteria": [partial(self._stopped, stop, start)]} if stop else {}
        pad = getattr(self.tokenizer, "pad_token_id", None)
        inputs = self.inputs(batch)
        inputs.pop("position_ids", None)  # generate makes them from the mask itself
        with self.announced(batch.prompts), torch.no_grad():
            out = self.model.generate(
                **inputs,
                **options,
                **_NEUTRAL,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                pad_token_id=0 if pad is None else pad,
                use_cache=use_cache,
            )
        return [self.before_end(row) for row in out[:, start:].tolist()]

    def _stopped(self, stop: str, start: int, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows have `stop` in what they wrote from `start` on. Read off the text: transformers' own stop strings
        need every token of the vocabulary to have a text of its own."""
        done = [stop in self.decode(row) for row in ids[:, start:].tolist()]
        return torch.tensor(done, device=ids.device)

    def before_end(self, ids: Sequence[int]) -> list[int]:
        """The tokens before the first end token."""
        return list(ids[: next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))])
