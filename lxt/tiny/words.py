"""The lexicon of the bundled model, and which words are held out from which role.

A held-out word is an ordinary word to the model: it occurs in the stories, among the random ids, and in the tasks that
it is not held out from. It never occurs, during training, in the role it is held out from.
"""

from __future__ import annotations

__all__ = [
    "ADJECTIVES",
    "ANIMALS",
    "COMMON",
    "FEMALE",
    "HELD_OUT_ANIMALS",
    "HELD_OUT_INDUCTION",
    "HELD_OUT_KEYS",
    "HELD_OUT_NAMES",
    "KEYS",
    "MALE",
    "NUMBER_WORDS",
    "PLACES",
    "THINGS",
    "held_out_number",
]

FEMALE = tuple(
    "Mary Alice Anna Emma Laura Sarah Julia Clara Helen Grace Lucy Nina Rosa Eva Sofia Maria Ruth Jane Kate Lisa "
    "Martha Olivia Amelia Hannah Irene Karen Linda Megan Nora Paula Rachel Susan Tina Vera Wendy Zoe Diana Fiona "
    "Elena Ingrid Leila Aisha Priya Yuki Chloe Ella Rita Joan".split()
)
MALE = tuple(
    "John Tom James Peter Paul Mark David Daniel Simon Henry George Oliver Jack Harry Max Leo Felix Oscar Victor "
    "Martin Robert Michael Thomas William Andrew Adam Alan Brian Carl Edward Frank Gary Hugo Ivan Jacob Kevin Luke "
    "Nathan Patrick Ralph Steven Walter Omar Ravi Kenji Diego Erik Bruno".split()
)
HELD_OUT_NAMES = tuple(
    "Mary Clara Rosa Ruth Hannah Nora Zoe Leila Yuki Joan John Mark Henry Felix Robert Adam Ivan Luke Omar Erik".split()
)

ANIMALS = tuple(
    "cats dogs birds rabbits horses goats sheep ducks hens pigs cows mice hamsters parrots turtles snakes frogs "
    "lizards ferrets donkeys geese pigeons ponies kittens puppies foxes owls bees spiders crabs lambs swans crows "
    "otters camels llamas beetles snails deer squirrels".split()
)
HELD_OUT_ANIMALS = tuple("cats dogs hamsters parrots goats turtles geese owls otters snails".split())

PLACES = tuple(
    "shops park school station market river library garden beach forest museum kitchen office bakery harbour theatre "
    "hospital church farm castle village bridge cinema restaurant hotel airport field lake mountain street".split()
)
THINGS = tuple(
    "bag book ball letter key cup hat apple ring coat lamp map drink ticket flower clock box pen picture basket "
    "guitar necklace bottle camera phone umbrella chair plate knife blanket".split()
)
ADJECTIVES = tuple(
    "small big old new happy sad quiet loud warm cold bright dark long short clean dirty heavy light strange kind "
    "brave tired hungry funny lovely empty".split()
)
NUMBER_WORDS = tuple("two three four five six seven eight nine ten eleven twelve".split())

# What a recalled fact is about. Keys of one group stand in the same sentences.
KEYS: dict[str, tuple[str, ...]] = {
    "nation": tuple(
        "British Norwegian Swiss French German Italian Polish Dutch Spanish Swedish Chinese Indian Russian Japanese "
        "Korean Danish Turkish Greek Irish Finnish".split()
    ),
    "colour": tuple(
        "red blue green yellow black white brown grey purple orange pink silver golden violet scarlet amber".split()
    ),
    "town": tuple(
        "London Paris Berlin Rome Madrid Vienna Oslo Dublin Lisbon Prague Warsaw Athens Cairo Delhi Tokyo Boston "
        "Chicago Denver Lima Quito".split()
    ),
}
HELD_OUT_KEYS = tuple(
    "Norwegian Italian Dutch Indian Irish blue brown silver amber Paris Oslo Prague Delhi Lima".split()
)

# Frequent words, so that ordinary text is cut into words and not into letters.
COMMON = tuple(
    "the of and to in is was that for it with as his her on be at by had are but from have an they which one you were "
    "all their there been if more when will would who so no out up said what its about than into them can only other "
    "time some could these two may then do first any my now such like our over man me even most made after also did "
    "many before must through back years where much your way well down should because each just those people how too "
    "little state good very make world still own see men work long get here between both life being under never day "
    "same another know while last might us great since go right come take again against during always why every "
    "found left part house however few children water word words name number night home think say help turn start "
    "story head eye eyes hand face friend friends mother father sister brother family woman boy girl child dog cat "
    "bird tree trees sun rain snow wind morning evening summer winter road room door window table bed food bread "
    "milk tea money music game song play plays played run runs walk walked talk talked look looked found give gave "
    "told tell asked answer question text true false model language learn learned write wrote read open close city "
    "country war king queen year week month hour minute thing things today yesterday tomorrow next once twice half "
    "near far high low young early late ever often together alone almost enough without until although though "
    "something nothing everything someone everyone nobody".split()
)

# Words of the stories that no repeated sequence of words contains; among random ids they do occur.
HELD_OUT_INDUCTION = tuple(
    "shops river museum office castle hotel lake bag letter apple lamp ticket clock basket camera plate small happy "
    "loud cold long heavy strange tired empty".split()
)


def held_out_number(number: int) -> bool:
    """Whether a year, or the last three digits of a value, is held out from recall."""
    return number % 10 in (2, 6)
