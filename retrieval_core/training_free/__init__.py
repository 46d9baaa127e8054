"""Retrieval with nothing but a base checkpoint (DESIGN, "Training-free mode").

The base U-Net encodes each reference once per noise level: keys and values of its self-attention
layers are the bank. While sampling, those layers attend to their own tokens and to the bank of the
nearest level, as in reference-only control and mutual or shared self-attention (MasaCtrl, arXiv
2304.08465; StyleAligned, arXiv 2312.02133), and each step's prediction moves towards the latents of
the references at corresponding places (`latent_pull`).
"""

from .attention_layers import LAYER_CHOICES, choose_layers, list_self_attention_layers, name_layers
from .joint_retrieval import JointRetrieval
from .recording import make_fixed_noise, record
from .training_free_network import TrainingFree

__all__ = [
    "LAYER_CHOICES",
    "JointRetrieval",
    "TrainingFree",
    "choose_layers",
    "list_self_attention_layers",
    "make_fixed_noise",
    "name_layers",
    "record",
]
