"""Section `tasks`: where rows come from, and what they become."""

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from neft_core.config.section import NO_FILE, Place, Section, Seed, refuse
from neft_core.rows import FIELDS, LABELS
from neft_core.tasks import labels_in


class GeneratedSource(Section):
    """The rule-based parallel corpus of this package."""

    kind: Literal["generated"]
    """Where the rows come from."""
    path: Literal["data/none"] = NO_FILE
    """No local file."""
    languages: list[str] = Field(min_length=1, max_length=2)
    """Source and target, of `GENERATED` here; of nli its one language."""
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
    seed: Seed = 1
    """Seed of the meanings; the same for every language pair, so that pairs are parallel."""

    @model_validator(mode="after")
    def _trains_and_chooses(self) -> "GeneratedSource":
        if bool(self.train) != bool(self.dev):
            raise refuse(
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
    """At most so many training rows (a seeded sample; a larger one contains a smaller one). With
    `long_inputs: drop` this, `dev`, `test` and `skip` count rows that are not dropped."""
    dev: int | None = Field(default=None, ge=1)
    """At most so many dev rows; how many to split off where there is no dev part."""
    test: int | None = Field(default=None, ge=1)
    """At most so many test rows; how many to split off where there is no test part."""
    pretrain: int | None = Field(default=None, ge=1)
    """At most so many pre-training rows."""
    skip: int = Field(default=0, ge=0)
    """Leave out so many training rows of the sample's order first: with the `train` of another task
    here, the two samples share no row."""
    seed: Seed = 1
    """Seed of the sample and of the split."""

    @model_validator(mode="after")
    def _sizes_of_missing_splits(self) -> "Rows":
        if self.splits.train is None:
            if self.splits.test is None or self.splits.dev or self.dev or self.train:
                raise refuse(
                    "splits.train: missing; give it, or splits.test alone for a task that is only "
                    "tested on"
                )
            return self
        for name in ("dev", "test"):
            if getattr(self.splits, name) is None and getattr(self, name) is None:
                raise refuse(f"{name}: missing; give splits.{name}, or how many rows to split off")
        return self


class LocalSource(Rows):
    """Local jsonl, json (lines), csv, tsv, txt (tab-separated) or parquet files."""

    kind: Literal["local"]
    """Where the rows come from."""
    path: Place
    """The folder that holds the files, relative to the workspace or absolute."""


class HubSource(Rows):
    """A data set on the Hugging Face Hub."""

    kind: Literal["hub"]
    """Where the rows come from."""
    path: Place = NO_FILE
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
            raise refuse(
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
    """What the model says for each label; null: the words of the language in neft_core/tasks.py. A
    task on which runs of another are tested has that one's."""
    max_tokens: int = Field(ge=8)
    """Longest training text in tokens; longer rows are dropped and counted."""

    @property
    def target_language(self) -> str:
        """The language of the answers."""
        return self.language

    @property
    def answers(self) -> dict[str, str] | None:
        """What the model says for each label; None: not given, and not known in the language."""
        return labels_in(self.language) if self.labels is None else self.labels


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
            raise refuse(
                f"source: kind 'generated' makes rows of {', '.join(GENERATED)}; format.task is "
                f"{kind}"
            )
        for code in source.languages:
            if code not in GENERATED[kind]:
                raise refuse(
                    f"source.languages: got '{code}'; of {kind} allowed are "
                    f"{', '.join(GENERATED[kind])}"
                )
        if len(source.languages) != (1 if kind == "nli" else 2):
            needed = "one" if kind == "nli" else "source and target"
            raise refuse(f"source.languages: got {source.languages}; {kind} needs {needed}")
        if len(set(source.languages)) < len(source.languages):
            raise refuse(
                f"source.languages: got '{source.languages[0]}' twice; source and target must "
                "differ"
            )
        if source.constructions and kind != "translation":
            raise refuse(f"source.constructions: given with {kind}; they are for translation")
        return self

    @model_validator(mode="after")
    def _columns_of_its_kind(self) -> "Task":
        source, kind = self.source, self.format.task
        if isinstance(source, Rows):
            needed = set(FIELDS[kind])
            found = set(source.columns)
            if found and not needed <= found <= needed | {"references"}:
                raise refuse(
                    f"source.columns: got {', '.join(sorted(found))}; {kind} needs "
                    f"{', '.join(FIELDS[kind])}"
                )
            if source.labels is not None and (kind != "nli" or set(source.labels) != set(LABELS)):
                raise refuse(
                    f"source.labels: got {', '.join(source.labels)}; of nli all of "
                    f"{', '.join(LABELS)}"
                )
        return self


def has_pretraining(source: Section) -> bool:
    """Whether a source gives rows for the built model."""
    if isinstance(source, GeneratedSource):
        return source.pretrain > 0
    return isinstance(source, Rows) and source.splits.pretrain is not None
