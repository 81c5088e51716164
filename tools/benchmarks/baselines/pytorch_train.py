"""The baselines pytorch, pytorch-compile and both in bf16: the same network in PyTorch, optimized.

Arguments: the file of prepared batches, fp32 or bf16, and optionally `compile` for torch.compile, or `all`.
With `all` the last layer computes all vectors, as published code does. Otherwise it computes those that the
heads read, after attention of all tokens.

It reads prepared batches, so it spends no time on them. It sorts a batch by length and encodes groups of rows
padded to their own longest row. Dropout draws 16 bits per element. The decoder scores masked words only, in
slices, together with their gradients. Adam is fused. Freed memory is kept for the next step.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, Iterator

# Before the first allocation: no mmap, no memory returned, one arena (M_MMAP_MAX and so on).
for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
    ctypes.CDLL(None).mallopt(option, value)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from protocol import Step, serve  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

with np.load(sys.argv[1]) as file:
    BATCHES = dict(file)
CONFIG = json.loads(str(BATCHES.pop("config")))
MODEL, TRAIN = CONFIG["model"], CONFIG["train"]
UNITS, FFN_UNITS, HEADS, DROPOUT = (MODEL[key] for key in ("units", "ffn_units", "num_heads", "dropout"))
POSITIONS, EPSILON = MODEL["max_positions"], MODEL["norm_epsilon"]
# Rows that are encoded together, at least; and the most groups of a batch.
GROUP_ROWS, GROUPS, SLICE = 64, 8, 512
# bf16: products in bf16; sums, weights and losses in float32.
LOW = {"fp32": None, "bf16": torch.bfloat16}[sys.argv[2]]
COMPILE, ALL = (sys.argv[3:] == [word] for word in ("compile", "all"))
activation = {"relu": F.relu, "gelu": F.gelu}[MODEL["activation"]]


def dropout(x: Any) -> Any:
    """Apply dropout. F.dropout would take a tenth of the step; torch.compile makes its own kernel of it."""
    if COMPILE:
        return F.dropout(x, DROPOUT)
    draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= int(DROPOUT * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - DROPOUT))


class Layer(nn.Module):
    """A post-LayerNorm encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.output = nn.Linear(UNITS, 3 * UNITS), nn.Linear(UNITS, UNITS)
        self.norm1, self.norm2 = nn.LayerNorm(UNITS, EPSILON), nn.LayerNorm(UNITS, EPSILON)
        self.expand, self.project = nn.Linear(UNITS, FFN_UNITS), nn.Linear(FFN_UNITS, UNITS)

    def forward(self, x: Any, mask: Any, read: Any = None) -> Any:
        """(B, T, C), (B, 1, 1, T) -> (B, T, C), or (N, C) if N positions are read."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, UNITS // HEADS).permute(2, 0, 3, 1, 4)
        # On a CPU scaled_dot_product_attention computes the same, but draws dropout more slowly.
        weights = dropout(torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask, -1))
        found = (weights @ v).transpose(1, 2).reshape(x.shape)
        if read is not None:
            x, found = x[read], found[read]
        x = self.norm1(x + dropout(self.output(found)))
        return self.norm2(x + dropout(self.project(activation(self.expand(x)))))


class Network(nn.Module):
    """A BERT with post-LayerNorm layers, such as that of Dive into Deep Learning."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens, self.segments = nn.Embedding(vocab_size, UNITS), nn.Embedding(2, UNITS)
        self.positions = nn.Parameter(torch.empty(1, POSITIONS, UNITS))
        self.embedding_norm = nn.LayerNorm(UNITS, EPSILON) if MODEL["embedding_norm"] else None
        self.layers = nn.ModuleList(Layer() for _ in range(MODEL["num_layers"]))
        self.transform, self.norm = nn.Linear(UNITS, UNITS), nn.LayerNorm(UNITS, EPSILON)
        self.decoder = nn.Linear(UNITS, vocab_size)
        self.pooler, self.next = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 2)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and MODEL["init"] == "normal":
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if MODEL["tied_decoder"]:
            self.decoder.weight = self.tokens.weight
        if MODEL["init"] == "normal":
            return
        # One matrix (3 C, C) would get smaller Xavier weights than three of (C, C).
        for name, parameter in self.named_parameters():
            if name.endswith("qkv.weight"):
                for part in parameter.data.chunk(3):
                    nn.init.xavier_uniform_(part)
        nn.init.uniform_(self.positions, *(sign * (6 / (UNITS * (POSITIONS + 1))) ** 0.5 for sign in (-1, 1)))

    def encode(self, tokens: Any, segments: Any, lengths: Any, read: Any) -> Any:
        """(B, T), (B, T), (B,), and the rows and columns of N positions -> (N, C)."""
        length = tokens.shape[1]
        mask = -1e9 * (torch.arange(length) >= lengths[:, None])[:, None, None]
        x = self.tokens(tokens) + self.segments(segments) + self.positions[:, :length]
        if self.embedding_norm:
            x = dropout(self.embedding_norm(x))
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, mask)
        return last(x, mask)[read] if ALL else last(x, mask, read)

    def forward(self, groups: list[Any], labels: Any, is_next: Any) -> tuple[Any, Any]:
        """Return the mean MLM and NSP losses of a grouped batch."""
        masked, first = [], []
        for tokens, segments, lengths, rows, positions in groups:
            firsts = torch.arange(len(tokens))
            read = torch.cat([firsts, rows]), torch.cat([torch.zeros_like(firsts), positions])
            encoded = self.encode(tokens, segments, lengths, read)
            first.append(encoded[: len(tokens)])
            masked.append(encoded[len(tokens) :])
        ready = self.norm(activation(self.transform(torch.cat(masked))))
        if LOW is None:
            mlm = SlicedLoss.apply(ready, self.decoder.weight, self.decoder.bias, labels) / len(labels)
        else:
            scores = self.decoder(ready).float()
            mlm = F.cross_entropy(scores, labels)
        nsp = F.cross_entropy(self.next(torch.tanh(self.pooler(torch.cat(first)))).float(), is_next)
        return mlm, nsp


class SlicedLoss(torch.autograd.Function):
    """The sum of the decoder's cross-entropies, computed slice by slice together with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, labels: Any) -> Any:
        """(M, C), (V, C), (V,), (M,) -> ()."""
        d_x, d_weight, d_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        room, ones = torch.empty(SLICE, len(weight)), torch.ones(SLICE)
        total = torch.zeros(())
        for start in range(0, len(labels), SLICE):
            some, right = x[start : start + SLICE], labels[start : start + SLICE]
            rows = torch.arange(len(right))
            scores = torch.log_softmax(torch.addmm(bias, some, weight.T, out=room[: len(right)]), 1)
            total -= scores[rows, right].sum()
            scores.exp_()[rows, right] -= 1
            torch.mm(scores, weight, out=d_x[start : start + SLICE])
            d_weight.addmm_(scores.T, some)
            d_bias.addmv_(scores.T, ones[: len(right)])
        ctx.save_for_backward(d_x, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Scale the gradients of the forward pass."""
        return (*(gradient * each for each in ctx.saved_tensors), None)


def grouped(batch: dict[str, Any]) -> tuple[list[Any], Any, Any]:
    """Return a batch as groups of rows of similar length, with labels and next sentences in that order."""
    order = np.argsort(batch["valid_length"], kind="stable")
    rows, positions = batch["masked_positions"]
    groups, labels = [], []
    for members in np.array_split(order, max(1, min(GROUPS, len(order) // GROUP_ROWS))):
        length = batch["valid_length"][members].max()
        place = np.full(len(order), -1)
        place[members] = np.arange(len(members))
        mine = place[rows] >= 0
        labels.append(batch["masked_ids"][mine])
        arrays = (
            batch["tokens"][members, :length],
            batch["token_types"][members, :length],
            batch["valid_length"][members],
            place[rows[mine]],
            positions[mine],
        )
        groups.append([torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays])
    masked, following = np.concatenate(labels), batch["next_sentence_labels"][order]
    return groups, torch.from_numpy(masked.astype(np.int64)), torch.from_numpy(following.astype(np.int64))


def prepare() -> tuple[Iterator[Step], dict[str, Any]]:
    """Return the steps and details to report."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    arrays = BATCHES
    net = Network(int(arrays.pop("vocab_size")))
    if COMPILE:
        net.encode = torch.compile(net.encode)  # type: ignore[method-assign]
    names = (
        "tokens",
        "token_types",
        "valid_length",
        "masked_positions",
        "masked_ids",
        "next_sentence_labels",
    )
    count = len(arrays) // len(names)
    batches = [{name: arrays[f"{name}-{number}"] for name in names} for number in range(count)]
    return steps(net, batches), {"software": f"torch {torch.__version__}, {' '.join(sys.argv[2:])}"}


def optimizer_of(net: Any) -> Any:
    """Return the configuration's optimizer, fused. Biases and LayerNorms have no weight decay."""
    values = {"lr": TRAIN["lr"], "betas": (TRAIN["beta1"], TRAIN["beta2"]), "eps": TRAIN["epsilon"]}
    if TRAIN["optimizer"] == "adam":
        return torch.optim.Adam(net.parameters(), **values, fused=True)
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": TRAIN["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **values, fused=True)


def steps(net: Any, batches: list[dict[str, Any]]) -> Iterator[Step]:
    """Take one step after another."""
    optimizer = optimizer_of(net)
    for batch in batches:
        with torch.autocast("cpu", dtype=LOW or torch.bfloat16, enabled=LOW is not None):
            mlm, nsp = net(*grouped(batch))
        optimizer.zero_grad(set_to_none=True)
        (mlm + nsp).backward()
        if TRAIN["clip_norm"]:
            nn.utils.clip_grad_norm_(net.parameters(), TRAIN["clip_norm"], foreach=True)
        optimizer.step()
        yield len(batch["next_sentence_labels"]), mlm.item(), nsp.item()


if __name__ == "__main__":
    serve(prepare)
