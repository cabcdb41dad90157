"""DiscreteVAE and DALLE in plain torch, the architecture of dalle-pytorch 1.6.6 (lucidrains/DALLE-pytorch).

What is there: full causal attention with rotary positions (text on one axis, pictures on two), shifted
tokens, layer scale, GEGLU, the reversible form (its values, not its saving of memory), a padding token of its
own for each place, the loss that weighs pictures more. What is not: sparse and axial attention, caches, CLIP.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Codebook(nn.Embedding):
    """Vectors by number, or mixed by weights [..., number]. A module of its own, so that ZeRO gathers it."""

    def forward(self, chosen: Tensor) -> Tensor:
        return chosen @ self.weight if chosen.is_floating_point() else super().forward(chosen)


class DiscreteVAE(nn.Module):
    """Pictures [batch, channels, height, width] as a grid of tokens, each 2^num_layers pixels wide."""

    def __init__(
        self, image_size: int = 256, num_tokens: int = 512, codebook_dim: int = 512, num_layers: int = 3,
        hidden_dim: int = 64, channels: int = 3, temperature: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_size, self.num_tokens, self.num_layers = image_size, num_tokens, num_layers
        self.temperature = temperature
        self.codebook = Codebook(num_tokens, codebook_dim)
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for k in range(num_layers):
            here = channels if k == 0 else hidden_dim
            encoder += [nn.Conv2d(here, hidden_dim, 4, stride=2, padding=1), nn.ReLU()]
            here = codebook_dim if k == 0 else hidden_dim
            decoder += [nn.ConvTranspose2d(here, hidden_dim, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(hidden_dim, num_tokens, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(hidden_dim, channels, 1))

    def forward(self, images: Tensor, temperature: float | None = None) -> Tensor:
        """The loss of what comes back, each token a soft choice (Gumbel softmax)."""
        wanted = images * 2 - 1
        soft = F.gumbel_softmax(self.encoder(wanted), tau=temperature or self.temperature, dim=1)
        back = self.decoder(self.codebook(soft.movedim(1, -1)).movedim(-1, 1))
        return F.mse_loss(back, wanted)

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The tokens of pictures, row by row: [batch, fields]."""
        return self.encoder(images * 2 - 1).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """The pictures of tokens [batch, fields], in about 0 to 1."""
        edge = math.isqrt(tokens.shape[1])
        return self.decoder(self.codebook(tokens).unflatten(1, (edge, edge)).movedim(-1, 1)) / 2 + 0.5


# ---- the transformer ----


def rotary_positions(text_len: int, edge: int, dim_head: int) -> Tensor:
    """Angles [text_len + edge^2, at most dim_head]: a third each for the place in the text, row and column.

    A picture stands at text place 8192, a text at row and column -10."""
    pairs = dim_head // 3 // 2
    language = 10000 ** -(torch.arange(pairs) * 2 / (dim_head // 3))
    pixel = torch.linspace(1, 5, pairs) * math.pi
    place = torch.cat([torch.arange(text_len), torch.full((edge * edge,), 8192)])
    axis = torch.linspace(-1, 1, edge)
    away = torch.full((text_len,), -10.0)
    down, across = torch.cat([away, axis.repeat_interleave(edge)]), torch.cat([away, axis.repeat(edge)])
    angles = [place[:, None] * language, down[:, None] * pixel, across[:, None] * pixel]
    return torch.cat(angles, 1).repeat_interleave(2, 1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., place, dim_head] with its first pairs turned by their angles."""
    turned, rest = x.split([angles.shape[1], x.shape[-1] - angles.shape[1]], -1)
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], -1).flatten(-2)
    return torch.cat([turned * angles.cos() + across * angles.sin(), rest], -1)


class Attention(nn.Module):
    """Each place looks at itself and those before it."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            rotated(t.unflatten(-1, (self.heads, -1)).transpose(1, 2), angles[: x.shape[1]])
            for t in self.to_qkv(x).chunk(3, -1)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(found.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Four times as wide inside, gated (GEGLU)."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.to_inner, self.drop = nn.Linear(dim, 8 * dim), nn.Dropout(dropout)
        self.to_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        inner, gate = self.to_inner(x).chunk(2, -1)
        return self.to_out(self.drop(inner * F.gelu(gate)))


class Layer(nn.Module):
    """Norm, shifted tokens, attention or feed-forward, layer scale."""

    def __init__(self, dim: int, inside: nn.Module, text_len: int, edge: int) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(dim), inside
        self.scale = nn.Parameter(torch.full((1, 1, dim), 0.1))
        self.text_len, self.edge = text_len, edge

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.inside(self._shifted(self.norm(x)), angles) * self.scale

    def _shifted(self, x: Tensor) -> Tensor:
        """A word gets half the channels of the one before, a field a quarter each of those above and left."""
        text, image = x[:, : self.text_len], x[:, self.text_len :]
        before, own = text.chunk(2, -1)
        text = torch.cat([F.pad(before, (0, 0, 1, -1)), own], -1)
        if not image.shape[1]:
            return text
        fields = image.shape[1]
        grid = F.pad(image, (0, 0, 0, -fields % self.edge)).unflatten(1, (-1, self.edge))
        top, left, *own_parts = grid.chunk(4, -1)
        top, left = F.pad(top, (0, 0, 0, 0, 1, -1)), F.pad(left, (0, 0, 1, -1))
        return torch.cat([text, torch.cat([top, left, *own_parts], -1).flatten(1, 2)[:, :fields]], 1)


class Transformer(nn.Module):
    """`depth` pairs of attention and feed-forward. Reversible: two streams that are added to in turn."""

    def __init__(
        self, dim: int, depth: int, heads: int, dim_head: int, text_len: int, edge: int, reversible: bool,
        attn_dropout: float, ff_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reversible = reversible
        self.layers = nn.ModuleList()
        for _ in range(depth):
            inside = (Attention(dim, heads, dim_head, attn_dropout), FeedForward(dim, ff_dropout))
            self.layers.append(nn.ModuleList([Layer(dim, each, text_len, edge) for each in inside]))
        self.register_buffer("angles", rotary_positions(text_len, edge, dim_head), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        one = other = x
        for attention, feed_forward in self.layers:
            one = one + attention(other, self.angles)
            if self.reversible:
                other = other + feed_forward(one, self.angles)
            else:
                one = other = one + feed_forward(one, self.angles)
        return (one + other) / 2


class DALLE(nn.Module):
    """Text tokens, then picture tokens, each predicted from those before. `vae` is frozen."""

    def __init__(
        self, *, dim: int, vae: DiscreteVAE, num_text_tokens: int, text_seq_len: int, depth: int,
        heads: int = 8, dim_head: int = 64, reversible: bool = False, attn_dropout: float = 0.0,
        ff_dropout: float = 0.0, loss_img_weight: float = 7,
    ) -> None:  # fmt: skip
        super().__init__()
        edge = vae.image_size // 2**vae.num_layers
        self.text_seq_len, self.image_seq_len = text_seq_len, edge * edge
        self.num_text_tokens = num_text_tokens + text_seq_len  # a padding token for each place
        self.loss_img_weight = loss_img_weight
        self.vae = vae.requires_grad_(False)
        self.text_emb = nn.Embedding(self.num_text_tokens, dim)
        self.image_emb = nn.Embedding(vae.num_tokens, dim)
        self.transformer = Transformer(
            dim, depth, heads, dim_head, text_seq_len + 1, edge, reversible, attn_dropout, ff_dropout
        )
        total = self.num_text_tokens + vae.num_tokens
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, total))
        place = torch.arange(text_seq_len + self.image_seq_len)[:, None]
        forbidden = (place >= text_seq_len) == (torch.arange(total) < self.num_text_tokens)
        self.register_buffer("forbidden", forbidden, persistent=False)

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        """The loss of captions [batch, text_seq_len] with their pictures."""
        text, image = self._padded(text), self.vae.get_codebook_indices(images)
        logits = self._logits(text, image[:, :-1]).transpose(1, 2)
        n = self.text_seq_len
        text_loss = F.cross_entropy(logits[:, :, :n], text)
        image_loss = F.cross_entropy(logits[:, :, n:], image + self.num_text_tokens)
        return (text_loss + self.loss_img_weight * image_loss) / (1 + self.loss_img_weight)

    @torch.no_grad()
    def generate_images(
        self, text: Tensor, *, filter_thres: float = 0.5, temperature: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Pictures for captions, token by token among the best (1 - filter_thres); in about 0 to 1."""
        rng = torch.Generator().manual_seed(seed)
        text = self._padded(text)
        image = torch.empty((len(text), 0), dtype=torch.long)
        for _ in range(self.image_seq_len):
            logits = self._logits(text, image)[:, -1]
            best, numbers = logits.topk(max(1, int((1 - filter_thres) * logits.shape[1])))
            chosen = torch.multinomial((best / temperature).softmax(-1), 1, generator=rng)
            image = torch.cat([image, numbers.gather(1, chosen) - self.num_text_tokens], 1)
        return self.vae.decode(image)

    def _padded(self, text: Tensor) -> Tensor:
        own = torch.arange(self.text_seq_len) + self.num_text_tokens - self.text_seq_len
        return torch.where(text == 0, own, text)

    def _logits(self, text: Tensor, image: Tensor) -> Tensor:
        """Scores of what follows each place from the start token on: text predicts text, but the last."""
        x = torch.cat([self.text_emb(F.pad(text, (1, 0))), self.image_emb(image)], 1)
        logits = self.to_logits(self.transformer(x))
        return logits.masked_fill(self.forbidden[: x.shape[1]], -torch.finfo(logits.dtype).max)
