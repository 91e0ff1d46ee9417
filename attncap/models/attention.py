"""Soft attention over the feature grid.

Xu et al., "Show, Attend and Tell", 2015, section 4.2.
"""

import torch
from torch import Tensor, nn

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class SoftAttention(nn.Module):
    """Additive attention with a gate for each channel of the context.

        scores_p = score_weight . activation(key(features_p) + query(h))     equation 4
        weights  = softmax of the scores over the cells p                    equation 5
        context  = sigmoid(gate(h)) * sum_p weights_p features_p             equation 13 and section 4.2.1

    Args:
        feature_size: D.
        hidden_size: H.
        attention_size: A.
        activation: "tanh" as in the paper, or "relu".
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int, activation: str):
        super().__init__()
        self.activation = activation
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size)
        self.score_weight = nn.Parameter(torch.empty(attention_size).uniform_(-1, 1) / attention_size**0.5)
        self.gate = nn.Linear(hidden_size, feature_size)

    def forward(self, features: Tensor, keys: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """features [B,P,D], keys [B,P,A] = `key(features)`, h [N,H] with the N / B rows of an image next to each other
        -> context [N,D] and attention weights [N,P]."""
        query = self.query(h).unflatten(0, (len(features), -1)).unsqueeze(2)  # [B,K,1,A]
        scores = ACTIVATIONS[self.activation](keys.unsqueeze(1) + query) @ self.score_weight  # [B,K,P]
        weights = scores.softmax(dim=2, dtype=scores.dtype)  # on CUDA, autocast would otherwise make it float32
        context = (weights @ features).flatten(0, 1)
        return torch.sigmoid(self.gate(h)) * context, weights.flatten(0, 1)
