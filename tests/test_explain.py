"""Explanations of other people's networks show the right place, or are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_cifar.data import InputError
from attn_cifar.explain import explain

PATCHES = 12  # changed one at a time


def changed_images(size, seed=1):
    """Return an image, copies that each differ in one rectangle, and the rectangles (top, left, bottom, right) as shares."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, 3, *size, generator=generator)
    places, images = [], [image]
    for _ in range(PATCHES):
        top, left = (torch.rand(2, generator=generator) * 0.8).tolist()
        rows, columns = (slice(round(start * n), round((start + 0.2) * n)) for start, n in zip((top, left), size, strict=True))
        copy = image.clone()
        copy[:, :, rows, columns] = 3 * torch.randn(copy[:, :, rows, columns].shape, generator=generator)
        images.append(copy)
        places.append((top, left, top + 0.2, left + 0.2))
    return torch.cat(images), places


def layer_output(model, layer, images, score=None):
    """Return a layer's output, by a hook, and the gradient of a sum of logits, if a score is given."""
    kept = []

    def keep(module, inputs, output):
        kept.append(next(part for part in ([output] if torch.is_tensor(output) else output) if torch.is_tensor(part)))
        if torch.is_tensor(output):
            return output.clone()  # what works in place works on the copy

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.set_grad_enabled(score is not None):
            output = model(images)
        return kept[-1], None if score is None else torch.autograd.grad(score(output), kept[-1])[0]
    finally:
        handle.remove()


def readings(shape, rows, columns):
    """Yield every way to read a tensor of this shape as (B, C, rows, columns)."""
    if len(shape) == 4 and shape[2:] == (rows, columns):
        yield lambda x: x
    if len(shape) == 4 and shape[1:3] == (rows, columns):
        yield lambda x: x.permute(0, 3, 1, 2)
    for axis in range(len(shape)):
        for first in range(shape[axis] - rows * columns + 1 if len(shape) in (3, 4) else 0):
            if shape[axis] <= rows * columns + 16:
                yield lambda x, axis=axis, first=first: x.movedim(axis, -1).flatten(1, -2).narrow(
                    2, first, rows * columns).unflatten(2, (rows, columns)) if axis else x.permute(1, 2, 0).narrow(
                    2, first, rows * columns).unflatten(2, (rows, columns))


def share_in_place(changes, places):
    """Return the share of changed rectangles (P) whose own area changes most, in maps of changes (P, rows, columns)."""
    rows, columns = changes.shape[1:]
    changes = changes / changes.mean((1, 2), keepdim=True).clamp(min=1e-30)
    usual = changes.mean(0)  # what changes with every rectangle tells nothing
    changes = (changes - usual) / usual.clamp(min=1e-3).sqrt()
    if min(rows, columns) >= 6:
        changes = F.avg_pool2d(changes[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    right = 0
    for change, (top, left, bottom, right_edge) in zip(changes, places, strict=True):
        row, column = divmod(int(change.argmax()), columns)
        slack = 1.0 if min(rows, columns) >= 4 else 0.25  # cells
        right += (top * rows - slack <= row + 0.5 <= bottom * rows + slack
                  and left * columns - slack <= column + 0.5 <= right_edge * columns + slack)
    return right / len(places)


def places_of_grad_cam(model, layer, size):
    """Explain one layer and return the share of rectangles that change its output where its map places them."""
    images, places = changed_images(size)
    found = explain(model, images[:4], targets=[0, 1, 2, 3], methods="grad_cam", layers=[layer])[0]
    output, gradient = layer_output(model, layer, images[:4].requires_grad_(),
                                    lambda logits: sum(logits[i, i] for i in range(4)))
    for arrange in readings(tuple(output.shape), *found.maps.shape[1:]):
        x, g = arrange(output.detach()), arrange(gradient)
        if x.shape[0] != 4:
            continue
        cam = (g.mean((2, 3), keepdim=True) * x).sum(1).relu()
        if cam.max() > 0 and torch.allclose(cam, found.maps, rtol=1e-3, atol=1e-4 * float(cam.max())):
            values = arrange(layer_output(model, layer, images.detach())[0])
            return share_in_place((values[1:] - values[:1]).abs().mean(1), places)
    if not found.maps.any():
        return None
    raise AssertionError(f"the map of {layer} is Grad-CAM in no reading of {tuple(output.shape)}")


SWEEP = ("timm",)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class ChannelsLast(nn.Module):
    """A depthwise convolution inside, channels last outside."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.mix(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).relu()


class Stages(nn.Module):
    """Stages with channels last, in any outer form, and a linear head."""

    def __init__(self, channels, form=lambda x: x, mean=(1, 2)):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.form, self.mean = ChannelsLast(3, 24), ChannelsLast(24, channels), nn.Identity(), mean
        self.form.forward, self.head = form, nn.Linear(channels, 10)

    def forward(self, x):
        return self.head(self.form(self.two(self.one(x.permute(0, 2, 3, 1)))).mean(self.mean))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (20, 12)])
@pytest.mark.parametrize("channels", [40, 16, 12, 20])
def test_height_and_width_are_found_where_channels_are_last(size, channels):
    """Also if there are as many channels as rows or columns. The head is linear, so that Grad-CAM is one product."""
    model, images = Stages(channels), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = explain(model, images)[-1]
    output = model.two(model.one(images.permute(0, 2, 3, 1)))
    right = (output * model.head.weight[found.targets][:, None, None] / output[0, ..., 0].numel()).sum(-1).relu().detach()
    assert found.layer == "two" and torch.allclose(found.maps, right, atol=1e-6)


@pytest.mark.parametrize("name, form, mean, grid", [
    ("sequence first", lambda x: x.flatten(1, 2).transpose(0, 1), 0, (8, 8)),
    ("channels, then tokens", lambda x: x.flatten(1, 2).transpose(1, 2), 2, (8, 8)),
    ("heads", lambda x: x.flatten(1, 2).unflatten(2, (2, 12)).transpose(1, 2), None, (8, 8)),
    ("a class token first", lambda x: torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1), 1, (8, 8)),
    ("a class token last", lambda x: torch.cat([x.flatten(1, 2), x.mean((1, 2))[:, None]], 1), 1, (8, 8))])
def test_forms_of_tokens(name, form, mean, grid):
    """The map of the tokens is the map of the layer before, which has rows and columns."""
    def read(x):
        return form(x) if mean is not None else form(x)

    model = Stages(24, read, mean if mean is not None else 2)
    model.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(10)) if mean is None else model.head
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(images)
    found = explain(model, images, methods="grad_cam", layers=["two", "form"])
    assert found[1].maps.shape[1:] == grid
    output = model.two(model.one(images.permute(0, 2, 3, 1))).detach().requires_grad_()
    tokens = form(output)
    tail = model.head(tokens.mean(mean) if mean is not None else tokens.mean(2))
    gradient, = torch.autograd.grad(tail.gather(1, found[1].targets[:, None]).sum(), tokens)
    product = {"sequence first": (gradient.mean(0) * tokens).sum(-1).T,
               "channels, then tokens": (gradient.mean(2, keepdim=True) * tokens).sum(1),
               "heads": (gradient.mean(2, keepdim=True) * tokens).sum((1, 3)),
               "a class token first": (gradient[:, 1:].mean(1, keepdim=True) * tokens[:, 1:]).sum(-1),
               "a class token last": (gradient[:, :-1].mean(1, keepdim=True) * tokens[:, :-1]).sum(-1)}[name]
    assert torch.allclose(found[1].maps, product.relu().view(2, *grid).detach(), atol=1e-6)


def windows(side):
    return lambda x: x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(1, 4)


def z_order(x):
    x = x.unflatten(2, (-1, 2, 2)).unflatten(1, (-1, 2, 2))  # (B, r, 2, 2, c, 2, 2, C)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 6)


ORDERS = {"windows of 2": (8, windows(2)), "windows of 4": (8, windows(4)), "windows of 3 on 6": (6, windows(3)),
          "windows of 2 on 6": (6, windows(2)), "windows of 2 on 4": (4, windows(2)), "windows of 7": (14, windows(7)),
          "windows of 4 on 12": (12, windows(4)), "z order": (8, z_order),
          "column by column": (8, lambda x: x.transpose(1, 2).flatten(1, 2)), "backwards": (8, lambda x: x.flip(1, 2).flatten(1, 2)),
          "bottom up": (8, lambda x: x.flip(1).flatten(1, 2)), "rolled by half": (8, lambda x: x.roll((4, 4), (1, 2)).flatten(1, 2)),
          "alternating": (8, lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1).flatten(1, 2)),
          "alternating on 6": (6, lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1).flatten(1, 2)),
          "shuffled": (8, lambda x: x.flatten(1, 2)[:, torch.randperm(64, generator=torch.Generator().manual_seed(3))])}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_in_another_order_are_refused(order, seed):
    side, form = ORDERS[order]
    model, images = Stages(24, form, 1), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    with pytest.raises(InputError, match="in which patches of the image have their places"):
        explain(model, images, methods="grad_cam", layers=["form"])


class Positions(nn.Module):
    """Position embeddings for each image, which do not depend on it."""

    def __init__(self, tokens, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, tokens, channels))

    def forward(self, x):
        return self.weight.expand(len(x), -1, -1)


class OfTokens(nn.Module):
    """A transformer with a class token around any attention."""

    def __init__(self, attention, form=lambda x: x, patch=8):
        super().__init__()
        torch.manual_seed(0)
        tokens = (32 // patch) ** 2
        self.patch, self.positions, self.form = nn.Conv2d(3, 32, patch, patch), Positions(tokens, 32), form
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 32)), nn.Linear(32, 10)
        self.norms, self.layers = (nn.ModuleList(make() for _ in range(2)) for make in (lambda: nn.LayerNorm(32), attention))

    def forward(self, x):
        x = self.form(self.patch(x).permute(0, 2, 3, 1))
        x = x if x.dim() == 3 else x.flatten(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x + self.positions(x)], 1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x[:, 0])


class Attention(nn.Module):
    """The fused function; subclasses compute the same in other ways."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.drop, self.attend = nn.Dropout(0.1), nn.Softmax(dim=-1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # (B, heads, T, 16)
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def by_softmax(q, k):
    return (q @ k.transpose(-2, -1) * 0.25).softmax(dim=-1)


def in_float32(self, q, k, v):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    return torch.matmul(F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), 0.0, self.training), v).contiguous()


WAYS = {
    "timm, unfused": lambda self, q, k, v: self.drop((q * 0.25 @ k.transpose(-2, -1)).softmax(dim=-1)) @ v,
    "vit-pytorch": lambda self, q, k, v: torch.matmul(self.drop(self.attend(torch.matmul(q, k.transpose(-1, -2)) * 0.25)), v),
    "eager": in_float32, "einsum": lambda self, q, k, v: torch.einsum("bhij,bhjd->bhid", by_softmax(q, k), v),
    "einsum, heads in another place": lambda self, q, k, v: torch.einsum("b h i j, b j h d -> b h i d", by_softmax(q, k),
                                                                          v.transpose(1, 2)),
    "values first": lambda self, q, k, v: (v.mT @ by_softmax(q, k).mT).mT,
    "bmm": lambda self, q, k, v: torch.bmm(by_softmax(q, k).flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, 2)),
    "flat from the start": lambda self, q, k, v: torch.bmm(torch.softmax(torch.baddbmm(torch.zeros(()), q.flatten(0, 1), k.flatten(
        0, 1).mT, beta=0, alpha=0.25), -1), v.flatten(0, 1)).unflatten(0, (-1, 2)),
    "subtracting the maximum": lambda self, q, k, v: ((s := q @ k.mT * 0.25) - s.amax(-1, keepdim=True)).softmax(-1) @ v,
    "keys first": lambda self, q, k, v: (k @ q.mT * 0.25).softmax(-2).mT @ v,
    "log": lambda self, q, k, v: (q @ k.mT * 0.25).log_softmax(-1).exp() @ v,
    "exponentials": lambda self, q, k, v: (e := (q @ k.mT * 0.25).exp()) / e.sum(-1, keepdim=True) @ v,
    "operator": lambda self, q, k, v: torch.Tensor.matmul(torch.nn.functional.softmax(q @ k.mT * 0.25, -1), v),
    "torch.special": lambda self, q, k, v: torch.special.softmax(q @ k.mT * 0.25, -1) @ v}


@pytest.mark.parametrize("way", WAYS)
def test_attention_in_other_words_is_the_same_attention(way):
    """The maps are those of the same weights through the fused function."""
    other = type("Other", (Attention,), {"mix": WAYS[way]})
    expected, found = explain(OfTokens(Attention), IMAGES, 3), explain(OfTokens(other), IMAGES, 3)
    assert [(one.method, one.layer) for one in found] == [(one.method, one.layer) for one in expected]
    assert {one.method for one in found} == {"grad_cam", "attention_rollout", "gradient_attention"}
    for one, right in zip(found, expected, strict=True):
        assert torch.allclose(one.maps, right.maps, rtol=1e-4, atol=1e-5 * float(right.maps.max()))


class Torch(nn.Module):
    """PyTorch's module, called in one of several ways."""

    def __init__(self, first=True, **options):
        super().__init__()
        self.attention, self.first, self.options = nn.MultiheadAttention(32, 2, batch_first=first), first, options

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        output = self.attention(x, x, x, **self.options)[0]
        return output if self.first else output.transpose(0, 1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{}, {"average_attn_weights": False}, {"need_weights": True}], ids=str)
def test_multihead_attention_as_it_is_called_by_default(first, options):
    expected = explain(OfTokens(lambda: Torch(need_weights=False)), IMAGES, 3)
    found = explain(OfTokens(lambda: Torch(first, **options)), IMAGES, 3)
    assert {one.method for one in found} == {"grad_cam", "attention_rollout", "gradient_attention"}
    for one, right in zip(found, expected, strict=True):
        assert torch.allclose(one.maps, right.maps, rtol=1e-4, atol=1e-5 * float(right.maps.max()))


def test_attention_that_returns_its_weights_too():
    """As DINO's blocks do; and PyTorch's encoder, whose fast path shows nothing."""
    class Both(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            weights = by_softmax(q, k)
            return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Both()

        def forward(self, x):
            return self.inner(x)[0]

    rollout = explain(OfTokens(First), IMAGES, methods="attention_rollout")[-1]
    assert torch.allclose(rollout.maps, explain(OfTokens(Attention), IMAGES, methods="attention_rollout")[-1].maps, atol=1e-6)
    encoder = OfTokens(lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True))
    assert {one.method for one in explain(encoder, IMAGES)} == {"grad_cam", "attention_rollout", "gradient_attention"}


@pytest.mark.parametrize("form", [windows(2), windows(4), lambda x: x.transpose(1, 2)])
def test_attention_over_tokens_in_another_order_gives_no_map(form):
    model = OfTokens(Attention, form, patch=4)
    with pytest.raises(InputError, match="nothing for attention_rollout was found"):
        explain(model, IMAGES, methods="attention_rollout")
    with pytest.raises(InputError):
        explain(model, IMAGES, methods="grad_cam")


def test_a_layer_without_the_image_is_refused():
    model = OfTokens(nn.Identity)
    with pytest.raises(InputError, match="in which patches of the image have their places"):
        explain(model, IMAGES, layers=[model.positions])
    assert "positions" not in [one.layer for one in explain(OfTokens(Attention), IMAGES)]


def test_the_stem_alone_is_not_the_default():
    """After the stem, positions are lost: most of the network works on something else."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1))
    mixed = nn.Sequential(nn.Flatten(2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    torch.manual_seed(0)
    model = nn.Sequential(stem, mixed, nn.Flatten(), nn.Linear(16 * 64, 10))
    with pytest.raises(InputError, match="near the classifier"):
        explain(model, IMAGES)
    assert explain(model, IMAGES, layers=["0"])[0].maps.shape[1:] == (8, 8)
