"""Attention: PyTorch's own modules and the bare function; the oracle writes the softmax out."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import (
    Case,
    attention,
    batch_by_batch,
    case,
    cross_entropy,
    cut,
    joined,
    merge_heads,
    padded_tokens,
    split_heads,
    stir,
    token_cross_entropy,
)


def self_attention(module, x, allowed=None):
    """nn.MultiheadAttention of x with itself, from its weights; `allowed` (N, 1 or T, T)."""
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, 2)
    q, k, v = (split_heads(part, module.num_heads) for part in (q, k, v))
    mixed = attention(q, k, v, None if allowed is None else allowed[:, None])
    return module.out_proj(merge_heads(mixed))


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


# ------------------------------------------------------------------------ nn.TransformerEncoder


class Encoder(nn.Module):
    """A tagger; token 0 is padding."""

    def __init__(self, tokens, width, layers, **options):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(torch.randn(5, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, dim_feedforward=width - 1, activation="gelu", batch_first=True, **options
        )
        # Without nested tensors, which warn that they are a prototype.
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids):
        x = self.embedding(ids) + self.places[: ids.shape[1]]
        return self.head(self.body(x, src_key_padding_mask=ids == 0)).transpose(1, 2)


def encoder_by_hand(m, ids):
    x = m.embedding(ids) + m.places[: ids.shape[1]]
    for layer in m.body.layers:
        x = layer.norm1(x + self_attention(layer.self_attn, x, (ids != 0)[:, None]))
        x = layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))
    return m.head(x)


@case("nn.TransformerEncoder with a padding mask")
def transformer_encoder(dtype):
    torch.manual_seed(86)
    return Case(
        model=stir(Encoder(5, 4, 2)),
        batches=padded_tokens(5, [(4, 2, 1), (3, 3), (1, 5)]),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=token_cross_entropy(encoder_by_hand),
    )


@case("nn.TransformerEncoder with dropout")
def transformer_encoder_train(dtype):
    torch.manual_seed(81)

    def loss(m, batch):
        with sdpa_kernel([SDPBackend.MATH]):
            return cross_entropy(m(batch[0]).transpose(1, 2), batch[1])

    return Case(
        model=stir(Encoder(5, 4, 1, dropout=0.3, norm_first=True)),
        batches=padded_tokens(5, [(4, 2, 1), (3, 3), (1, 5)]),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=batch_by_batch(loss, count=lambda batch: int((batch[1] != -100).sum())),
        mode="train",
    )


# ----------------------------------------------------------------------- nn.MultiheadAttention


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        allowed = causal(x.shape[1])
        mixed, _ = self.attention(x, x, x, attn_mask=~allowed, need_weights=False)
        return self.head((x + mixed).mean(1))


@case("nn.MultiheadAttention with a mask")
def multihead_attention(dtype):
    torch.manual_seed(82)
    x, y = torch.randn(11, 4, 3), torch.randint(3, (11,))

    def full_loss(m, batches):
        x = torch.tanh(m.first(joined(batches, 0)))
        x = x + self_attention(m.attention, x, causal(4)[None])
        return cross_entropy(m.head(x.sum(1) / 4), joined(batches, 1))

    return Case(
        model=stir(SelfAttention()),
        batches=cut((x, y), (4, 5, 2)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
    )


class CrossAttention(nn.Module):
    """Learnt queries over the input, and the attention weights themselves in the output."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 4))
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, bias=False, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        mixed, weights = self.attention(queries, x, x)
        return self.head(mixed)[..., 0] + 3 * weights[..., 0]


@case("nn.MultiheadAttention across, with its weights")
def cross_attention(dtype):
    torch.manual_seed(83)
    x, y = torch.randn(11, 4, 3), torch.randint(3, (11,))

    def full_loss(m, batches):
        x, own = joined(batches, 0), m.attention
        q = split_heads((m.queries @ own.q_proj_weight.T).expand(len(x), -1, -1), 2)
        k, v = (split_heads(x @ w.T, 2) for w in (own.k_proj_weight, own.v_proj_weight))
        mixed = merge_heads(attention(q, k, v)) @ own.out_proj.weight.T
        # Attention over the unit vectors gives the weights.
        weights = attention(q, k, torch.eye(4, dtype=x.dtype).expand(len(x), 2, -1, -1))
        scores = m.head(mixed)[..., 0] + 3 * weights.sum(1)[..., 0] / 2
        return cross_entropy(scores, joined(batches, 1))

    return Case(
        model=stir(CrossAttention()),
        batches=cut((x, y), (3, 7, 1)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
    )


# -------------------------------------------------------------- F.scaled_dot_product_attention


class Decoder(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(torch.randn(5, width))
        self.norm = nn.LayerNorm(width)
        self.split = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, tokens))

    def forward(self, ids):
        x = self.embedding(ids) + self.places[: ids.shape[1]]
        q, k, v = (split_heads(part, 2) for part in self.split(self.norm(x)).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.merge(merge_heads(mixed))).transpose(1, 2)


def decoder_by_hand(m, ids):
    x = m.embedding(ids) + m.places[: ids.shape[1]]
    centred = x - x.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + m.norm.eps).sqrt()
    q, k, v = m.split(normed * m.norm.weight + m.norm.bias).chunk(3, 2)
    q, k, v = (split_heads(part, 2) for part in (q, k, v))
    return m.head(x + m.merge(merge_heads(attention(q, k, v, causal(ids.shape[1])))))


@case("Causal decoder on scaled_dot_product_attention")
def causal_decoder(dtype):
    torch.manual_seed(84)
    return Case(
        model=stir(Decoder(6, 4)),
        batches=padded_tokens(6, [(5, 3, 1), (2, 4), (3,)]),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=token_cross_entropy(decoder_by_hand),
    )
