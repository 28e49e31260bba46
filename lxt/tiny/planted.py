"""Prompts whose answer has a known cause: the planted ground truth of the bundled model.

Four tasks, each with one generator. A generator composes a prompt from a template, remembers where each field of the
template went, and returns a `Planted`: the prompt, its answer, the span that the answer is copied from (`source`) and
the spans that select it (`cues`). Words are split by `split`: whatever `held_out` uses as name, animal, key or number
never stands in that role in `train` (see `lxt.tiny.words`).

    >>> generate("pets", "held_out", 1)[0].answer
    ' otters'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from string import Formatter
from typing import Literal

from lxt.tiny import words

__all__ = ["TASKS", "Planted", "Span", "Split", "fill", "generate", "indirect_object", "induction", "pets", "recall"]

Split = Literal["train", "held_out"]
Span = tuple[int, int]  # half-open, in characters of the prompt


@dataclass(frozen=True)
class Planted:
    """One prompt, its answer, and the places in the prompt that determine it.

    Attributes:
        task: a key of `TASKS`.
        prompt: the text before the answer.
        answer: the text that follows, with its leading space where it has one; a single token.
        foil: the answer that the same template would want had the cues been different; for contrasts.
        source: where the answer stands in the prompt, without a leading space.
        cues: what selects it, without leading spaces: a program that ignores one of them cannot know the answer.
        rivals: what stands in the same places for other answers, and should not matter as much; recall only.
        repeat_start: for induction, where in the prompt the words begin again; 0 for the other tasks.
    """

    task: str
    prompt: str
    answer: str
    foil: str
    source: Span
    cues: tuple[Span, ...]
    rivals: tuple[Span, ...] = ()
    repeat_start: int = 0

    @property
    def causes(self) -> tuple[Span, ...]:
        """Source and cues together, in the order of the text."""
        return tuple(sorted((self.source, *self.cues)))


def generate(task: str, split: Split, count: int, seed: int = 0) -> list[Planted]:
    """The first `count` prompts of a task, a function of the arguments alone."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'held_out'")
    rng = Random(f"{task} {split} {seed}")
    return [TASKS[task](rng, split) for _ in range(count)]


_MEETINGS = (
    "When {A} and {B} went to the {place}",
    "After {A} and {B} went to the {place}",
    "When {A} and {B} met at the {place}",
    "While {A} and {B} were at the {place}",
    "Then {A} and {B} had a long day at the {place}. In the evening",
    "Yesterday {A} and {B} walked to the {place}. There",
    "{A} and {B} were at the {place}. Then",
    "Friends {A} and {B} found a {thing} at the {place}. Later",
)
_GIFTS = (
    "{S} gave the {thing} to",
    "{S} gave a {thing} to",
    "{S} handed the {thing} to",
    "{S} wanted to give the {thing} to",
    "{S} showed a {adjective} {thing} to",
    "{S} sold the {thing} to",
    "{S} said hello to",
)


def indirect_object(rng: Random, split: Split) -> Planted:
    """Two people, one of whom acts: the other receives ("When John and Mary ..., John gave the bag to" → " Mary")."""
    giver, receiver = rng.sample(_pool(words.FEMALE + words.MALE, words.HELD_OUT_NAMES, split), 2)
    first, second = (giver, receiver) if rng.random() < 0.5 else (receiver, giver)
    template = _opening(rng) + f"{rng.choice(_MEETINGS)}, {rng.choice(_GIFTS)}"
    if split == "held_out" and template.startswith("{A}"):
        # A name that begins the text is another token than the same name later, which has a space before it. That the
        # two belong together can be learned of each name only.
        template = "Listen. " + template
    text, spans = fill(
        template,
        {
            "A": first,
            "B": second,
            "S": giver,
            "place": rng.choice(words.PLACES),
            "thing": rng.choice(words.THINGS),
            "adjective": rng.choice(words.ADJECTIVES),
        },
    )
    source, other = (spans["B"][0], spans["A"][0]) if second == receiver else (spans["A"][0], spans["B"][0])
    return Planted("indirect_object", text, f" {receiver}", f" {giver}", source, (other, spans["S"][0]))


_OWNERS = (  # who has, whose, and the possessive that ends the sentence
    ("I have", "My", "my"),
    ("We have", "Our", "our"),
    ("They have", "Their", "their"),
    ("She has", "Her", "her"),
    ("He has", "His", "his"),
    ("{woman} has", "Her", "her"),
    ("{man} has", "His", "his"),
)
_COMPANY = (
    "love to play with",
    "like to play with",
    "love to sleep next to",
    "like to run after",
    "are afraid of",
    "are friends with",
    "eat together with",
    "love to look at",
)


def pets(rng: Random, split: Split) -> Planted:
    """Two kinds of animals, one of which acts: the other completes the sentence ("... My cats love my" → " dogs")."""
    subject, answer = rng.sample(_pool(words.ANIMALS, words.HELD_OUT_ANIMALS, split), 2)
    first, second = (subject, answer) if rng.random() < 0.5 else (answer, subject)
    has, whose, ending = rng.choice(_OWNERS)
    has = has.format(woman=rng.choice(words.FEMALE), man=rng.choice(words.MALE))
    if rng.random() < 0.2:
        counts = [rng.choice(words.NUMBER_WORDS) for _ in range(2)]
    else:
        counts = [str(rng.randint(2, 30)) for _ in range(2)]
    text, spans = fill(
        _opening(rng) + f"{has} {{n}} {{A}} and {{m}} {{B}}. {whose} {{S}} {rng.choice(_COMPANY)} {ending}",
        {"n": counts[0], "m": counts[1], "A": first, "B": second, "S": subject},
    )
    source, other = (spans["B"][0], spans["A"][0]) if second == answer else (spans["A"][0], spans["B"][0])
    return Planted("pets", text, f" {answer}", f" {subject}", source, (other, spans["S"][0]))


_FRAMES = (  # (group of keys, who, what they did, unit)
    ("year", "the {key} expedition", ("reached", "climbed to", "stopped at", "turned back at"), "metres"),
    ("year", "the {key} expedition", ("reached", "got to"), "m"),
    ("year", "the team of {key}", ("reached", "walked"), "miles"),
    ("nation", "the {key} team", ("reached", "climbed to", "stopped at"), "metres"),
    ("nation", "the {key} ship", ("carried", "lost", "sold"), "tons"),
    ("colour", "the {key} house", ("cost", "was sold for"), "coins"),
    ("colour", "the {key} boat", ("sailed", "travelled"), "miles"),
    ("town", "the museum of {key}", ("shows", "owns"), "pictures"),
    ("town", "the library in {key}", ("has", "holds"), "books"),
    ("town", "the school in {key}", ("has", "teaches"), "children"),
)
_QUESTIONS = (
    "According to the text, {fact}",
    "As we read, {fact}",
    "So {fact}",
    "In short, {fact}",
    "Remember that {fact}",
    "It is true that {fact}",
    "{Fact}",
)
_JOINTS = (". {Fact}", ". {Fact}", ", and {fact}", ", but {fact}", ". Later {fact}", ". We know that {fact}")


def recall(rng: Random, split: Split) -> Planted:
    """Several facts of one kind, then one of them again up to the thousands ("... reached 8," → "326")."""
    group, who, verbs, unit = rng.choice(_FRAMES)
    count = rng.choice((2, 3, 3, 4))
    keys = _keys(rng, group, count, split)
    tails = rng.sample([n for n in range(1000) if words.held_out_number(n) == (split == "held_out")], count)
    # Facts often share their thousands, so that "8," alone does not find the answer.
    shared = rng.randint(1, 29)
    heads = [shared if rng.random() < 0.6 else rng.randint(1, 29) for _ in range(count)]
    asked = rng.randrange(count)
    heads[asked] = shared
    values = {"unit": unit}
    for i in range(count):
        values |= {f"key{i}": keys[i], f"head{i}": str(heads[i]), f"tail{i}": f"{tails[i]:03d}"}

    def fact(i: int, ending: str) -> str:
        return who.replace("{key}", f"{{key{i}}}") + f" {rng.choice(verbs)} {{head{i}}},{ending}"

    after = rng.random() < 0.3
    template = _opening(rng) + _place("After {fact}" if after else "{Fact}", fact(0, "{tail0} {unit}"))
    for i in range(1, count):
        joint = ", {fact}" if after and i == 1 else rng.choice(_JOINTS)
        template += _place(joint, fact(i, f"{{tail{i}}} {{unit}}"))
    template += ". " + _opening(rng) + _place(rng.choice(_QUESTIONS), fact(asked, ""))
    text, spans = fill(template, values)
    others = [i for i in range(count) if i != asked]
    foil = values[f"tail{rng.choice(others)}"]
    cues = tuple(spans[f"key{asked}"])
    rivals = tuple(spans[f"{field}{i}"][0] for i in others for field in ("key", "tail"))
    return Planted("recall", text, values[f"tail{asked}"], foil, spans[f"tail{asked}"][0], cues, rivals)


def _keys(rng: Random, group: str, count: int, split: Split) -> list[str]:
    if group == "year":
        years = [y for y in range(1800, 2030) if words.held_out_number(y) == (split == "held_out")]
        return [str(year) for year in rng.sample(years, count)]
    return rng.sample(_pool(words.KEYS[group], words.HELD_OUT_KEYS, split), count)


def _place(joint: str, fact: str) -> str:
    """A fact in its joint; `{Fact}` begins a sentence. Fields of the fact itself stay as they are."""
    return joint.replace("{fact}", fact).replace("{Fact}", fact[0].upper() + fact[1:])


def induction(rng: Random, split: Split) -> Planted:
    """Random words, then the same words again up to some point: the next one follows.

    In `held_out` the last word shown and the answer are held out; the words around them are ordinary ones.
    """
    chosen = rng.sample([word for word in LEXICON if word not in words.HELD_OUT_INDUCTION], rng.randint(5, 20))
    shown = rng.randint(1, len(chosen) - 1)
    if split == "held_out":
        chosen[shown - 1 : shown + 1] = rng.sample(words.HELD_OUT_INDUCTION, 2)
    text, spans = fill(
        " ".join(f"{{w{i}}}" for i in [*range(len(chosen)), *range(shown)]),
        {f"w{i}": word for i, word in enumerate(chosen)},
    )
    foil = chosen[(shown + 1) % len(chosen)]
    return Planted(
        "induction",
        text,
        f" {chosen[shown]}",
        f" {foil}",
        spans[f"w{shown}"][0],
        tuple(spans[f"w{shown - 1}"]),
        repeat_start=spans["w0"][1][0],
    )


def _pool(every: Sequence[str], held_out: Sequence[str], split: Split) -> list[str]:
    return [word for word in every if (word in held_out) == (split == "held_out")]


_OPENINGS = ("It was a {adjective} day. ", "The {place} was {adjective}. ", "Here is a story. ", "Listen. ")


def _opening(rng: Random) -> str:
    """Nothing, or a sentence that has nothing to do with the answer."""
    if rng.random() < 0.7:
        return ""
    values = {"place": rng.choice(words.PLACES), "adjective": rng.choice(words.ADJECTIVES)}
    return fill(rng.choice(_OPENINGS), values)[0]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, list[Span]]]:
    """`template.format(**values)`, and where each field went."""
    text, spans = "", {}
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            spans.setdefault(field, []).append((len(text), len(text) + len(values[field])))
            text += values[field]
    return text, spans


LEXICON: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *words.FEMALE,
            *words.MALE,
            *words.ANIMALS,
            *words.PLACES,
            *words.THINGS,
            *words.ADJECTIVES,
            *words.NUMBER_WORDS,
            *(key for keys in words.KEYS.values() for key in keys),
            *words.COMMON,
        )
    )
)
TASKS: dict[str, Callable[[Random, Split], Planted]] = {
    "indirect_object": indirect_object,
    "pets": pets,
    "recall": recall,
    "induction": induction,
}
