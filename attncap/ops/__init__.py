"""The ops. Each is a public function with a reference implementation in plain PyTorch, `*_reference`."""

from types import SimpleNamespace

import torch.nn.functional as F

from attncap.ops.attention_lstm import attention_lstm, attention_lstm_reference
from attncap.ops.beam_search_step import beam_search_step, beam_search_step_reference
from attncap.ops.linear import linear
from attncap.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from attncap.ops.lstm_step import lstm_step, lstm_step_reference
from attncap.ops.soft_attention import soft_attention, soft_attention_reference

__all__ = [
    "BACKENDS",
    "attention_lstm",
    "attention_lstm_reference",
    "beam_search_step",
    "beam_search_step_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "lstm_step",
    "lstm_step_reference",
    "soft_attention",
    "soft_attention_reference",
]

# The ops of a model by backend: the project's own kernels, or plain PyTorch.
BACKENDS = {
    "native": SimpleNamespace(
        attention_lstm=attention_lstm,
        beam_search_step=beam_search_step,
        linear=linear,
        linear_cross_entropy=linear_cross_entropy,
        lstm_step=lstm_step,
        soft_attention=soft_attention,
    ),
    "torch": SimpleNamespace(
        attention_lstm=attention_lstm_reference,
        beam_search_step=beam_search_step_reference,
        linear=F.linear,
        linear_cross_entropy=linear_cross_entropy_reference,
        lstm_step=lstm_step_reference,
        soft_attention=soft_attention_reference,
    ),
}
