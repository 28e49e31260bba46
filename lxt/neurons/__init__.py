"""What the neurons of a language model stand for: the places of a corpus where each matters most, and names for them.

1. `corpus`, `windows`: documents one at a time, cut into windows, dealt into numbered blocks.
2. `measuring`, `scoring`: one forward and one backward for each batch of windows; of every neuron's relevance and
   activation the extremes, their places and the moments are kept, and the rest is forgotten there and then.
3. `ranking`, `tally`: the k best windows of every neuron; merging is deterministic.
4. `storing`, `running`: each block is on disk before the next; whatever ends a run, the next one goes on.
5. `naming`, `detection`: names from distinctive tokens, and how well a name predicts where the neuron matters.
6. `on_ray`: the same blocks on several processes or machines.
7. `results`, `page`: reading the results, and a folder of pages to browse.

    >>> import lxt
    >>> found = lxt.neurons.label(lxt.load("tiny"), "corpus.txt", layers=[2], out="out/neurons")  # doctest: +SKIP
    >>> print(found[2, 17])  # doctest: +SKIP
"""

from lxt.neurons.corpus import BadRow, Corpus
from lxt.neurons.results import Context, Neuron, Neurons, load
from lxt.neurons.running import label

__all__ = ["BadRow", "Context", "Corpus", "Neuron", "Neurons", "label", "load"]
