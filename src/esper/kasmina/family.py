"""What kind of network a host is, told roughly from its modules: what worked in one is of use in its like."""

from __future__ import annotations

from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def host_family(model: nn.Module) -> str:
    """``recurrent``, ``transformer``, ``conv`` or ``mlp``, by the first of these whose modules occur.

    A network over an embedding that has no recurrent layer counts as a transformer: attention itself is often a
    function that leaves no module behind.
    """
    modules = list(model.modules())

    def has(*kinds: type[nn.Module]) -> bool:
        return any(isinstance(module, kinds) for module in modules)

    if has(nn.RNNBase):
        return "recurrent"
    if has(nn.MultiheadAttention, nn.Embedding):
        return "transformer"
    return "conv" if has(*_CONVOLUTIONS) else "mlp"
