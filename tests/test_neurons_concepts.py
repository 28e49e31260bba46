"""The bundled model: neurons of planted concepts are found, and keep to their concept on words that found nothing."""

import random
from statistics import mean

import pytest

import lxt
from lxt.neurons.results import Neuron
from lxt.neurons.running import label
from lxt.tiny import planted, words

CONCEPTS = {
    "names": words.FEMALE + words.MALE,
    "animals": words.ANIMALS,
    "numbers": (*words.NUMBER_WORDS, *map(str, range(1000)), *(f"{number:03d}" for number in range(1000))),
}
TOP, NEURONS = 20, 10


def corpus(split, seed):
    """All tasks; `held_out` has other names, animals and numbers in the roles that matter."""
    found = [one for task in planted.TASKS for one in planted.generate(task, split, 100, seed)]
    return [one.prompt + one.answer for one in found]


@pytest.fixture(scope="module")
def both():
    explainer = lxt.load("tiny")
    return [label(explainer, corpus(*which), top=TOP, length=128) for which in (("train", 1), ("held_out", 2))]


def precision(neuron: Neuron, concept: str) -> float:
    """The share of the 20 best contexts whose peak is a word of the concept; missing contexts are none."""
    wanted = set(CONCEPTS[concept])
    return sum(context.peak.strip() in wanted for context in neuron.contexts["relevance", "positive"]) / TOP


@pytest.mark.parametrize("concept", CONCEPTS)
def test_neurons_of_a_concept_are_found_and_keep_to_it(both, concept):
    here, there = both
    found = [neuron for _, neuron in here.find(CONCEPTS[concept], top=TOP)]
    rng = random.Random(0)
    drawn = [(rng.choice(there.layers), rng.randrange(there.count(0))) for _ in range(10 * TOP)]
    again = [precision(there[neuron.layer, neuron.number], concept) for neuron in found]
    by_chance = [precision(there[key], concept) for key in drawn]

    # of the contexts: what share of the 20 best of a found neuron is of the concept
    contexts, random_contexts = mean(again[:NEURONS]), mean(by_chance)
    # of the neurons: what share of the 20 found is of the concept, which is in most of its contexts
    neurons, random_neurons = (mean(share >= 0.5 for share in shares) for shares in (again, by_chance))
    print(f"{concept}: contexts {contexts:.3f}, by chance {random_contexts:.3f}")
    print(f"{concept}: neurons {neurons:.3f}, by chance {random_neurons:.3f}")
    assert all(precision(neuron, concept) >= 0.8 for neuron in found[:NEURONS])
    assert contexts >= 0.8
    assert neurons >= 0.8
    assert random_contexts <= 0.2
    assert random_neurons <= 0.2
