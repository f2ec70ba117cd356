import pytest

from neft_core.errors import NeftError
from neft_core.tasks import PLAIN_TURN, TASKS, Form, pretraining_texts

ROW = {"source": "Put {it} in {target_language} {{", "target": "Mets-{le}"}
LANGUAGES = ("English", "French")


def text(row, form):
    return [(piece.text, piece.trained) for piece in TASKS[form.task](row, form, None)]


def test_a_prompt_is_filled_once_and_braces_in_the_text_are_safe():
    form = Form(
        "translation", "{{{source_language}}}: {source}\n{target_language}:", languages=LANGUAGES
    )
    assert text(ROW, form) == [
        ("{English}: Put {it} in {target_language} {{\nFrench:", False),
        (" Mets-{le}", True),
    ]


@pytest.mark.parametrize(
    ("prompt", "join", "target"),
    [
        ("{source}\nFrench:", None, " b"),
        ("{source}\n", None, "b"),
        ("{source}\u3000", None, "b"),
        ("{source} =", "", "b"),
        ("{source}\n", "\n", "\nb"),
    ],
)
def test_what_joins_prompt_and_target_belongs_to_the_target(prompt, join, target):
    prompt_piece, target_piece = text(
        {"source": "a", "target": "b"}, Form("translation", prompt, join=join)
    )
    assert prompt_piece == (prompt.replace("{source}", "a"), False)
    assert target_piece == (target, True)


def test_a_source_that_ends_in_space_changes_no_join():
    pieces = text({"source": "a ", "target": "b"}, Form("translation", "say {source}"))
    assert pieces == [("say a ", False), (" b", True)]


def test_plain_turns_train_the_answers_alone():
    turns = [
        ("system", "Brief."),
        ("user", "2+2?"),
        ("assistant", "4"),
        ("user", "{x}"),
        ("assistant", "5"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert text(row, Form("instruction", PLAIN_TURN)) == [
        ("### System:\nBrief.\n\n### User:\n2+2?\n\n### Assistant:\n", False),
        ("4", True),
        ("\n\n### User:\n{x}\n\n### Assistant:\n", False),
        ("5", True),
    ]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"task": "haiku"}, "task: got 'haiku'; translation, summarisation, instruction, nli"),
        (
            {"task": "translation", "prompt": "{src}"},
            r"prompt: unknown placeholder \{src\}; \{source\}",
        ),
        ({"task": "translation", "prompt": "{}"}, r"unknown placeholder \{\}"),
        ({"task": "translation", "prompt": "{source!r}"}, r"unknown placeholder \{source!r\}"),
        ({"task": "translation", "prompt": "{source:>9}"}, r"unknown placeholder \{source:>9\}"),
        ({"task": "translation", "prompt": "{source.x}"}, r"unknown placeholder \{source.x\}"),
        ({"task": "translation", "prompt": "French:"}, r"prompt: \{source\} stands 0 times"),
        (
            {"task": "translation", "prompt": "{source"},
            "prompt: .* in '{source'; write '{{' for a brace",
        ),
        (
            {"task": "translation", "prompt": "{source} {target_language}"},
            r"\{target_language\} needs the languages",
        ),
        ({"task": "translation"}, r"instruction: \{source_language\} needs the languages"),
        ({"task": "translation", "instruction": "hi"}, r"instruction: \{source\} stands 0 times"),
        ({"task": "instruction", "prompt": "{content}"}, r"\{role\} stands 0 times"),
        (
            {"task": "instruction", "prompt": "{source}"},
            r"unknown placeholder \{source\}; \{role\}",
        ),
    ],
)
def test_faulty_forms_are_refused(form, text):
    with pytest.raises(NeftError, match=text) as caught:
        Form(**form)
    assert "\n" not in str(caught.value)


def test_pretraining_texts_name_both_directions():
    assert pretraining_texts({"source": "Hi.", "target": "Salut !"}, LANGUAGES) == [
        "English: Hi.\nFrench: Salut !",
        "French: Salut !\nEnglish: Hi.",
    ]


NLI = {"premise": "Il {dort}.", "hypothesis": "Il mange.", "label": "contradiction"}


def test_a_label_is_said_in_the_words_of_the_language():
    form = Form("nli", "{premise} {hypothesis} ({language}: {labels})", languages=("French",) * 2)
    assert text(NLI, form) == [
        ("Il {dort}. Il mange. (French: implication, neutre, contradiction)", False),
        (" contradiction", True),
    ]
    german = Form("nli", "{premise}\n{hypothesis}\n", languages=("German", "German"))
    assert text(NLI | {"label": "entailment"}, german)[1] == ("Folgerung", True)
    own = {"entailment": "oui", "neutral": "peut-être", "contradiction": "non"}
    form = Form("nli", "{premise}{hypothesis}:", labels=own)
    assert text(NLI, form)[1] == (" non", True)


def test_a_summary_is_asked_for_in_its_language():
    form = Form("summarisation", "{source}\n{target_language}:", languages=("Hindi", "Chinese"))
    assert text({"source": "पाठ", "target": "文"}, form) == [
        ("पाठ\nChinese:", False),
        (" 文", True),
    ]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"prompt": "{premise}"}, r"prompt: \{hypothesis\} stands 0 times"),
        ({"prompt": "{premise} {source}"}, r"unknown placeholder \{source\}; \{premise\}"),
        ({"prompt": "{premise}{hypothesis}", "languages": ("Maori", "Maori")},
         "labels: none are known in Maori; give what says entailment, neutral, contradiction"),
        ({"prompt": "{premise}{hypothesis}", "labels": {"entailment": "ja"}},
         "labels: got entailment; entailment, neutral, contradiction are needed"),
        ({"prompt": "{premise}{hypothesis}",
          "labels": {"entailment": "a", "neutral": "b", "contradiction": "a "}},
         "labels: got 'a', 'b', 'a'; three different texts are needed"),
    ],
)  # fmt: skip
def test_faulty_forms_of_nli_are_refused(form, message):
    with pytest.raises(NeftError, match=message):
        Form("nli", **form)


def test_plain_texts_pretrain_as_they_are():
    assert pretraining_texts({"text": "Er schläft."}, ("German", "German")) == [
        "German: Er schläft."
    ]
