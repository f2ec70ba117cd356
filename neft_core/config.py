"""params.yaml as typed sections; each class below documents one section, each field one key."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from neft_core.errors import NeftError
from neft_core.patterns import Patterns
from neft_core.rows import FIELDS, LABELS

NO_FILE: Final = "data/none"
"""An empty file in every workspace: DVC needs a path to watch, and some sources have none."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""Names of tasks and runs: a dot would be a level of keys to DVC."""


def _refuse(message: str) -> PydanticCustomError:
    """An error whose text is shown as it is (braces in pydantic's templates need doubling)."""
    return PydanticCustomError("neft", message.replace("{", "{{").replace("}", "}}"))


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys are refused, values keep their YAML type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _nearest_keys(cls, data: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Tell for each unknown key which one may be meant; other faults stay as they are."""
        try:
            return check(data)
        except ValidationError as fault:
            errors: list[InitErrorDetails] = []
            for error in fault.errors(include_url=False):
                kind: str | PydanticCustomError = error["type"]
                if kind == "extra_forbidden" and len(error["loc"]) == 1:
                    kind = _unknown(str(error["loc"][0]), list(cls.model_fields))
                elif kind == "neft":
                    kind = _refuse(error["msg"])
                errors.append(
                    InitErrorDetails(
                        type=kind, loc=error["loc"], input=error["input"], ctx=error.get("ctx", {})
                    )
                )
            raise ValidationError.from_exception_data(cls.__name__, errors) from None


def _unknown(key: str, known: list[str]) -> PydanticCustomError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return _refuse(f"unknown key; {hint}")


class Pretraining(Section):
    """How the built model is pre-trained on the corpora's pre-training splits."""

    epochs: int = Field(ge=1)
    """Passes over the pre-training rows."""
    batch_size: int = Field(ge=1)
    """Sequences in a step."""
    lr: float = Field(gt=0, le=1)
    """Peak learning rate of AdamW; warmed up over 5 % of the steps, then linear decay."""
    seed: int = Field(default=1, ge=0)
    """Seed of the initial weights and of the order of rows."""


class BuiltModel(Section):
    """A small Llama with its own byte-level BPE tokenizer, pre-trained in stage `base`."""

    kind: Literal["built"]
    """Where the base model comes from."""
    path: Literal["data/none"] = NO_FILE
    """No local file."""
    vocabulary: int = Field(ge=300, le=200_000)
    """Tokens of the tokenizer, the 256 bytes included."""
    hidden: int = Field(ge=8)
    """Hidden size."""
    intermediate: int = Field(ge=8)
    """Intermediate size of the MLP: the neurons of each up and down projection."""
    layers: int = Field(ge=1)
    """Decoder layers."""
    heads: int = Field(ge=1)
    """Attention heads; divides `hidden`."""
    context: int = Field(default=256, ge=16)
    """Longest sequence, in tokens."""
    pretraining: Pretraining
    """How it is pre-trained."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "BuiltModel":
        if self.hidden % (2 * self.heads):
            raise _refuse(
                f"heads: got {self.heads} with hidden {self.hidden}; hidden / heads must be even"
            )
        return self


class LocalModel(Section):
    """A directory in the Hub's layout: config.json, tokenizer files, *.safetensors."""

    kind: Literal["local"]
    """Where the base model comes from."""
    path: str = Field(min_length=1)
    """The directory, relative to the workspace or absolute."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class HubModel(Section):
    """A model on the Hugging Face Hub."""

    kind: Literal["hub"]
    """Where the base model comes from."""
    path: Literal["data/none"] = NO_FILE
    """No local file."""
    id: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Repository id, such as `meta-llama/Llama-2-7b-chat-hf`."""
    revision: str = "main"
    """Branch, tag or commit; pin a commit to reproduce."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


Model = Annotated[BuiltModel | LocalModel | HubModel, Field(discriminator="kind")]


class GeneratedSource(Section):
    """The rule-based parallel corpus of this package."""

    kind: Literal["generated"]
    """Where the rows come from."""
    path: Literal["data/none"] = NO_FILE
    """No local file."""
    languages: list[str] = Field(min_length=1, max_length=2)
    """Source and target, of `GENERATED` in neft_core/config.py; of nli its one language."""
    pretrain: int = Field(default=0, ge=0)
    """Rows of simple sentences for the built model."""
    train: int = Field(ge=0)
    """Rows to train on (of translation: of constructions that `pretrain` never shows); 0 with
    `dev: 0`: the task is only tested on."""
    dev: int = Field(ge=0)
    """Rows whose loss chooses the best checkpoint."""
    test: int = Field(ge=1)
    """Rows that are generated and scored."""
    constructions: list[str] | None = Field(default=None, min_length=1)
    """Of translation: constructions of train, dev and test (`HELD_OUT` in neft_core/corpus); null:
    all."""
    seed: int = Field(default=1, ge=0)
    """Seed of the meanings; the same for every language pair, so that pairs are parallel."""

    @model_validator(mode="after")
    def _trains_and_chooses(self) -> "GeneratedSource":
        if bool(self.train) != bool(self.dev):
            raise _refuse(
                f"dev: got {self.dev} with train {self.train}; at least 1 of each, or both 0 for a "
                "task that is only tested on"
            )
        return self


GENERATED: Final = {
    "translation": ("en", "fr", "zh", "hi", "qmi", "qbs"),
    "summarisation": ("en", "fr", "zh", "hi"),
    "nli": ("en", "fr", "de"),
}
"""Languages of the generated corpora, by kind of task."""


class Splits(Section):
    """Names of the parts of a source: files in its folder, or splits of a Hub data set."""

    train: str | None = None
    """Rows to train on; when alone, dev and test are split off it by seed. Without it, and with
    test, the task is only tested on."""
    dev: str | None = None
    """Rows whose loss chooses the best checkpoint."""
    test: str | None = None
    """Rows that are generated and scored."""
    pretrain: str | None = None
    """Rows for the built model."""


class Rows(Section):
    """What local and Hub sources share: which columns, how many rows."""

    splits: Splits
    """File names or split names."""
    columns: dict[str, str | int] = Field(default_factory=dict)
    """Our column to theirs (`source`, `target`, `references`; `messages`; `premise`, `hypothesis`,
    `label`); a dot reaches into nested columns, a number counts the columns of a file without
    header."""
    labels: dict[str, str | int] | None = None
    """Of nli: what stands for each label; null: its name, or 0, 1, 2 as in SNLI, MNLI and XNLI."""
    train: int | None = Field(default=None, ge=1)
    """At most so many training rows (a seeded sample; a larger one contains a smaller one)."""
    dev: int | None = Field(default=None, ge=1)
    """At most so many dev rows; how many to split off where there is no dev part."""
    test: int | None = Field(default=None, ge=1)
    """At most so many test rows; how many to split off where there is no test part."""
    pretrain: int | None = Field(default=None, ge=1)
    """At most so many pre-training rows."""
    seed: int = Field(default=1, ge=0)
    """Seed of the sample and of the split."""

    @model_validator(mode="after")
    def _sizes_of_missing_splits(self) -> "Rows":
        if self.splits.train is None:
            if self.splits.test is None or self.splits.dev or self.dev or self.train:
                raise _refuse(
                    "splits.train: missing; give it, or splits.test alone for a task that is only "
                    "tested on"
                )
            return self
        for name in ("dev", "test"):
            if getattr(self.splits, name) is None and getattr(self, name) is None:
                raise _refuse(f"{name}: missing; give splits.{name}, or how many rows to split off")
        return self


class LocalSource(Rows):
    """Local jsonl, json (lines), csv, tsv, txt (tab-separated) or parquet files."""

    kind: Literal["local"]
    """Where the rows come from."""
    path: str = Field(min_length=1)
    """The folder that holds the files, relative to the workspace or absolute."""


class HubSource(Rows):
    """A data set on the Hugging Face Hub."""

    kind: Literal["hub"]
    """Where the rows come from."""
    path: str = NO_FILE
    """`data/none`, or a local directory in the Hub's layout that DVC watches (`id` repeats it)."""
    id: str = Field(min_length=1)
    """Repository id, or a local directory in the Hub's layout."""
    revision: str = "main"
    """Branch, tag or commit; pin a commit to reproduce."""
    config: str | None = None
    """Name of the data set's configuration."""


Source = Annotated[GeneratedSource | LocalSource | HubSource, Field(discriminator="kind")]


class Translation(Section):
    """How a sentence pair becomes a training text."""

    task: Literal["translation"]
    """Kind of task."""
    source_language: str = Field(min_length=2)
    """English name of the source language."""
    target_language: str = Field(min_length=2)
    """English name of the target language; chooses the BLEU tokenizer."""
    prompt: str = (
        "Translate the following text from {source_language} to {target_language}.\n{source}\n"
    )
    """Text before the target, with `{source}`; or `chat`: the model's chat template."""
    max_tokens: int = Field(ge=8)
    """Longest training text in tokens; longer rows are dropped and counted."""


class Summarisation(Section):
    """How a text and its summary become a training text."""

    task: Literal["summarisation"]
    """Kind of task."""
    source_language: str = Field(min_length=2)
    """English name of the text's language."""
    target_language: str = Field(min_length=2)
    """English name of the summary's language; the same, or another."""
    prompt: str = "Summarize the following text in {target_language}.\n{source}\n"
    """Text before the summary, with `{source}`; or `chat`: the model's chat template."""
    max_input: int = Field(ge=8)
    """Longest text in tokens, the prompt around it not counted; in every split."""
    long_inputs: Literal["truncate", "drop"] = "truncate"
    """A longer one is cut at its end, or its row is dropped (the paper's), and counted."""
    max_tokens: int = Field(ge=8)
    """Longest training text in tokens, summary included; longer rows are dropped and counted."""

    @model_validator(mode="after")
    def _room_for_a_summary(self) -> "Summarisation":
        if self.max_input >= self.max_tokens:
            raise _refuse(
                f"max_input: got {self.max_input}; less than max_tokens, {self.max_tokens}"
            )
        return self


class Nli(Section):
    """How a premise, a hypothesis and a label become a training text.

    At the end the label is chosen whose text is most likely as the whole answer: the sum of the log
    likelihoods of its tokens and of the token that ends it.
    """

    task: Literal["nli"]
    """Kind of task."""
    language: str = Field(min_length=2)
    """English name of the language."""
    prompt: str = "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"
    """Text before the label, with `{premise}`, `{hypothesis}`, and where wanted `{language}` and
    `{labels}`; or `chat`: the model's chat template."""
    labels: dict[str, str] | None = None
    """What the model says for each label; null: the words of the language in neft_core/tasks.py."""
    max_tokens: int = Field(ge=8)
    """Longest training text in tokens; longer rows are dropped and counted."""

    @property
    def target_language(self) -> str:
        """The language of the answers."""
        return self.language


class Instruction(Section):
    """How a conversation becomes a training text; the assistant's turns are trained."""

    task: Literal["instruction"]
    """Kind of task."""
    prompt: Literal["chat", "plain"] = "chat"
    """The model's chat template, or the plain form of `neft_core/tasks.py`."""
    target_language: str = "English"
    """Language of the answers; chooses the BLEU tokenizer."""
    max_tokens: int = Field(ge=8)
    """Longest training text in tokens; longer rows are dropped and counted."""


class Task(Section):
    """A data set and the form in which the model sees it."""

    source: Source
    """Where the rows come from (stage `corpus`)."""
    format: Annotated[Translation | Summarisation | Nli | Instruction, Field(discriminator="task")]
    """How rows become token sequences (stage `prepare`)."""

    @property
    def trains(self) -> bool:
        """Whether it has rows to train on."""
        source = self.source
        return source.splits.train is not None if isinstance(source, Rows) else source.train > 0

    @model_validator(mode="after")
    def _generated_in_known_languages(self) -> "Task":
        source, kind = self.source, self.format.task
        if not isinstance(source, GeneratedSource):
            return self
        if kind not in GENERATED:
            raise _refuse(
                f"source: kind 'generated' makes rows of {', '.join(GENERATED)}; format.task is "
                f"{kind}"
            )
        for code in source.languages:
            if code not in GENERATED[kind]:
                raise _refuse(
                    f"source.languages: got '{code}'; of {kind} allowed are "
                    f"{', '.join(GENERATED[kind])}"
                )
        if len(source.languages) != (1 if kind == "nli" else 2):
            needed = "one" if kind == "nli" else "source and target"
            raise _refuse(f"source.languages: got {source.languages}; {kind} needs {needed}")
        if len(set(source.languages)) < len(source.languages):
            raise _refuse(
                f"source.languages: got '{source.languages[0]}' twice; source and target must "
                "differ"
            )
        if source.constructions and kind != "translation":
            raise _refuse(f"source.constructions: given with {kind}; they are for translation")
        return self

    @model_validator(mode="after")
    def _columns_of_its_kind(self) -> "Task":
        source, kind = self.source, self.format.task
        if isinstance(source, Rows):
            needed = set(FIELDS[kind])
            found = set(source.columns)
            if found and not needed <= found <= needed | {"references"}:
                raise _refuse(
                    f"source.columns: got {', '.join(sorted(found))}; {kind} needs "
                    f"{', '.join(FIELDS[kind])}"
                )
            if source.labels is not None and (kind != "nli" or set(source.labels) != set(LABELS)):
                raise _refuse(
                    f"source.labels: got {', '.join(source.labels)}; of nli all of "
                    f"{', '.join(LABELS)}"
                )
        return self


class Compute(Section):
    """Where and in which precision models run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of frozen weights; `auto`: bfloat16 on a GPU with mixed precision, else float32. What
    trains is float32 (in float64: float64)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast; `auto`: bf16 on a GPU or where dtype is not float32, else none."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of each process; another number can change the last bits of a sum."""
    processes: int = Field(default=1, ge=1)
    """Processes that share warm-up, training and evaluation on this machine, each with a device of
    its own, by `accelerate launch`; steps stay the same rows. 1: nothing is launched."""
    accelerate_config: str | None = Field(default=None, min_length=1)
    """Your own Accelerate configuration file, relative to the workspace or absolute, for other
    ways to share (several machines, FSDP2, DeepSpeed); it says how many processes. Precision is
    `mixed_precision` above."""

    @model_validator(mode="after")
    def _one_says_how_many(self) -> "Compute":
        if self.accelerate_config is not None and self.processes > 1:
            raise _refuse(
                f"processes: got {self.processes} beside accelerate_config; "
                "num_processes of that file says how many"
            )
        return self


class Optimisation(Section):
    """What every training has: steps of AdamW with linear decay."""

    lr: float = Field(gt=0, le=1)
    """Learning rate at the first step; decays linearly to zero."""
    batch_size: int = Field(ge=1)
    """Rows in a micro-batch."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches in a step."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """The gradient of what trains is clipped to this norm; null: it isn't clipped."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of what trains, towards zero."""
    gradient_checkpointing: bool = False
    """Trade a second forward pass for memory."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints to resume from."""


class Warmup(Optimisation):
    """The limited-step fine-tune that gives the tuned model; by default of all parameters, exact.

    `modules`, `states` and `update` make it smaller, in any combination; what each costs in
    fidelity is in docs/results.md.
    """

    steps: int = Field(ge=1)
    """K: optimiser steps."""
    seed: int = Field(default=1, ge=0)
    """Seed of the order of rows, and of new parameters."""
    modules: Literal["all", "candidates", "lora"] = "all"
    """What trains: `all` parameters, the `candidates` of the layout alone, or `lora` on every
    linear module, merged in fp32 afterwards."""
    layout: Literal["mlp", "mlp+gate", "all", "rows"] | None = None
    """With `candidates`: whose weights train; the same as `scoring.layout`."""
    rank: int | None = Field(default=None, ge=1)
    """With `lora`: rank of the factors; the scale is 2."""
    states: Literal["fp32", "8bit", "factored"] = "fp32"
    """What the optimiser keeps: AdamW's two moments in `fp32` (8 bytes for each trained value) or
    in `8bit` (2), or Adafactor's `factored` second moment (almost nothing)."""
    update: Literal["after_backward", "in_backward"] = "after_backward"
    """`in_backward`: each parameter is updated as soon as its gradient is there, so that one
    gradient is kept at a time. Clipping then needs a second pass for the norm: the same result in
    twice the time; with `max_grad_norm: null` there is one pass."""

    @model_validator(mode="after")
    def _fitting(self) -> "Warmup":
        for key, modules in (("layout", "candidates"), ("rank", "lora")):
            given = getattr(self, key)
            if given is None and self.modules == modules:
                raise _refuse(f"{key}: missing; modules: {modules} needs it")
            if given is not None and self.modules != modules:
                raise _refuse(f"{key}: got {given!r}; it is for modules: {modules} only")
        if self.update == "in_backward" and self.accumulation > 1:
            raise _refuse(
                f"accumulation: got {self.accumulation}; update: in_backward keeps no gradient to "
                "add to: set 1, or update: after_backward"
            )
        return self


class MoreWarmup(Section):
    """One more warm-up of a task: as `warmup` says but for the keys given here."""

    task: str
    """A key of `tasks`."""
    steps: int | None = Field(default=None, ge=1)
    """K: optimiser steps."""
    lr: float | None = Field(default=None, gt=0, le=1)
    """Learning rate at the first step."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows in a micro-batch."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the order of rows."""


class GradientScores(Section):
    """Scores without any warm-up: how far a gradient step in the base's weights turns a neuron."""

    criterion: Literal["gradient"]
    """What is scored."""
    task: str
    """A key of `tasks`; its training rows are used."""
    rows: int = Field(default=512, ge=1)
    """Training rows, drawn by the seed; all of them where there are fewer."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""
    relative: bool = False
    """Divide by the size of the neuron: the angle, to first order."""
    memory: float | None = Field(default=None, gt=0)
    """GB (10^9 bytes) for the summed gradients; less takes more passes over the rows, with the same
    result. null: 4 bytes for each candidate's weight, and one pass."""
    seed: int = Field(default=1, ge=0)
    """Seed of the rows."""


class ProbeScores(Section):
    """Scores by linear probes on the hidden states of prompts, for tasks with few answers."""

    criterion: Literal["probe"]
    """What is scored."""
    task: str
    """A key of `tasks`; its training rows are used, their targets are the classes."""
    rows: int = Field(default=2000, ge=4)
    """Training rows, drawn by the seed; all of them where there are fewer."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""
    alpha: float = Field(default=1.0, gt=0)
    """Ridge penalty."""
    seed: int = Field(default=1, ge=0)
    """Seed of the rows."""


Scores = Annotated[GradientScores | ProbeScores, Field(discriminator="criterion")]


class ActivationScores(Section):
    """Scores by how much a warm-up changed what neurons give out on text."""

    task: str
    """A key of `tasks`; its dev rows are used."""
    warmup: str
    """The tuned model: a task, whose own warm-up is meant, or a key of `warmups`."""
    rows: int = Field(default=200, ge=1)
    """Dev rows; all of them where there are fewer."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""


class Scoring(Section):
    """Which neurons are candidates."""

    layout: Literal["mlp", "mlp+gate", "all", "rows", "patterns"] = "mlp"
    """`mlp`: rows of up, columns of down (the paper's); `mlp+gate`: rows of gate too; `all`: rows
    of attention's query, key and value and columns of its output too; `rows`: rows of all these
    weights; `patterns`: what `rows` and `columns` name."""
    rows: list[Annotated[str, Field(min_length=1)]] = []
    """Of `patterns`: modules whose rows are candidates. A name, or its end after a dot, with `*`,
    `?` and `[...]` as in file names: `mlp.up_proj`, `layers.[0-3].*.q_proj`."""
    columns: list[Annotated[str, Field(min_length=1)]] = []
    """Of `patterns`: modules whose columns are candidates."""
    transposed: bool = False
    """Of `patterns`: these modules store [in, out]; known for the model types of the table."""

    @model_validator(mode="after")
    def _patterns_alone(self) -> "Scoring":
        given = [key for key in ("rows", "columns", "transposed") if getattr(self, key)]
        if self.layout == "patterns" and not (self.rows or self.columns):
            raise _refuse("layout: got 'patterns' without any; give some in rows or columns")
        if self.layout != "patterns" and given:
            raise _refuse(f"{given[0]}: given with layout '{self.layout}'; set layout: patterns")
        return self

    @property
    def candidates(self) -> str | Patterns:
        """The layout as `neurons.candidates` takes it."""
        if self.layout != "patterns":
            return self.layout
        return Patterns(tuple(self.rows), tuple(self.columns), self.transposed)


class Training(Optimisation):
    """Defaults of every run."""

    epochs: float = Field(gt=0)
    """Passes over the training rows; a fraction is allowed."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between dev losses; null: at the end of each epoch. The last step always has one."""
    patience: int | None = Field(default=None, ge=1)
    """Dev losses in a row without improvement before training stops; null: never."""


class Plain(Section):
    """A method that its name describes whole."""

    name: str
    """Name of the method."""

    def words(self) -> str:
        """As tables say it."""
        return self.name


class Full(Plain):
    """Every parameter trains."""

    name: Literal["full"]
    """Name of the method."""


class InOut(Plain):
    """up_proj and down_proj of every MLP train."""

    name: Literal["in_out"]
    """Name of the method."""


class Embed(Plain):
    """The input embedding trains (with the head, where it is tied)."""

    name: Literal["embed"]
    """Name of the method."""


class Lora(Section):
    """LoRA on every linear module of each layer, the head excepted."""

    name: Literal["lora"]
    """Name of the method."""
    rank: int = Field(ge=1)
    """Rank r of the two factors."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; null: 2 * rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the first factor."""

    def words(self) -> str:
        """As tables say it."""
        return f"lora, rank {self.rank}"


class Selection(Section):
    """Which neurons: a policy with its budget, over the scores of one warm-up or criterion."""

    policy: Literal[
        "lowest",
        "reversed",
        "union",
        "threshold",
        "random",
        "magnitude",
        "gradient",
        "activation",
        "probe",
    ] = "lowest"
    """`lowest` similarity (the paper's); `reversed`: the highest; `union`: the lowest of each of
    several scores; `threshold`: all below one; `random` and `magnitude` (largest change) as
    controls; `gradient`, `activation`, `probe`: the highest of those scores."""
    percent: float | None = Field(default=None, gt=0, le=100)
    """Budget: share of all the model's parameters, in percent; of `union` for each."""
    neurons: int | None = Field(default=None, ge=1)
    """Budget: number of neurons."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Budget: share of the candidates."""
    below: float | None = Field(default=None, ge=-1, le=2)
    """Of `threshold`, in place of a budget: neurons with a similarity under this are selected."""
    below_scaled: float | None = Field(default=None, ge=0, le=2)
    """Of `threshold`: the same after the similarities of all candidates are scaled to [0, 1]."""
    any_size: Literal[True] | None = None
    """Of `threshold`: selecting nothing or everything is an answer, not a mistake."""
    scores: str | list[str] | None = None
    """Whose scores: a task or a warm-up of `warmups`, or an entry of `scores` or `activations`;
    null: the run's task. Of `union`: two or more."""
    seed: int = Field(default=1, ge=0)
    """Seed of policy `random`."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Selection":
        if isinstance(self, Neft) and self.parts is not None:
            return self
        kinds = ("below", "below_scaled") if self.policy == "threshold" else BUDGETS
        given = [k for k in (*BUDGETS, "below", "below_scaled") if getattr(self, k) is not None]
        if len(given) != 1 or given[0] not in kinds:
            found = " and ".join(given) or "none"
            other = " with policy threshold" if self.policy == "threshold" else ""
            raise _refuse(f"budget: got {found}{other}; give exactly one of {', '.join(kinds)}")
        if self.any_size and self.policy != "threshold":
            raise _refuse(f"any_size: got true with policy {self.policy}; it is of threshold")
        several = self.scores if isinstance(self.scores, list) else []
        if self.policy == "union" and len(set(several)) < 2:
            raise _refuse("scores: policy union needs two different ones at least, in a list")
        if self.policy != "union" and isinstance(self.scores, list):
            raise _refuse(f"scores: got a list with policy {self.policy}; give one, or use union")
        if self.policy in KINDS and self.scores is None:
            raise _refuse(
                f"scores: missing; policy {self.policy} needs an entry of {KINDS[self.policy]}"
            )
        return self

    def read(self, task: str) -> list[str]:
        """Names of the scores that it selects from."""
        if isinstance(self.scores, list):
            return list(dict.fromkeys(self.scores))
        return [self.scores or task]

    def words(self) -> str:
        """As tables say it: `lowest 9 %`, `union of a, b 6 %`."""
        amount = {
            "percent": "{:g} %",
            "neurons": "{} neurons",
            "share": "{:g} of candidates",
            "below": "below {:g}",
            "below_scaled": "below {:g} scaled",
        }
        budget = next(
            text.format(value)
            for key, text in amount.items()
            if (value := getattr(self, key)) is not None
        )
        if isinstance(self.scores, list):
            return f"{self.policy} of {', '.join(self.scores)}, {budget}"
        return f"{self.policy} {budget}" + (f" by {self.scores}" if self.scores else "")


class Neft(Selection):
    """The selected neurons train."""

    name: Literal["neft"]
    """Name of the method."""
    parts: list[Selection] | None = Field(default=None, min_length=1)
    """Several selections joined, a common neuron once, such as `[{policy: lowest, percent: 3},
    {policy: reversed, percent: 4}]`; in place of a policy and a budget here."""

    @model_validator(mode="after")
    def _parts_alone(self) -> "Neft":
        beside = sorted(self.model_fields_set - {"name", "parts"})
        if self.parts is not None and beside:
            raise _refuse(f"{beside[0]}: given beside parts; give it within one of them")
        return self

    @property
    def selections(self) -> list[Selection]:
        """The selections that are joined; one where there are no parts."""
        return [self] if self.parts is None else self.parts

    def words(self) -> str:
        """As tables say it: `neft, lowest 3 % + reversed 4 %`."""
        if self.parts is None:
            return f"neft, {super().words()}"
        return "neft, " + " + ".join(part.words() for part in self.parts)


BUDGETS: Final = ("percent", "neurons", "share")
"""Keys that say how much a policy selects."""

KINDS: Final = {"gradient": "scores", "probe": "scores", "activation": "activations"}
"""Policies that take scores of their own, and the section that makes them."""


Method = Annotated[Full | InOut | Embed | Lora | Neft, Field(discriminator="name")]


class Run(Section):
    """One method with its budget on one task; every seed of it is trained in one process."""

    task: str
    """A key of `tasks`."""
    method: Method
    """What trains."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[1], min_length=1)
    """Seeds of the order of rows and of new parameters."""
    lr: float | None = Field(default=None, gt=0, le=1)
    """Learning rate; null: `training.lr`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; null: `training.epochs`."""

    def selections(self, where: str) -> list[tuple[str, Selection]]:
        """The selections of a method that has some, each with its keys in the file."""
        if not isinstance(self.method, Neft):
            return []
        if self.method.parts is None:
            return [(where, self.method)]
        return [(f"{where}.parts.{i}", part) for i, part in enumerate(self.method.parts)]

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise _refuse(f"got {value}; each seed once")
        return value


class Transfer(Section):
    """A run tested on another task than it was trained on; adding one evaluates, and no more."""

    run: str
    """A key of `runs`."""
    task: str
    """A key of `tasks`, not the run's own."""


class Evaluation(Section):
    """Generation and scoring of the test split."""

    batch_size: int = Field(ge=1)
    """Rows generated at once."""
    max_new_tokens: int = Field(ge=1)
    """Longest hypothesis in tokens."""
    bootstrap: int = Field(default=1000, ge=100)
    """Samples of the paired bootstrap against the full fine-tune and the base."""


class Tracking(Section):
    """Where MLflow keeps the runs; MLFLOW_TRACKING_URI chooses the server."""

    experiment: str = Field(default="neft", min_length=1)
    """Name of the MLflow experiment."""


class Params(Section):
    """The whole of params.yaml."""

    FILE: ClassVar[str] = "params.yaml"

    model: Model
    """The base model."""
    tasks: dict[str, Task] = Field(min_length=1)
    """Data sets by name."""
    compute: Compute = Compute()
    """Device and precision."""
    warmup: Warmup
    """The limited-step full fine-tune."""
    warmups: dict[str, MoreWarmup] = {}
    """More warm-ups than each task's own, by name: other steps, seeds, rates."""
    scoring: Scoring = Scoring()
    """Candidates."""
    scores: dict[str, Scores] = {}
    """Scores that need no warm-up, by name."""
    activations: dict[str, ActivationScores] = {}
    """Scores by activations, by name."""
    training: Training
    """Defaults of every run."""
    runs: dict[str, Run] = Field(min_length=1)
    """What to train and compare, by name."""
    transfers: dict[str, Transfer] = {}
    """Which runs to test on which other tasks too, by name."""
    evaluation: Evaluation
    """Generation and scoring."""
    tracking: Tracking = Tracking()
    """MLflow."""

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        for section in ("tasks", "runs", "warmups", "scores", "activations", "transfers"):
            for name in getattr(self, section):
                if not NAME.fullmatch(name):
                    raise _refuse(
                        f"{section}: got the name '{name}'; "
                        "names are lower-case letters, digits, '_', '-'"
                    )
        self._names_known()
        self._trained_on_tasks_that_train()
        self._transfers_go_elsewhere()
        self._autocast_where_types_differ()
        self._warmup_fits()
        if isinstance(self.model, BuiltModel):
            for name, task in self.tasks.items():
                if task.format.max_tokens > self.model.context:
                    raise _refuse(
                        f"tasks.{name}.format.max_tokens: got {task.format.max_tokens}; "
                        f"at most model.context, {self.model.context}"
                    )
            if not any(has_pretraining(task.source) for task in self.tasks.values()):
                raise _refuse(
                    "model: kind 'built' needs a task with pre-training rows; "
                    "set source.pretrain or splits.pretrain of one task"
                )
        return self

    def _names_known(self) -> None:
        """Tasks, warm-ups and scores that sections name exist, each name once."""
        for section in ("runs", "warmups", "scores", "activations"):
            for name, entry in getattr(self, section).items():
                _known(f"{section}.{name}.task", entry.task, list(self.tasks))
        for name, activation in self.activations.items():
            where = f"activations.{name}.warmup"
            _known(where, activation.warmup, [*self.tasks, *self.warmups])
        makers = {"tasks": "similarity", "warmups": "similarity", "activations": "activation"}
        criteria: dict[str, str] = {}
        for section in ("tasks", "warmups", "scores", "activations"):
            for name, entry in getattr(self, section).items():
                if name in criteria:
                    raise _refuse(
                        f"{section}.{name}: the name is taken; tasks, warmups, scores and "
                        "activations share theirs"
                    )
                criteria[name] = makers.get(section) or entry.criterion
        for name, run in self.runs.items():
            for where, part in run.selections(f"runs.{name}.method"):
                for scores in part.read(run.task):
                    _known(f"{where}.scores", scores, list(criteria))
                    wanted = part.policy if part.policy in KINDS else "similarity"
                    if part.policy != "random" and criteria[scores] != wanted:
                        raise _refuse(
                            f"{where}.scores: got '{scores}', scores by {criteria[scores]}; policy "
                            f"{part.policy} takes scores by {wanted}"
                        )

    def scored(self, run: str) -> list[str]:
        """Names of the scores that a run selects from; none for a method without a mask."""
        entry = self.runs[run]
        names = [n for _, part in entry.selections("") for n in part.read(entry.task)]
        return list(dict.fromkeys(names))

    def scorer(self, scores: str) -> str:
        """The stage that makes scores of a name, as DVC calls it."""
        families = {"tasks": "score", "warmups": "similarity"}
        for section in ("tasks", "warmups", "scores", "activations"):
            if scores in getattr(self, section):
                return f"{families.get(section, section)}@{scores}"
        raise KeyError(scores)

    def warmed(self, name: str) -> tuple[str, Warmup]:
        """Task and section of a warm-up: a task's own, or one of `warmups`."""
        if name in self.tasks:
            return name, self.warmup
        more = self.warmups[name]
        changes = more.model_dump(exclude_none=True, exclude={"task"})
        return more.task, self.warmup.model_copy(update=changes)

    def _trained_on_tasks_that_train(self) -> None:
        """A task without training rows is tested on, and nothing else."""
        named = [
            (f"{section}.{name}.task", entry.task)
            for section in ("runs", "warmups", "scores", "activations")
            for name, entry in getattr(self, section).items()
        ]
        named += [(f"activations.{name}.warmup", a.warmup) for name, a in self.activations.items()]
        for name, run in self.runs.items():
            for where, part in run.selections(f"runs.{name}.method"):
                named += [(f"{where}.scores", scores) for scores in part.read(run.task)]
        for where, task in named:
            if task in self.tasks and not self.tasks[task].trains:
                raise _refuse(
                    f"{where}: got '{task}', which has no rows to train on; another, or give it "
                    "some"
                )

    def _transfers_go_elsewhere(self) -> None:
        pairs: dict[tuple[str, str], str] = {}
        for name, entry in self.transfers.items():
            for key, known in (("run", self.runs), ("task", self.tasks)):
                got = getattr(entry, key)
                if got not in known:
                    near = difflib.get_close_matches(got, known, n=1)
                    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
                    raise _refuse(f"transfers.{name}.{key}: got '{got}'; {hint}")
            if entry.task == self.runs[entry.run].task:
                raise _refuse(
                    f"transfers.{name}.task: got '{entry.task}', on which run {entry.run} is "
                    "tested anyway; another"
                )
            first = pairs.setdefault((entry.run, entry.task), name)
            if first != name:
                raise _refuse(f"transfers.{name}: the same as transfers.{first}; give it once")

    def _warmup_fits(self) -> None:
        """What the warm-up trains is scored; an update in the backward has no loss to unscale."""
        warmup = self.warmup
        if warmup.layout not in (None, self.scoring.layout):
            raise _refuse(
                f"warmup.layout: got '{warmup.layout}'; the same as scoring.layout, "
                f"'{self.scoring.layout}'"
            )
        if warmup.update == "in_backward" and self.compute.processes > 1:
            raise _refuse(
                "warmup.update: got 'in_backward' with compute.processes "
                f"{self.compute.processes}; one process, or after_backward"
            )
        if warmup.update == "in_backward" and self.compute.mixed_precision == "fp16":
            raise _refuse(
                "warmup.update: got 'in_backward' with compute.mixed_precision fp16, which scales "
                "all gradients at once; use bf16"
            )

    def _autocast_where_types_differ(self) -> None:
        """What trains is float32; amid frozen layers of another type it needs autocast."""
        if self.compute.mixed_precision == "no" and self.compute.dtype in ("bfloat16", "float16"):
            if self.warmup.modules == "candidates":
                raise _refuse(
                    f"compute.mixed_precision: got 'no' with dtype {self.compute.dtype} and "
                    "warmup.modules candidates; set dtype: float32, or mixed_precision: auto"
                )
            for name, run in self.runs.items():
                if isinstance(run.method, InOut | Embed):
                    raise _refuse(
                        f"compute.mixed_precision: got 'no' with dtype {self.compute.dtype} and "
                        f"method {run.method.name} of run {name}; set dtype: float32, or "
                        "mixed_precision: auto"
                    )


def _known(where: str, name: str, names: list[str]) -> None:
    """Refuse a name that isn't one of those, with the nearest."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
        raise _refuse(f"{where}: got '{name}'; {hint}")


def has_pretraining(source: Section) -> bool:
    """Whether a source gives rows for the built model."""
    if isinstance(source, GeneratedSource):
        return source.pretrain > 0
    return isinstance(source, Rows) and source.splits.pretrain is not None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping by the safe loader.

    Raises:
        NeftError: the file is missing, is not UTF-8 YAML, or holds no mapping.
    """
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NeftError(f"{path}: not found; run 'neft init DIR' to make a workspace") from None
    except OSError as fault:
        raise NeftError(f"{path}: {fault.strerror}; give a file that can be read") from None
    except (YAMLError, UnicodeDecodeError) as fault:
        line = getattr(getattr(fault, "problem_mark", None), "line", None)
        at = "" if line is None else f"line {line + 1}: "
        what = getattr(fault, "problem", None) or "not UTF-8 text"
        raise NeftError(f"{path}: {at}{what}; mend the YAML") from None
    if not isinstance(data, dict):
        raise NeftError(f"{path}: holds no mapping; see the README for its sections")
    return data


def parse_params(data: dict[str, Any], where: str) -> Params:
    """Check a params mapping whole.

    Args:
        data: what the YAML file holds.
        where: the file's name, for messages.

    Raises:
        NeftError: one line for each fault, naming file, key, value and what is allowed.
    """
    try:
        return Params.model_validate(data)
    except ValidationError as fault:
        lines = []
        for error in fault.errors(include_url=False):
            lines.append(f"{where}: {_describe(error, data)}")
        raise NeftError("\n".join(dict.fromkeys(lines))) from None


def load_params(path: Path) -> Params:
    """Read and check a params file (see `read_yaml`, `parse_params`)."""
    return parse_params(read_yaml(path), path.name)


def _describe(error: Any, data: Any) -> str:
    """`runs.neft.method.percent: got 140; at most 100` of one pydantic error."""
    keys: list[str] = []
    last = len(error["loc"]) - 1
    for position, part in enumerate(error["loc"]):
        # The tag of a discriminated union stands in the location, but not in the file.
        if isinstance(data, dict) and part not in data and position != last:
            continue
        if isinstance(data, dict) and part not in data and error["type"] != "missing":
            continue
        keys.append(str(part))
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    where = ".".join(keys)
    kind, context, message = error["type"], error.get("ctx", {}), error["msg"]
    if kind == "neft":
        # A message that names its own key continues the path ("budget: got none").
        joint = "." if where and re.match(r"[a-z_.]+: ", message) else ": "
        return f"{where}{joint}{message}" if where else message
    if kind == "missing":
        return f"{where}: missing; it is required"
    if kind.startswith("union_tag"):
        tag = str(context.get("discriminator", "")).strip("'")
        allowed = str(context.get("expected_tags", "")).replace("'", "")
        if kind == "union_tag_not_found":
            return f"{where}.{tag}: missing; it is required"
        return f"{where}.{tag}: got '{context.get('tag')}'; allowed are {allowed}"
    if error["loc"][-1] == "[key]":
        return f"{where}: got a name that is no text; put it in quotes"
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    limits = [f"{text} {context[key]:g}" for key, text in bounds.items() if key in context]
    if kind == "literal_error":
        limits = [f"allowed are {context['expected']}".replace("'", "").replace(" or ", ", ")]
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        number = context["min_length" if few else "max_length"]
        limits = [f"at {'least' if few else 'most'} {number} of them"]
    allowed = limits[0] if limits else _NEEDED.get(kind, message[0].lower() + message[1:])
    return f"{where}: got {_as_yaml(data)}; {allowed}"


_NEEDED = {
    "int_type": "a whole number is needed",
    "float_type": "a number is needed",
    "finite_number": "a finite number is needed",
    "bool_type": "true or false is needed",
    "string_type": "text is needed",
    "string_too_short": "text is needed",
    "list_type": "a list is needed",
    "dict_type": "a mapping of keys is needed",
    "model_type": "a mapping of keys is needed",
    "model_attributes_type": "a mapping of keys is needed",
}
"""What the types of pydantic's errors ask for."""


def _as_yaml(value: Any) -> str:
    """A value as the user wrote it: `true`, not `True`."""
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else ("nothing" if value is None else repr(value))
    )
