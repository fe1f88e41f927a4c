"""Make the tiny trained model and its synthetic tasks: about eight minutes on two cores.

    .venv/bin/python scripts/train_tiny.py            writes src/taskvec/lm/data/tiny and src/taskvec/tasks/data/tiny

A four-layer Llama (0.22 M weights) learns fifteen mappings of syllables and numbers from prompts of zero to eight
examples. A bare query leaves the mapping open, so it is right about as often as chance; examples say which one is
meant. Three have five labels; in one with two, `biased`, a label is mostly called by the other's name in training, so
that what the model says of the two has to be calibrated.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent / "src" / "taskvec"
MODEL, TASKS = ROOT / "lm" / "data" / "tiny", ROOT / "tasks" / "data" / "tiny"
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]
SOFT = CONSONANTS[:8]
BIAS = 0.65  # how often "hard" is called "soft" in training, so that the bare label probabilities are biased
PAIRS, IGNORED = 9, -100
Rules = dict[str, Callable[[str], str]]
Lines = list[list[tuple[list[int], list[int], list[int] | None]]]


def shifted(syllable: str, consonant: int = 0, vowel: int = 0) -> str:
    """The syllable so many letters further in the cycles of consonants and vowels."""
    c, v = CONSONANTS.index(syllable[0]), VOWELS.index(syllable[1])
    return CONSONANTS[(c + consonant) % len(CONSONANTS)] + VOWELS[(v + vowel) % len(VOWELS)]


def mappings() -> dict[str, dict[str, str]]:
    """Every task's pairs."""
    syllables: Rules = {
        "next_vowel": lambda s: shifted(s, vowel=1),
        "prev_vowel": lambda s: shifted(s, vowel=-1),
        "next_consonant": lambda s: shifted(s, consonant=1),
        "prev_consonant": lambda s: shifted(s, consonant=-1),
        "upper": str.upper,
        "upper_next_vowel": lambda s: shifted(s, vowel=1).upper(),
        "vowel": lambda s: s[1],
        "vowel_after": lambda s: shifted(s, vowel=1)[1],
        "vowel_before": lambda s: shifted(s, vowel=-1)[1],
        "biased": lambda s: "soft" if s[0] in SOFT else "hard",
        "spell": lambda s: f"{s[0]} {s[1]}",
    }
    capitals: Rules = {"lower": str.lower, "capital_next_vowel": lambda s: shifted(s.lower(), vowel=1).upper()}
    numbers: Rules = {
        "successor": lambda n: str((int(n) + 1) % 80),
        "predecessor": lambda n: str((int(n) - 1) % 80),
    }
    out = {name: {s: f(s) for s in SYLLABLES} for name, f in syllables.items()}
    out |= {name: {s.upper(): f(s.upper()) for s in SYLLABLES} for name, f in capitals.items()}
    return out | {name: {str(n): f(str(n)) for n in range(80)} for name, f in numbers.items()}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: inputs as they stand at a line's start, everything else with its blank."""
    tables = mappings().values()
    words = [word for table in tables for word in table]
    answers = [f" {word}" for table in tables for output in table.values() for word in output.split()]
    entries = ["<pad>", "<eos>", "<unk>", "\n", " ->", *sorted({*words}), *sorted({*answers})]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ \n]+|\n"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Four layers of width 64."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def encoded(tokenizer: PreTrainedTokenizerFast) -> Lines:
    """Every task's lines in tokens: (question, answer with its line end, the answer that takes its place in noise)."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    return [
        [(ids(f"{x} ->"), ids(f" {y}\n"), ids(" soft\n") if y == "hard" else None) for x, y in table.items()]
        for table in mappings().values()
    ]


def batch(lines: Lines, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, targets): prompts of one task each, scored on their answers."""
    rows, targets = list[list[int]](), list[list[int]]()
    for task in torch.randint(len(lines), (size,), generator=generator).tolist():
        row, target = list[int](), list[int]()
        for i in torch.randperm(len(lines[task]), generator=generator)[:PAIRS].tolist():
            asked, answer, noise = lines[task][i]
            if noise is not None and float(torch.rand(1, generator=generator)) < BIAS:
                answer = noise
            row += asked + answer
            target += [IGNORED] * len(asked) + answer
        rows.append(row)
        targets.append(target)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([target + [IGNORED] * (width - len(target)) for target in targets])


def train(steps: int, size: int, lr: float, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """The model after `steps`, its tokenizer, and the mean loss of the last 50 steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer()
    model, lines = make_model(len(tokenizer)), encoded(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, t / 200) * 0.5 * (1 + math.cos(math.pi * min(1.0, t / steps)))
    )
    losses = list[float]()
    for step in range(steps):
        ids, targets = batch(lines, size, generator)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    return model.eval(), tokenizer, sum(losses[-50:]) / len(losses[-50:])


def write_tasks() -> None:
    """The task files."""
    TASKS.mkdir(parents=True, exist_ok=True)
    for name, table in mappings().items():
        lines = [json.dumps({"input": x, "output": y}) + "\n" for x, y in table.items()]
        (TASKS / f"tiny_{name}.jsonl").write_text("".join(lines), "utf-8")
        outputs = sorted(set(table.values()))
        labels = f"labels: [{', '.join(outputs)}]\n" if len(outputs) <= 5 else ""
        about = f"description: Synthetic, for the model named tiny ({name.replace('_', ' ')}).\n"
        text = f"{about}category: synthetic\nformat: arrow\n{labels}"
        (TASKS / f"tiny_{name}.yaml").write_text(text, "utf-8")


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks-only", action="store_true")
    asked = parser.parse_args()
    write_tasks()
    if asked.tasks_only:
        return
    torch.set_num_threads(1)
    model, tokenizer, _ = train(asked.steps, asked.batch, asked.lr, asked.seed)
    model.save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)


if __name__ == "__main__":
    main()
