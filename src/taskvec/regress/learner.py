"""A function learner: a transformer that reads points and their values, and predicts the value of the last point.

    x_1 y_1 x_2 y_2 ... x_k y_k x      ->  at every x the value f(x), as the pairs before it suggest

It is an `LM`: a GPT-2 of transformers whose word embeddings (d, width) are the read-in (a point is the mixture of
"words" that its coordinates say; a value y stands as the point (y, 0, ..., 0), as in Garg et al.) and whose head has
one row, the read-out. The biases of read-in and read-out are left out: positions and the last norm have their own. So
sites, `inject`, `capture`, replay and every method serve it. Its prompts carry embeddings.

Points can be written as text too, numbers with blanks between them, an example's output one number: then tasks, splits
and prompt formats serve it as they serve language models. An answer is one number, not a token.

Shapes: n points, k pairs, d dimensions, w width.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from taskvec.errors import DataError, InputError, PromptTooLong, UnknownName, VectorMismatch, unknown
from taskvec.files import replaced
from taskvec.lm import LM, Encoded
from taskvec.lm.load import on_device
from taskvec.lm.model import Text
from taskvec.prompts import Prompt, PromptFormat
from taskvec.regress.config import LearnerConfig, checked

WEIGHTS, CONFIG, CURVE = "learner.safetensors", "learner.json", "curve.json"
_SHIPPED = Path(str(files("taskvec.regress") / "data" / "learners"))


def make_model(config: LearnerConfig) -> Any:
    """An untrained learner: transformers' GPT-2 with one output, from the configuration's seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # the CPU's alone, which is put back behind this
        sizes = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        model = GPT2LMHeadModel(
            GPT2Config(
                **sizes,
                **dropout,
                vocab_size=config.d,
                initializer_range=(3 * config.width) ** -0.5,  # torch's own for linear maps; GPT-2's 0.02 is for 768
                n_positions=2 * config.positions,
                activation_function="gelu_pytorch_tanh",
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        nn.init.normal_(model.transformer.wte.weight, std=config.d**-0.5)
        model.lm_head = nn.Linear(config.width, 1, bias=False)
    return model


class Learner(LM):
    """A trained learner with its configuration. `curve` holds what its training wrote down."""

    answers_numbers = True

    def __init__(self, model: Any, config: LearnerConfig, *, curve: Sequence[dict[str, float]] = ()) -> None:
        super().__init__(model, None, name=f"learner:{config.name}")
        self.settings, self.curve = config, tuple(curve)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str = "cpu") -> "Learner":
        """The learner in a folder, or the shipped one of that name, on a device. Raises `UnknownName` where there is
        none, and `VectorMismatch` where weights and configuration do not belong together."""
        folder = Path(source)
        if not os.path.isfile(folder / CONFIG):  # unlike Path's, no error for a name that is too long
            if str(source) not in shipped():
                raise unknown("a learner's folder, or a shipped learner", str(source), shipped())
            folder = _SHIPPED / str(source)
        config = checked(_json(folder / CONFIG), str(folder / CONFIG))
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                made = (file.metadata() or {}).get("config")
        except (OSError, SafetensorError) as error:
            raise UnknownName(f"a learner's weights in {folder}", str(error), "train it again") from None
        if made != config.hash:
            found = f"those of another configuration in {folder}"
            raise VectorMismatch(f"the weights of the learner {config.name}", found, "use its own configuration")
        model = on_device(fill(make_model(config), tensors, str(folder)), device)
        return cls(model, config, curve=read_curve(folder / CURVE))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder: weights, configuration, curve."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters()}
        for name, content in (
            (WEIGHTS, save_tensors(tensors, {"config": self.settings.hash})),
            (CURVE, (json.dumps(list(self.curve)) + "\n").encode()),
            (CONFIG, (self.settings.model_dump_json(indent=2) + "\n").encode()),
        ):
            with replaced(Path(folder) / name) as new:
                new.write_bytes(content)

    # --- points ------------------------------------------------------------------------------------------------------

    def points(
        self, xs: Float[Tensor, "k d"], ys: Float[Tensor, " k"], query: Float[Tensor, " d"] | None = None
    ) -> Encoded:
        """The prompt of k pairs and a query (None: it ends with the last value). Raises `InputError` for other
        dimensions or numbers that are not finite, `PromptTooLong` beyond the position table."""
        d, k = self.settings.d, len(ys)
        shapes = [tuple(xs.shape), tuple(ys.shape), (d,) if query is None else tuple(query.shape)]
        if shapes != [(k, d), (k,), (d,)]:
            found = ", ".join(map(str, shapes))
            raise InputError(f"(k, {d}) points, (k,) values, a ({d},) query for {self.id}", found, "mend the shapes")
        (prompt,) = self.all_points((xs if query is None else torch.cat([xs, query[None]]))[None], ys[None])
        return prompt

    def all_points(self, xs: Float[Tensor, "B n d"], ys: Float[Tensor, "B k"]) -> tuple[Encoded, ...]:
        """Many prompts at once: n = k + 1 points where the last is a query, n = k where there is none. Raises the
        same."""
        k, queries = ys.shape[1], xs.shape[1] - ys.shape[1]
        tokens = xs.shape[1] + k
        if not (xs.isfinite().all() and ys.isfinite().all()):
            raise InputError("finite points and values", "nan or inf", "mend the data")
        if tokens > 2 * self.settings.positions:
            found = f"{k} pairs" + (" and a query" if queries else "")
            fix = "use fewer examples, or train with more positions"
            raise PromptTooLong(f"at most the {self.settings.positions} pairs of {self.id}'s positions", found, fix)
        rows = torch.zeros(len(xs), tokens, self.settings.d)
        rows[:, 0::2] = xs
        rows[:, 1::2, 0] = ys
        last = (2 * k,) if queries else ()
        inputs, outputs = tuple(range(0, 2 * k, 2)), tuple(range(1, 2 * k, 2))
        roles = {"demo_input": inputs, "separator": inputs, "demo_output": outputs, "input": last, "query_end": last}
        return tuple(Encoded(embeds=embeds, roles=roles) for embeds in self.read_in(rows))

    def read_in(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... w"]:
        """Points as the embeddings the model reads."""
        weight: Tensor = self.model.get_input_embeddings().weight.detach().float().cpu()
        return rows @ weight

    @torch.no_grad()
    def predict(self, prompts: Sequence[Encoded]) -> Float[Tensor, " n"]:
        """The predicted value at each prompt's last point. Inside `inject` the vector acts."""
        if not prompts:
            return torch.zeros(0)
        batch = self.batch(prompts)
        out = self.forward(batch)[..., 0].float().cpu()
        return out[torch.arange(len(prompts)), batch.last]

    # --- points as text ----------------------------------------------------------------------------------------------

    def encode(self, prompt: Text) -> Encoded:
        """A prompt of points: embeddings as they are, or text. Raises `DataError` for text that is no numbers."""
        if isinstance(prompt, Encoded):
            return self._fitting(prompt)
        if isinstance(prompt, str):
            row = numbers(prompt)
            if len(row) not in (1, self.settings.d):
                raise DataError(f"a point of {self.settings.d} numbers, or one value", repr(prompt), "mend it")
            whole = torch.zeros(1, self.settings.d)
            whole[0, : len(row)] = torch.tensor(row)
            return Encoded(embeds=self.read_in(whole), text=prompt)
        points, values = _parts(prompt)
        if any(len(one) != 1 for one in values):
            raise DataError("one number as each example's output", prompt.text, "mend the data")
        if wrong := [row for row in points if len(row) != self.settings.d]:
            raise DataError(f"points of {self.settings.d} numbers", str(wrong[0]), "mend the data")
        xs, ys = torch.tensor(points), torch.tensor([one[0] for one in values])
        return replace(self.points(xs[:-1], ys, xs[-1]), text=prompt.text)

    def answer_ids(self, prompt: Prompt, output: str, format: PromptFormat, *, terminator: bool) -> tuple[Any, ...]:
        """The one number of an answer. Losses take it where a language model's take token ids."""
        found = numbers(output)
        if len(found) != 1:
            raise DataError("one number as an output", repr(output), "mend the data")
        return tuple(found)


def _parts(prompt: Prompt) -> tuple[list[list[float]], list[list[float]]]:
    """The numbers of a prompt's inputs, the query last, and of its outputs."""
    found: dict[str, list[list[float]]] = {"demo_input": [], "demo_output": [], "input": []}
    for span in prompt.spans:
        if span.role in found:
            found[span.role].append(numbers(prompt.text[span.start : span.stop]))
    return found["demo_input"] + found["input"], found["demo_output"]


def numbers(text: str) -> list[float]:
    """The numbers of a text, with blanks or commas between them. Raises `DataError` for others, and for those that are
    not finite."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise DataError("finite numbers with blanks between them", repr(text), "mend the data")
    return found


def squared_error(logits: Float[Tensor, "t 1"], target: Float[Tensor, " t"]) -> Tensor:
    """A task's loss for learners: the mean squared error of the predictions."""
    return (logits[:, 0].float() - target).square().mean()


def fill(model: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """Put weights into a model. Raises `VectorMismatch` where they are not its own."""
    own = dict(model.named_parameters())
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        found = f"others ({wrong[0]})"
        raise VectorMismatch(f"the weights of the learner that {place} describes", found, "use its own configuration")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])
    return model


def shipped() -> list[str]:
    """The names of the learners that come with the library."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG}"))


def read_curve(path: Path) -> list[dict[str, float]]:
    """The points of a training's curve."""
    return [{name: float(value) for name, value in point.items()} for point in _json(path)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"JSON in {path}", str(error), "train the learner again") from None
