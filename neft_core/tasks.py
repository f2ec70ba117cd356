"""Tasks: how a row is put before a model, as pieces of text.

The pieces are tokenised each by itself (`encoding.py`). The prompt is all before the last trained
one, so generation starts from exactly the ids that training saw there, whatever the tokenizer
would merge across the boundary.
"""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from neft_core.errors import NeftError
from neft_core.rows import LABELS, Row

CHAT = "chat"
TRANSLATE = "Translate the following text from {source_language} to {target_language}.\n{source}"
SUMMARISE = "Summarize the following text in {target_language}.\n{source}"
INFER = (
    "Premise: {premise}\nHypothesis: {hypothesis}\n"
    "Is the hypothesis true, given the premise? Answer in {language}: {labels}."
)
PLAIN_TURN = "### {role}:\n{content}\n\n"
LABEL_TEXTS = {
    "english": ("entailment", "neutral", "contradiction"),
    "french": ("implication", "neutre", "contradiction"),
    "german": ("Folgerung", "neutral", "Widerspruch"),
    "chinese": ("蕴含", "中立", "矛盾"),
    "hindi": ("निहितार्थ", "तटस्थ", "विरोधाभास"),
}
"""Texts of `LABELS` where a task doesn't give its own."""


def labels_in(language: str) -> dict[str, str] | None:
    """What says each of `LABELS` in a language, by its English name; None: it isn't known."""
    texts = LABEL_TEXTS.get(language.lower())
    return None if texts is None else dict(zip(LABELS, texts, strict=True))


class Piece(NamedTuple):
    """Text that is tokenised by itself."""

    text: str
    trained: bool = False
    literal: bool = False  # "</s>" in it is text and no token
    closed: bool = False  # an end-of-sequence token follows, trained as the piece is


@dataclass(frozen=True)
class Form:
    """How rows of a task are put before a model.

    Raises:
        NeftError: unknown task, or a placeholder that is unknown, missing or broken.
    """

    task: str
    """A key of `TASKS`."""
    prompt: str = CHAT
    """`chat` for the model's chat template. Else a text with the placeholders of `PLACEHOLDERS`, of
    which those with the row's own text must stand once; for instruction the form of one turn, such
    as `PLAIN_TURN`. `{{` stands for a brace."""
    join: str | None = None
    """What stands between a prompt and its target, part of the target's tokens; None: a space, or
    nothing where the prompt ends in white space."""
    instruction: str | None = None
    """The user's turn under `chat`, placeholders as in `prompt`; None: that of `INSTRUCTIONS`."""
    languages: tuple[str, str] | None = None
    """Names of source and target language, for the placeholders; of nli, its language twice."""
    labels: Mapping[str, str] | None = None
    """Of nli: what the model says for each of `LABELS`; None: `LABEL_TEXTS` of the language."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise NeftError(f"task: got '{self.task}'; {', '.join(TASKS)}")
        known, needed = PLACEHOLDERS[self.task]
        if self.prompt != CHAT:
            text, key = self.prompt, "prompt"
        elif self.task == "instruction":
            return
        else:
            text, key = self.asked, "instruction"
        found = _placeholders(text, key, known, needed)
        named = sorted(name for name in found if name.endswith("language"))
        if self.languages is None and named:
            raise NeftError(f"{key}: {{{named[0]}}} needs the languages' names")
        if self.task == "nli":
            _check_labels(self.label_texts)

    @property
    def asked(self) -> str:
        """The user's turn of a chat, with placeholders."""
        return INSTRUCTIONS[self.task] if self.instruction is None else self.instruction

    @property
    def label_texts(self) -> dict[str, str]:
        """Of nli: what the model says for each label."""
        if self.labels is not None:
            return dict(self.labels)
        language = self.languages[1] if self.languages else "English"
        texts = labels_in(language)
        if texts is None:
            raise NeftError(
                f"labels: none are known in {language}; give what says {', '.join(LABELS)} there"
            )
        return texts


def pretraining_texts(row: Row, languages: tuple[str, str]) -> list[str]:
    """The texts on which a base model learns from a row.

    Of a pair both directions, named by language; of a plain text itself, named by its language.
    """
    one, two = languages
    if "text" in row:
        return [f"{one}: {row['text']}"]
    source, target = row["source"], row["target"]
    return [f"{one}: {source}\n{two}: {target}", f"{two}: {target}\n{one}: {source}"]


def _pair(row: Row, form: Form, tokenizer: Any) -> list[Piece]:
    values = {"source": row["source"]}
    if form.languages is not None:
        values["source_language"], values["target_language"] = form.languages
    return _asked_and_answered(values, row["target"], form, tokenizer)


def _nli(row: Row, form: Form, tokenizer: Any) -> list[Piece]:
    texts = form.label_texts
    values = {name: row[name] for name in ("premise", "hypothesis")}
    values["labels"] = ", ".join(texts.values())
    if form.languages is not None:
        values["language"] = form.languages[1]
    return _asked_and_answered(values, texts[row["label"]], form, tokenizer)


def _asked_and_answered(
    values: Mapping[str, str], target: str, form: Form, tokenizer: Any
) -> list[Piece]:
    """One question and the answer to learn."""
    if form.prompt == CHAT:
        asked = {"role": "user", "content": _filled(form.asked, values)}
        return _chat([asked, {"role": "assistant", "content": target}], tokenizer)
    join = form.join
    if join is None:
        join = "" if form.prompt[-1:].isspace() else " "
    prompt = Piece(_filled(form.prompt, values))
    return [prompt, Piece(join + target, trained=True, literal=True, closed=True)]


def _instruction(row: Row, form: Form, tokenizer: Any) -> list[Piece]:
    if form.prompt == CHAT:
        return _chat(row["messages"], tokenizer)
    pieces = []
    pending = ""
    for turn in row["messages"]:
        values = {"role": turn["role"].capitalize(), "content": turn["content"]}
        if turn["role"] != "assistant":
            pending += _filled(form.prompt, values)
            continue
        before, after = _filled(form.prompt, {**values, "content": "\0"}).split("\0")
        pieces.append(Piece(pending + before))
        pieces.append(Piece(turn["content"], trained=True, literal=True, closed=True))
        pending = after
    return pieces


TASKS: dict[str, Callable[[Row, Form, Any], list[Piece]]] = {
    "translation": _pair,
    "summarisation": _pair,
    "instruction": _instruction,
    "nli": _nli,
}

INSTRUCTIONS = {"translation": TRANSLATE, "summarisation": SUMMARISE, "nli": INFER}
"""What a user asks under `chat`."""

_LANGUAGES = ("source_language", "target_language")
PLACEHOLDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "translation": (("source", *_LANGUAGES), ("source",)),
    "summarisation": (("source", *_LANGUAGES), ("source",)),
    "instruction": (("role", "content"), ("role", "content")),
    "nli": (("premise", "hypothesis", "language", "labels"), ("premise", "hypothesis")),
}
"""Placeholders of each kind of task: those known, and those that must stand once."""


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> list[Piece]:
    """The model's own template, applied turn by turn to see which text each answer adds."""
    if not getattr(tokenizer, "chat_template", None):
        raise NeftError(
            f"prompt: got '{CHAT}', but the tokenizer has no chat template; "
            "take 'plain', or a model made for conversations"
        )
    pieces: list[Piece] = []
    done = ""
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _rendered(messages[:number], tokenizer, add_generation_prompt=True)
        after = _rendered(messages[: number + 1], tokenizer, add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise NeftError(
                f"prompt: got '{CHAT}', but the model's chat template rewrites earlier text when "
                f"turn {number + 1} is added; give the form as text"
            )
        head, end, _ = after.rpartition(tokenizer.eos_token)
        answered = head + end if len(head) >= len(before) and end else after
        pieces.append(Piece(before[len(done) :]))
        pieces.append(Piece(answered[len(before) :], trained=True))
        done = answered
    if not pieces[-1].text.endswith(tokenizer.eos_token):
        pieces[-1] = pieces[-1]._replace(closed=True)
    return pieces


def _rendered(
    messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise NeftError(
            f"prompt: the model's chat template refuses the conversation ({error}); give the form "
            "as text or change the rows"
        ) from error
    return str(text)


def _check_labels(texts: Mapping[str, str]) -> None:
    if sorted(texts) != sorted(LABELS):
        raise NeftError(f"labels: got {', '.join(texts) or 'none'}; {', '.join(LABELS)} are needed")
    said = [text.strip() for text in texts.values()]
    if not all(said) or len(set(said)) < len(said):
        raise NeftError(
            f"labels: got {', '.join(map(repr, said))}; three different texts are needed"
        )


def _placeholders(text: str, key: str, known: tuple[str, ...], needed: tuple[str, ...]) -> set[str]:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise NeftError(f"{key}: {error} in {text!r}; write '{{{{' for a brace") from error
    names = [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    ]
    for name in names:
        if name not in known:
            allowed = ", ".join(f"{{{one}}}" for one in known)
            raise NeftError(f"{key}: unknown placeholder {{{name}}}; {allowed}")
    for name in needed:
        if names.count(name) != 1:
            raise NeftError(f"{key}: {{{name}}} stands {names.count(name)} times; once is needed")
    return set(names)


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Fill the placeholders once; braces in the values stay as they are."""
    parts = string.Formatter().parse(text)
    return "".join(literal + (values[name] if name else "") for literal, name, _, _ in parts)
