"""The pointwise part of an LSTM step in a search: native op and reference in plain PyTorch.

Letters: R rows of the previous step, N rows that continue them, H hidden size, E embedding size, V tokens.
"""

import torch
from torch import Tensor

from attncap.ops import library


def lstm_step(
    recurrent: Tensor, context_part: Tensor, word_table: Tensor, c: Tensor, parents: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Continues row r = parents[n] with token w = tokens[n]. Formula and order of gates as in `torch.nn.LSTMCell`:

        i, f, g, o = recurrent[r] + context_part[r, :4H] + word_table[w, :4H]
        c'[n]      = sigmoid(f) * c[r] + sigmoid(i) * tanh(g)
        h'[n]      = sigmoid(o) * tanh(c'[n])
        output[n]  = context_part[r, 4H:] + word_table[w, 4H:]

    Everything that depends on r alone can thus be computed before parents and tokens are known, and no rows need to be
    gathered into a copy.

    Args:
        recurrent: [R, 4H], hidden states times the recurrent weights.
        context_part: [R, 4H + E], contexts times the context weights of the LSTM, then of the output layer. E may be 0.
        word_table: [V, 4H + E], the embeddings of all tokens times the corresponding weights, biases included.
        c: [R, H].
        parents, tokens: int64 [N], in [0, R) and [0, V), which is not checked.

    The other tensors have one dtype: float32, bfloat16, float16 (the last two are computed in float32) or float64. Rows
    of recurrent and context_part may have any stride; other tensors that are not contiguous are copied. Not
    differentiable.

    Returns:
        h' [N, H], c' [N, H] and output [N, E].

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        attncap.errors.UserError: there is no kernel for the device. The message says how to get it.
    """
    _check(recurrent, context_part, word_table, c, parents, tokens)
    library.require(c.device)
    return torch.ops.attncap.lstm_step.default(recurrent, context_part, word_table, c, parents, tokens)


def lstm_step_reference(
    recurrent: Tensor, context_part: Tensor, word_table: Tensor, c: Tensor, parents: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_step` in plain PyTorch: same arguments, results and errors, on any device."""
    _check(recurrent, context_part, word_table, c, parents, tokens)
    H = c.shape[1]
    parts = context_part[parents] + word_table[tokens]
    i, f, g, o = (recurrent[parents] + parts[:, : 4 * H]).chunk(4, dim=1)
    c = torch.sigmoid(f) * c[parents] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c, parts[:, 4 * H :].contiguous()


def _check(
    recurrent: Tensor, context_part: Tensor, word_table: Tensor, c: Tensor, parents: Tensor, tokens: Tensor
) -> None:
    if c.dim() != 2 or word_table.dim() != 2 or parents.dim() != 1 or c.shape[1] == 0:
        raise ValueError(
            "lstm_step takes word_table [V, 4H + E], c [R, H] with H of at least 1 and parents [N], not "
            f"{list(word_table.shape)}, {list(c.shape)} and {list(parents.shape)}"
        )
    (R, H), (V, width), N = c.shape, word_table.shape, len(parents)
    if width < 4 * H:
        raise ValueError(f"word_table has {width} columns, fewer than 4H = {4 * H}")
    if c.dtype not in library.DTYPES:
        raise ValueError(f"c has dtype {c.dtype}; lstm_step takes float32, bfloat16, float16 and float64")
    library.check_tensors(
        {
            "recurrent": (recurrent, (R, 4 * H), c.dtype),
            "context_part": (context_part, (R, width), c.dtype),
            "word_table": (word_table, (V, width), c.dtype),
            "parents": (parents, (N,), torch.int64),
            "tokens": (tokens, (N,), torch.int64),
        },
        c.device,
        lambda: f"c {list(c.shape)}, word_table {list(word_table.shape)} and parents {list(parents.shape)}",
    )


def _fake(recurrent, context_part, word_table, c, parents, tokens):
    N, H = parents.shape[0], c.shape[1]
    return c.new_empty(N, H), c.new_empty(N, H), c.new_empty(N, word_table.shape[1] - 4 * H)


if library.is_loaded("cpu"):
    torch.library.register_fake("attncap::lstm_step", _fake)
