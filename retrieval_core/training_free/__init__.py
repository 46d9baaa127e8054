"""Retrieval with nothing but a base checkpoint (DESIGN, "Training-free mode").

The base U-Net reads each reference once at a few noise levels; the keys and values of its own
self-attention layers are the bank, and while sampling those layers attend to their own tokens and
to the bank of the nearest level. The idea is known as reference-only control and mutual or shared
self-attention (MasaCtrl, arXiv 2304.08465; StyleAligned, arXiv 2312.02133).
"""

from .attention_layers import LAYER_CHOICES, choose_layers, list_self_attention_layers, name_layers
from .joint_retrieval import JointRetrieval
from .recording import encode_by_base, make_fixed_noise, record
from .training_free_network import TrainingFree

__all__ = [
    "LAYER_CHOICES",
    "JointRetrieval",
    "TrainingFree",
    "choose_layers",
    "encode_by_base",
    "list_self_attention_layers",
    "make_fixed_noise",
    "name_layers",
    "record",
]
