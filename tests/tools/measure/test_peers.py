"""The packages of others work on a pipeline of theirs, change it while they are on, and leave it as it was."""
import pytest
import torch
from families import FAMILIES

from accel_tools.measure.peers import PEERS

UNETS = ("tomesd", "DeepCache", "tgate")                            # the others are for transformers
STRONGER = {"threshold": 10.0, "gate_step": 3}                     # random weights change more from step to step


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_package_works_and_is_taken_off(name):
    peer, family = PEERS[name], FAMILIES["unet" if name in UNETS else "cogvideox"]
    pytest.importorskip(peer.distribution.replace("-", "_"))
    pipe = family.pipe()
    plain = family.run(pipe, steps=10)
    config = {key: STRONGER.get(key, value) for key, value in peer.config.items()}
    with peer.on(pipe, **config):
        assert not torch.equal(family.run(pipe, steps=10), plain)
    assert torch.equal(family.run(pipe, steps=10), plain)
