"""The maker of references that a trained network encodes, as the host describes it."""

from retrieval_core.bank.bank_file import Maker
from retrieval_core.network.fingerprint import fingerprint_weights


def describe_maker(network):
    fingerprint = fingerprint_weights(network.state_dict())
    return Maker(network.card.base, fingerprint, network.config.site_channels())
