"""Coverage: every architecture of transformers, built tiny, patched, and proven or not.

1. `subjects` lists the types in transformers' mappings; `shrink` makes a tiny configuration of each, `sizes` holds
   what single types need beyond that, `build` makes the model in float64 with random weights and zero biases.
2. `arguments` makes inputs, `sources` finds every activation that relevance can end at.
3. `proof` compares logits, both conservation oracles, the auditor and checkpointing, and gives a `Record`.
4. `runner` does this for all of them, each in a process of its own; `report` writes docs/architectures.md.

`python -m lxt.coverage --help` runs it.
"""
