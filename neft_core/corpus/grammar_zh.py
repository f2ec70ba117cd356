"""Chinese: measure words, time and place before the verb, 的 before the noun, 了, 不 and 没."""

from dataclasses import replace

from neft_core.corpus.meaning import Clause, Name, Phrase, Place, Pronoun

NUMBERS = "两三四五六七八九十"
PRONOUN = {"I": "我", "you": "你", "he": "他", "she": "她", "we": "我们", "they": "他们"}
MODAL = {"want": "想", "can": "能", "must": "必须"}


def phrase(np: Phrase, counted: bool = True) -> str:
    """Realise a noun phrase; `counted=False` leaves out 一 and its measure word (没有汽车)."""
    head = np.head
    if isinstance(head, Pronoun):
        text = PRONOUN[head.en]
    elif isinstance(head, Name):
        text = head.zh
    else:
        noun = (np.adjective.zh_attribute if np.adjective else "") + head.zh
        before = f"{clause(np.relative)}的" if np.relative else ""
        text = before + (_determiner(np, head.measure) if counted else "") + noun
    return f"{text}和{phrase(np.partner)}" if np.partner else text


def _determiner(np: Phrase, measure: str) -> str:
    match np.determiner:
        case "a":
            return "一" + measure
        case "this":
            return "这" + ("" if np.uncountable else measure)
        case "these":
            return "这些"
        case "number":
            return NUMBERS[np.count - 2] + measure
        case "many":
            return "很多"
        case "few":
            return "几" + measure
        case "my":
            owner = np.owner
            assert owner is not None
            # One 的 is enough where the adjective brings its own: 你漂亮的照片.
            of = "" if np.adjective and np.adjective.zh_attribute.endswith("的") else "的"
            return (owner.zh if isinstance(owner, Name) else PRONOUN[owner.en]) + of
    return ""


def _where(place: Place) -> str:
    return f"在{place.noun.zh}{place.zh}"


def _negation(c: Clause) -> str:
    return "没" if c.tense == "past" or c.kind == "have" else "不"


def _before_verb(c: Clause) -> str:
    """Negation, modal or aspect that stands before the place and the verb."""
    negation = _negation(c) if c.negated else ""
    if c.modal == "must" and c.negated:
        return "不能"
    if c.modal:
        return negation + MODAL[c.modal]
    if c.tense == "future":
        return negation + "会"
    if c.tense == "progressive":
        # Before 在 and a place, 正 alone marks what is going on.
        return negation + ("正" if c.place or c.question == "place" else "正在")
    return negation


def _act(c: Clause) -> str:
    assert c.verb
    verb = c.verb.zh
    done = "了" if c.tense == "past" and not c.negated else ""
    obj = "什么" if c.question == "object" else phrase(c.object) if c.object else ""
    where = _where(c.place) if c.place else ""
    if c.goal:
        obj = c.goal.noun.zh
    elif c.question == "place":
        where = "在哪里"
    before = _before_verb(c)
    if c.companion:
        where += f"和{phrase(c.companion)}一起"
    if c.recipient:
        to = phrase(c.recipient)
        if "…" in verb:
            give, show = verb.split("…")
            return f"{before}{where}{give}{to}{show}{done}{obj}"
        return f"{before}{where}{verb}{done}{to}{obj}"
    return f"{before}{where}{verb}{done}{obj}"


def _predicate(c: Clause) -> str:
    if c.kind == "act":
        return _act(c)
    if c.kind == "have":
        assert c.object
        return f"{'没' if c.negated else ''}有{phrase(c.object, not c.negated)}"
    not_ = "不" if c.negated else ""
    if c.relation and c.ground:
        return f"{not_}在{phrase(c.ground)}{c.relation.zh}"
    if c.place:
        return f"{not_}{_where(c.place)}"
    if c.object:
        return f"{not_}是{phrase(c.object)}"
    assert c.adjective
    if c.compared:
        return f"{not_}比{phrase(c.compared)}{c.adjective.zh}"
    if c.adjective.kind == "colour":
        return f"{not_}是{c.adjective.zh}的"
    if c.intense:
        return f"{not_}非常{c.adjective.zh}"
    # A bare adjective would read as a comparison; 很 is dropped in negation and questions.
    plain = c.negated or c.question == "polar"
    return f"{not_}{'' if plain else '很'}{c.adjective.zh}"


def clause(c: Clause) -> str:
    """Realise a clause without its final mark."""
    if c.weather:
        return (c.time.zh if c.time else "") + c.weather.zh
    if c.kind == "exist":
        assert c.object
        assert c.relation
        assert c.ground
        return f"{phrase(c.ground)}{c.relation.zh}有{phrase(c.object)}"
    if c.kind == "this":
        assert c.object
        return f"{'这些' if c.object.plural else '这'}是{phrase(c.object)}"
    if c.kind == "command":
        assert c.verb
        assert c.object
        start = "请" if c.polite else "不要" if c.negated else ""
        return f"{start}{c.verb.zh}{phrase(c.object)}"
    subject = "谁" if c.question == "subject" else phrase(c.subject) if c.subject else ""
    time = c.time.zh if c.time else ""
    return f"{subject}{time}{_predicate(c)}{'吗' if c.question == 'polar' else ''}"


def sentence(c: Clause) -> str:
    """Realise a whole sentence."""
    text = clause(c)
    if c.second:
        other = clause(c.second)
        match c.link:
            case "because":
                if c.second.subject:  # The name comes with the reason, now first.
                    other = clause(replace(c.second, subject=c.subject))
                    text = clause(replace(c, subject=c.second.subject))
                text = f"因为{other}，所以{text}"
            case "when":
                text = f"{other}的时候，{text}"
            case "if":
                text = f"如果{other}，{text}"
            case "but":
                text = f"{text}，但是{other}"
            case _:
                text = f"{text}，{other}"
    return text + ("？" if c.question else "！" if c.kind == "command" else "。")
