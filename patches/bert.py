"""BERT and RoBERTa encoders: LayerNorm after each block, GELU MLP."""

from lxt.patchmap import PatchMap

__all__ = ["BERT", "ROBERTA"]

BERT = PatchMap(
    architectures=("bert",),
    layers=("BertLayer",),
    head="attention.output.dense",
    neuron="output.dense",
)
ROBERTA = PatchMap(
    architectures=("roberta", "xlm-roberta", "camembert"),
    layers=("RobertaLayer", "XLMRobertaLayer", "CamembertLayer"),
    head="attention.output.dense",
    neuron="output.dense",
)
