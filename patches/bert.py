"""BERT and RoBERTa encoders: LayerNorm after each block, GELU MLP."""

from lxt.patches._layers import post_norm_output
from lxt.patchmap import PatchMap

__all__ = ["BERT", "ROBERTA"]

BERT = PatchMap(
    architectures=("bert",),
    forwards={"BertSelfOutput": post_norm_output, "BertOutput": post_norm_output},
    layers=("BertLayer",),
    head="attention.output.dense",
    neuron="output.dense",
)
ROBERTA = PatchMap(
    architectures=("roberta", "xlm-roberta", "camembert"),
    forwards={
        f"{prefix}{part}": post_norm_output
        for prefix in ("Roberta", "XLMRoberta", "Camembert")
        for part in ("SelfOutput", "Output")
    },
    layers=("RobertaLayer", "XLMRobertaLayer", "CamembertLayer"),
    head="attention.output.dense",
    neuron="output.dense",
)
