"""Stable Diffusion's U-Net written out in float64 from a state dict, without the pack's modules.

What a layer is, is read off the names of its keys, as the original checkpoints have them.
"""

import math

import torch


def plain_embedding(timesteps, dim):
    """[B, dim]: cosines, then sines, of t / 10000^(i / half)."""
    rows = []
    for t in timesteps.tolist():
        angles = [t / 10000 ** (i / (dim // 2)) for i in range(dim // 2)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    return torch.tensor(rows, dtype=torch.float64)


def silu(x):
    return x / (1 + torch.exp(-x))


def group_norm(x, weight, bias, eps):
    groups = x.reshape(x.shape[0], 32, -1)
    centred = groups - groups.mean(2, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(2, keepdim=True) + eps)
    return normed.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight + bias


class PlainUNet:
    """weights: a U-Net's state dict. heads: channels -> number of heads."""

    def __init__(self, weights, heads):
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.heads = heads

    def has(self, name):
        return any(key.startswith(name + ".") for key in self.weights)

    def linear(self, x, name):
        out = torch.einsum("...i,oi->...o", x, self.weights[name + ".weight"])
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def conv(self, x, name, stride=1):
        """A sum over the kernel's places, of shifted and strided pictures."""
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        edge = weight.shape[-1]
        margin = edge // 2
        rows, height, width = x.shape[0], x.shape[2], x.shape[3]
        padded = x.new_zeros(rows, x.shape[1], height + 2 * margin, width + 2 * margin)
        padded[:, :, margin : margin + height, margin : margin + width] = x
        total = 0
        for dy in range(edge):
            for dx in range(edge):
                seen = padded[:, :, dy : dy + height : stride, dx : dx + width : stride]
                total = total + torch.einsum("bihw,oi->bohw", seen, weight[:, :, dy, dx])
        return total + bias[:, None, None]

    def norm(self, x, name, eps=1e-5):
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return group_norm(x, weight, bias, eps)

    def residual(self, x, emb, name):
        h = self.conv(silu(self.norm(x, name + ".in_layers.0")), name + ".in_layers.2")
        h = h + self.linear(silu(emb), name + ".emb_layers.1")[:, :, None, None]
        h = self.conv(silu(self.norm(h, name + ".out_layers.0")), name + ".out_layers.3")
        skip = name + ".skip_connection"
        return h + (self.conv(x, skip) if self.has(skip) else x)

    def attention(self, x, context, name):
        q = self.linear(x, name + ".to_q")
        k, v = self.linear(context, name + ".to_k"), self.linear(context, name + ".to_v")
        heads = self.heads(q.shape[-1])
        dim = q.shape[-1] // heads
        outputs = []
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            logits = torch.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / math.sqrt(dim)
            shares = torch.exp(logits - logits.amax(2, keepdim=True))
            shares = shares / shares.sum(2, keepdim=True)
            outputs.append(torch.einsum("bqk,bkd->bqd", shares, v[..., part]))
        return self.linear(torch.cat(outputs, 2), name + ".to_out.0")

    def transformer(self, x, context, name):
        def normed(h, stem):
            return layer_norm(h, self.weights[stem + ".weight"], self.weights[stem + ".bias"])

        linear = self.weights[name + ".proj_in.weight"].ndim == 2
        h = self.norm(x, name + ".norm", 1e-6)
        if not linear:
            h = self.conv(h, name + ".proj_in")
        h = h.reshape(*h.shape[:2], -1).permute(0, 2, 1)
        if linear:
            h = self.linear(h, name + ".proj_in")
        depth = 0
        while self.has(f"{name}.transformer_blocks.{depth}"):
            stem = f"{name}.transformer_blocks.{depth}"
            own = normed(h, stem + ".norm1")
            h = h + self.attention(own, own, stem + ".attn1")
            h = h + self.attention(normed(h, stem + ".norm2"), context, stem + ".attn2")
            both = self.linear(normed(h, stem + ".norm3"), stem + ".ff.net.0.proj")
            value, gate = both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]
            gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
            h = h + self.linear(value * gelu, stem + ".ff.net.2")
            depth += 1
        if linear:
            h = self.linear(h, name + ".proj_out")
        h = h.permute(0, 2, 1).reshape(x.shape)
        return x + (h if linear else self.conv(h, name + ".proj_out"))

    def block(self, x, emb, context, name, size):
        index = 0
        while self.has(f"{name}.{index}"):
            layer = f"{name}.{index}"
            if self.has(layer + ".in_layers"):
                x = self.residual(x, emb, layer)
            elif self.has(layer + ".transformer_blocks"):
                x = self.transformer(x, context, layer)
            elif self.has(layer + ".op"):
                x = self.conv(x, layer + ".op", stride=2)
            elif self.has(layer + ".conv"):
                ys = [row * x.shape[2] // size[0] for row in range(size[0])]
                xs = [column * x.shape[3] // size[1] for column in range(size[1])]
                x = self.conv(x[:, :, ys][:, :, :, xs], layer + ".conv")
            else:
                x = self.conv(x, layer)
            index += 1
        return x

    def __call__(self, x, timesteps, context, y=None, add=None):
        """The prediction; add: site -> what is added to its skip features."""
        add = add or {}
        dim = self.weights["time_embed.0.weight"].shape[1]
        emb = self.linear(plain_embedding(timesteps, dim), "time_embed.0")
        emb = self.linear(silu(emb), "time_embed.2")
        if self.has("label_emb"):
            label = silu(self.linear(y, "label_emb.0.0"))
            emb = emb + self.linear(label, "label_emb.0.2")
        skips, index = [], 0
        while self.has(f"input_blocks.{index}"):
            x = self.block(x, emb, context, f"input_blocks.{index}", None)
            skips.append(x)
            index += 1
        x = self.block(x, emb, context, "middle_block", None) + add.get("middle", 0)
        index = 0
        while self.has(f"output_blocks.{index}"):
            skip = skips.pop() + add.get(f"input_{len(skips)}", 0)
            size = skips[-1].shape[2:] if skips else None
            x = self.block(torch.cat([x, skip], 1), emb, context, f"output_blocks.{index}", size)
            index += 1
        return self.conv(silu(self.norm(x, "out.0")), "out.2")
