"""Tokens of several banks, of given features and with any tokens left out."""

import torch

from retrieval_core.bank.encoding import batch_features
from retrieval_core.bank.tokens import Tokens


def batch_tokens(features, keep=None):
    """Tokens of features, site -> [G, R, P, N, D], less those where `keep` [G, R, N] is False."""
    sites = {}
    for site, given in features.items():
        used, size = torch.ones(given.shape[:2]).bool(), (1, given.shape[3])
        masks = None if keep is None else keep[site].flatten(0, 1)[:, None]
        made = batch_features({site: (given.flatten(0, 1), size)}, (0, 0), used, masks)
        sites |= made.sites
    return Tokens(sites, made.references)
