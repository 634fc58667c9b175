"""Places that can grow."""

from __future__ import annotations

import enum

import msgspec


class SiteKind(enum.StrEnum):
    """Where a seed can sit. A *span* reaches from one module's input to a later module's output."""

    LINEAR_SPAN = "linear_span"
    """Linear, activation, Linear: a branch with the same activation is exactly *more hidden units*."""
    LINEAR_GATED_SPAN = "linear_gated_span"
    """``down(act(gate(x)) * up(x))`` (SwiGLU, GeGLU): a gated branch is exactly *more hidden units*."""
    CONV_SPAN = "conv_span"
    """Convolution, batch norm (optional), activation, convolution, in 1, 2 or 3 dimensions: more inner channels."""
    LINEAR_LAYER = "linear_layer"
    CONV_LAYER = "conv_layer"
    NORM_LAYER = "norm_layer"
    """LayerNorm or RMSNorm over the last axis."""
    CHANNEL_NORM_LAYER = "channel_norm_layer"
    """BatchNorm or GroupNorm: features on axis 1."""
    EMBEDDING_LAYER = "embedding_layer"
    """Its input are token ids, not features; ``in_features`` counts the tokens."""
    ATTENTION_LAYER = "attention_layer"
    """nn.MultiheadAttention: the first input is read, the first output is added to."""
    RECURRENT_LAYER = "recurrent_layer"
    """nn.LSTM, nn.GRU or nn.RNN: the output sequence is added to, the last state is not."""

    @property
    def is_span(self) -> bool:
        return self in (SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN, SiteKind.CONV_SPAN)

    @property
    def is_conv(self) -> bool:
        return self in (SiteKind.CONV_SPAN, SiteKind.CONV_LAYER)

    @property
    def channels_first(self) -> bool:
        """Whether features lie on axis 1 and one sample is one row of a capture, whatever its positions."""
        return self.is_conv or self is SiteKind.CHANNEL_NORM_LAYER


class SiteInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A place that can grow.

    ``hidden_features`` is the width inside a span (0 for a layer site); ``weights`` counts the host parameters the
    site covers.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    hidden_features: int
    num_chunks: int
    weights: int


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A module that could have been a site, and why it is not one."""

    name: str
    reason: str
