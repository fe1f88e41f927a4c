"""Tiny random causal language models of many families, a tokenizer and tasks: built in memory, no download."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from taskvec.lm import LM, Encoded
from taskvec.prompts import Example, PromptFormat
from taskvec.tasks import Task, TaskSpec

VOCABULARY = 200
WINDOW = 16
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MULTI_HEAD = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
_GPT2: dict[str, Any] = {**_COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
_FALCON: dict[str, Any] = {**_COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_WINDOWED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "head_dim": 12,  # not hidden_size / heads
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}


def _gpt_neo(window: int) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": window,
        "max_position_embeddings": 512,
    }


_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # the twelve main families
    "llama": ("Llama", {**_LLAMA, "attention_bias": True}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 20}),
    "gemma3": ("Gemma3", {**_LLAMA, **_WINDOWED, "hidden_size": 40, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", {**_MULTI_HEAD, "hidden_size": 48}),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "opt": ("OPT", {**_MULTI_HEAD, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("Phi3", _LLAMA),
    "olmo2": ("Olmo2", _LLAMA),
    "falcon": ("Falcon", {**_FALCON, "bias": True}),
    "mixtral": ("Mixtral", {**_LLAMA, **_MOE, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {**_LLAMA, **_MOE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 12}),
    # more shapes
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": WINDOW, "head_dim": 12, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**_LLAMA, **_WINDOWED, "query_pre_attn_scalar": 12}),
    "falcon_new": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "phi": ("Phi", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "qwen2": ("Qwen2", _LLAMA),
    # what a block adds is not attn + mlp here, though it packs
    "granite": ("Granite", {**_LLAMA, "residual_multiplier": 0.5}),
    # families that cannot be packed
    "bloom": ("Bloom", {**_COMMON, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": ("Mpt", {**_COMMON, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 512}),
    "gpt_neo": ("GPTNeo", _gpt_neo(8)),
    "gpt_neo_wide": ("GPTNeo", _gpt_neo(64)),
    "falcon_alibi": ("Falcon", {**_FALCON, "alibi": True}),
}
DEVICE = os.environ.get("TASKVEC_TEST_DEVICE", "cpu")
"""Where the random models run: `TASKVEC_TEST_DEVICE=cuda` tries methods and engines on a GPU."""
MAIN = (
    "llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "gptj", "opt", "phi3", "olmo2", "falcon", "mixtral", "qwen3_moe",
)  # fmt: skip
UNPACKED = ("bloom", "mpt", "gpt_neo", "gpt_neo_wide", "falcon_alibi")
"""Families with ALiBi or local attention, which the engine must refuse to pack."""
PACKED = tuple(name for name in _CONFIGS if name not in UNPACKED)
ADDITIVE = tuple(name for name in _CONFIGS if name not in ("granite", "bloom", "mpt"))
"""Families where attn[l] + mlp[l] is what block l adds to the residual stream."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator at a seed inside, and untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: on matrices this small, a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str) -> Any:
    """A fresh random model of that family, float32. Not cached: the caller may change it."""
    family, settings = _CONFIGS[name]
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**settings)
    with seeded(zlib.crc32(name.encode())):
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomize(model)
    model.config._name_or_path = f"tiny-{name}"
    return model.to(DEVICE).eval()


def randomize(model: nn.Module) -> None:
    """Weights large enough to tell everything apart: no zero bias, no norm at one, every matrix of gain above one."""
    for weight in model.parameters():
        if weight.dim() >= 2:
            nn.init.normal_(weight, std=0.25)
        elif float(weight.detach().std(correction=0)) == 0.0 and float(weight.detach()[0]) == 1.0:
            nn.init.normal_(weight, mean=1.0, std=0.3)
        else:
            nn.init.normal_(weight, std=0.3)


ARCHITECTURES: dict[str, Callable[[], Any]] = {name: partial(build, name) for name in _CONFIGS}

_TRAINING = (
    "red -> blue\ngreen -> yellow\nblack -> white\nwalk -> walked\ntalk -> talked\njump -> jumped\n",
    "Q: walk\nA: walked\n\nQ: talk\nA: talked\n\nQ: red\nA: not good at all\n\n",
    "good -> very good\nbad -> not good\nfine -> good\nfilm 12 -> bad\nfilm 34 -> good\n",
)


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of printable ASCII and a few merges, with offsets, `<pad>` and `<eos>`."""
    raw = Tokenizer(models.BPE(unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    # the byte-level names of printable ASCII, blank and line end
    alphabet = [*(chr(i) for i in range(33, 127)), "\u0120", "\u010a"]
    trainer = trainers.BpeTrainer(
        vocab_size=180, special_tokens=[PAD, EOS, UNK], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_TRAINING, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNK)


@cache
def tiny_lm(name: str) -> LM:
    """The cached LM of a family. Tests must not change its weights."""
    return LM(build(name), tokenizer(), name=f"tiny-{name}")


def fresh_lm(name: str) -> LM:
    """An LM of its own, with nothing proved yet."""
    return LM(build(name), tokenizer(), name=f"tiny-{name}")


def tiny_task(
    *, labels: bool = False, shots: int = 4, name: str = "tiny", n_test: int = 12, format: str = "arrow"
) -> Task:
    """Sixty short examples: open (reversed words), or with three labels of one to several tokens.
    In the format arrow all answers begin with the blank."""
    stems = [f"{word}{i}" for word in ("red", "walk", "film ", "q") for i in range(15)]
    if labels:
        names = ("good", "bad", "not good at all")
        examples = [Example(stem, names[i % 3]) for i, stem in enumerate(stems)]
    else:
        names = None
        examples = [Example(stem, stem[::-1].strip()) for stem in stems]
    spec = TaskSpec(name, format=PromptFormat.named(format), shots=shots, labels=names)
    return Task.from_examples(spec, examples, n_test=n_test)


def random_ids(length: int, seed: int) -> tuple[int, ...]:
    """Ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 170, (length,), generator=generator).tolist())


def random_prompts(lengths: Sequence[int], seed: int = 0, *, shared: int = 0) -> list[Encoded]:
    """Prompts of these lengths, the first `shared` tokens equal, with roles `mark` (one token) and `pair` (two)."""
    common = random_ids(shared, seed + 999)
    return [
        Encoded(
            common + random_ids(length - shared, 1000 * seed + i),
            roles={"mark": (length - 2,), "pair": (length - 3, length - 1)},
        )
        for i, length in enumerate(lengths)
    ]


def random_vector(width: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A Gaussian vector from a generator of its own."""
    return scale * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def count_hooks(model: nn.Module) -> int:
    """How many hooks are registered on a model's modules."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
