"""The ops: each a public function and its plain-PyTorch twin, `*_reference`."""

from types import SimpleNamespace

import torch.nn.functional as F

from attncap.ops.attention_lstm import attention_lstm, attention_lstm_reference
from attncap.ops.beam_search_step import beam_search_step, beam_search_step_reference
from attncap.ops.linear import linear
from attncap.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from attncap.ops.lstm_step import lstm_step, lstm_step_reference
from attncap.ops.soft_attention import soft_attention, soft_attention_reference

__all__ = [
    "attention_lstm",
    "attention_lstm_reference",
    "beam_search_step",
    "beam_search_step_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "lstm_step",
    "lstm_step_reference",
    "soft_attention",
    "soft_attention_reference",
]

# A model's implementation: the project's own kernels, or plain PyTorch.
IMPLEMENTATIONS = {
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
