"""Where a task vector comes from: enough to refuse a wrong use, and to make the vector again."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from taskvec.prompts import Example, PromptFormat


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelId(_Plain):
    """A model: its name, its revision where known, and the fingerprint of its configuration and sampled weights."""

    id: str
    revision: str | None = None
    fingerprint: str


class Cost(_Plain):
    """What a fit cost: gold labels read, unlabelled queries read, tokens computed, seconds."""

    labels: int = 0
    queries: int = 0
    tokens: int = 0
    seconds: float = 0.0


class FormatRecord(_Plain):
    """A prompt format, and the hash that a wrong template is refused by."""

    template: str
    instruction: str = ""
    name: str = "custom"
    special_tokens: bool = True
    hash: str

    @classmethod
    def of(cls, format: PromptFormat) -> "FormatRecord":
        """The record of a format."""
        return cls(
            template=format.template,
            instruction=format.instruction,
            name=format.name,
            special_tokens=format.special_tokens,
            hash=format.hash,
        )

    def format(self) -> PromptFormat:
        """The format recorded."""
        return PromptFormat(self.template, self.instruction, self.name, self.special_tokens)


class Origin(_Plain):
    """Method, hyper-parameters, model, template, data, seed, demonstrations and cost of one fit.

    `prompt` says on which prompts the vector works: `zero-shot`, or `few-shot` behind `demos`. `any_format` says that
    it was fitted under several templates and may be used under others. `max_new_tokens` is how long an answer of the
    task may get, `n_test` how many of the data's items were kept away from the fit, `also` the same of other data it
    was fitted on (hash -> items), `found` what the fit chose and measured (its layer, a ridge, degrees of freedom).
    """

    method: str
    hyperparameters: dict[str, JsonValue] = {}
    model: ModelId
    tokenizer_hash: str = ""
    format: FormatRecord
    any_format: bool = False
    task: str
    data_hash: str
    n_test: int = 0
    also: dict[str, int] = {}
    labels: tuple[str, ...] | None = None
    seed: int
    demos: tuple[Example, ...] = ()
    prompt: Literal["zero-shot", "few-shot"] = "zero-shot"
    max_new_tokens: int = 16
    cost: Cost = Cost()
    versions: dict[str, str] = {}
    found: dict[str, JsonValue] = {}

    @property
    def kept_away(self) -> dict[str, int]:
        """Of every data set the fit saw, by its hash, how many items were kept away from it."""
        return {**self.also, self.data_hash: self.n_test}

    @property
    def shown(self) -> tuple[Example, ...]:
        """The demonstrations that stand in the prompt the vector works on: `demos`, or none."""
        return self.demos if self.prompt == "few-shot" else ()
