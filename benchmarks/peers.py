"""The function vector's head patches as a user writes them in transformer-lens 4 and nnsight 0.8: seconds a patch.

Runs in an environment of its own (`sh benchmarks/peers.sh PYTHON`), on the prompts, patches and effects that
`function_vector.py --save` wrote. A bare PyTorch hook is timed in the same rounds, as the link between the two files.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Patch = tuple[Tensor, int, tuple[int, int], Tensor]
ROUNDS = 5


def patches(path: Path) -> tuple[list[Patch], Tensor]:
    saved = json.loads(path.read_text())
    means = torch.tensor(saved["means"])
    rows = [(torch.tensor([p["ids"]]), p["gold"], tuple(p["head"]), means[tuple(p["head"])]) for p in saved["patches"]]
    return rows, torch.tensor(saved["effects"])


def bare(folder: str) -> Callable[[Patch | None, Tensor, int], float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    width = model.model.layers[0].self_attn.o_proj.in_features // model.config.num_attention_heads

    def run(patch: Patch | None, ids: Tensor, gold: int) -> float:
        handle = None
        if patch is not None:
            _, _, (layer, head), mean = patch

            def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                z = args[0].clone()
                z[0, -1, head * width : (head + 1) * width] = mean
                return (z,)

            handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
        logits = model(ids).logits[0, -1]
        if handle is not None:
            handle.remove()
        return float(logits.softmax(-1)[gold])

    return run


def transformer_lens(folder: str) -> Callable[[Patch | None, Tensor, int], float]:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device="cpu")

    def run(patch: Patch | None, ids: Tensor, gold: int) -> float:
        hooks = []
        if patch is not None:
            _, _, (layer, head), mean = patch

            def hook(z: Tensor, hook: Any) -> Tensor:
                z = z.clone()
                if z.dim() == 4:
                    z[0, -1, head] = mean
                else:
                    z[0, -1, head * len(mean) : (head + 1) * len(mean)] = mean
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", hook)]
        return float(model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1].softmax(-1)[gold])

    return run


def nnsight(folder: str) -> Callable[[Patch | None, Tensor, int], float]:
    from nnsight import LanguageModel

    model = LanguageModel(folder, device_map="cpu", dispatch=True)

    def run(patch: Patch | None, ids: Tensor, gold: int) -> float:
        with torch.no_grad(), model.trace(ids):
            if patch is not None:
                _, _, (layer, head), mean = patch
                z = model.model.layers[layer].self_attn.o_proj.input
                z[:, -1, head * len(mean) : (head + 1) * len(mean)] = mean
            logits = model.lm_head.output[0, -1].save()
        return float(logits.softmax(-1)[gold])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("patches", type=Path)
    parsed = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    rows, effects = patches(parsed.patches)
    runs = {"bare_hook": bare, "transformer_lens": transformer_lens, "nnsight": nnsight}
    loaded = {name: load(parsed.folder) for name, load in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    differences = dict.fromkeys(loaded, 0.0)
    for _ in range(ROUNDS):
        for name, run in loaded.items():
            start = time.perf_counter()
            found = [run(patch, *patch[:2]) for patch in rows]
            seconds[name].append((time.perf_counter() - start) / len(rows))
            clean = [run(None, *patch[:2]) for patch in rows]
            moved = torch.tensor(found) - torch.tensor(clean)
            differences[name] = max(differences[name], float((moved - effects).abs().max()))
    out = {name: {"s_a_patch": statistics.median(seconds[name]), "difference": differences[name]} for name in loaded}
    print(json.dumps({"benchmark": "peers", "patches": len(rows), **out}))


if __name__ == "__main__":
    main()
