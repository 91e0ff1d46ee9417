"""The ops: each a public function and its plain-PyTorch twin, `*_reference`."""

from types import SimpleNamespace

from attncap.ops.beam_search_step import beam_search_step, beam_search_step_reference
from attncap.ops.lstm_step import lstm_step, lstm_step_reference
from attncap.ops.soft_attention import soft_attention, soft_attention_reference

__all__ = [
    "beam_search_step",
    "beam_search_step_reference",
    "lstm_step",
    "lstm_step_reference",
    "soft_attention",
    "soft_attention_reference",
]

# A model's implementation: the project's own kernels, or plain PyTorch.
IMPLEMENTATIONS = {
    "native": SimpleNamespace(soft_attention=soft_attention, lstm_step=lstm_step, beam_search_step=beam_search_step),
    "torch": SimpleNamespace(
        soft_attention=soft_attention_reference,
        lstm_step=lstm_step_reference,
        beam_search_step=beam_search_step_reference,
    ),
}
