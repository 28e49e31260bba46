"""Plain stories: the text around the tasks, in which every word occurs, held out from a task or not."""

from __future__ import annotations

from random import Random

from lxt.tiny import words
from lxt.tiny.planted import fill

__all__ = ["story"]

_STORY_STARTS = (
    "{Name} lived in a {adjective} house near the {place}.",
    "One day {Name} found a {adjective} {thing} in the {place}.",
    "{Name} wanted to buy a {thing}, but the {place} was closed.",
    "It was a {adjective} morning and {Name} walked to the {place}.",
    "In {year} {Name} came to {town} with a {adjective} {thing}.",
    "There was once a {nation} teacher who lived in {town}.",
    "{Name} loved {animals}, and every day {animals} came to the {place}.",
)
_STORY_MIDDLES = (
    "The {place} was {adjective} and the {thing} was {adjective2}.",
    "{They} saw {number} {animals} near the {place}.",
    "There were {n} {animals} and {m} people in the {place}.",
    "{They} put the {thing} on the {colour} table and looked at it.",
    "A {colour} {thing} lay next to the {adjective} {thing2}.",
    "The {animals} ran away because the {place} was too {adjective}.",
    "{They} asked a friend about the {thing}, but nobody knew the answer.",
    "In {town} a {thing} cost {n},{tail} coins.",
    "The {nation} boat came back in {year} with {tail} boxes.",
    "Some people say that {animals} are {adjective}, but that is not true.",
    "Then {they} took the {thing} and went home.",
)
_STORY_ENDS = (
    "In the end everyone was {adjective}.",
    "After that {they} never saw the {thing} again.",
    "That night {they} slept well.",
    "It was the end of a {adjective} day.",
    "The {animals} were very {adjective}.",
)


def story(rng: Random) -> str:
    """A few plain sentences, in which every word of the lexicon occurs, held out from elsewhere or not."""
    middles = rng.sample(_STORY_MIDDLES, rng.randint(1, 4))
    template = " ".join([rng.choice(_STORY_STARTS), *middles, rng.choice(_STORY_ENDS)])
    female = rng.random() < 0.5
    adjectives, things = rng.sample(words.ADJECTIVES, 2), rng.sample(words.THINGS, 2)
    return fill(
        template,
        {
            "Name": rng.choice(words.FEMALE if female else words.MALE),
            "They": "She" if female else "He",
            "they": "she" if female else "he",
            "adjective": adjectives[0],
            "adjective2": adjectives[1],
            "thing": things[0],
            "thing2": things[1],
            "place": rng.choice(words.PLACES),
            "animals": rng.choice(words.ANIMALS),
            "number": rng.choice(words.NUMBER_WORDS),
            "n": str(rng.randint(2, 99)),
            "m": str(rng.randint(2, 99)),
            "tail": str(rng.randint(100, 999)),
            "year": str(rng.randint(1800, 2029)),
        }
        | {group: rng.choice(keys) for group, keys in words.KEYS.items()},
    )[0]
