"""The ops: each a public function and its plain-PyTorch twin, `*_reference`."""

from attncap.ops.soft_attention import soft_attention, soft_attention_reference

__all__ = ["soft_attention", "soft_attention_reference"]
