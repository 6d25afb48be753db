"""Explanations of other people's networks show the right place, or are refused."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from attn_cifar.data import InputError, load_data, normalize
from attn_cifar.explain import blurred, check_explanations, explain
from attn_cifar.explain.positions import locate, probe_images

PATCHES = 22  # changed one at a time; 23 images are as many as the tokens of no grid


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
    """Return a layer's output, by a hook, and the gradient of a score, if one is given: None if the output has no part in it."""
    kept = []

    def keep(module, inputs, output):
        kept.append(next(part for part in ([output] if torch.is_tensor(output) else output) if torch.is_tensor(part)))
        if torch.is_tensor(output):
            return output.clone()  # what works in place works on the copy

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.set_grad_enabled(score is not None):
            output = model(images)
        return kept[-1], None if score is None else torch.autograd.grad(score(output), kept[-1], allow_unused=True)[0]
    finally:
        handle.remove()


def attended_tokens(model, grids, images):
    """Return the tokens of each attention (name: rows and columns): its first input, if that fits the grid, or else what is made
    of it inside, (images * heads, …): some attention pools its tokens."""
    kept = {}

    def keep(name, tensor):
        if torch.is_tensor(tensor) and name not in kept and len(tensor) % len(images) == 0:
            tensor = tensor if len(tensor) == len(images) else tensor.unflatten(0, (len(images), -1)).flatten(1, 2)
            if any(len(arrange(tensor)) == len(images) for arrange in readings(tuple(tensor.shape), *grids[name])):
                kept[name] = tensor

    handles = []
    for name in grids:
        attention = model.get_submodule(name)
        handles.append(attention.register_forward_pre_hook(lambda module, inputs, name=name: keep(name, inputs[0])))
        handles += [part.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
                    for part in attention.modules() if part is not attention]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def readings(shape, rows, columns):
    """Yield every way to read a tensor of this shape as (B, C, rows, columns)."""
    if len(shape) == 4 and shape[2:] == (rows, columns):
        yield lambda x: x
    if len(shape) == 4 and shape[1:3] == (rows, columns):
        yield lambda x: x.permute(0, 3, 1, 2)
    for axis in {3: (0, 1, 2), 4: (1, 2, 3)}.get(len(shape), ()):  # of the tokens; the images are in the first of the others
        if rows * columns <= shape[axis] <= rows * columns + 16:
            for first in range(shape[axis] - rows * columns + 1):
                yield lambda x, axis=axis, first=first: x.movedim(axis, -1).movedim(1 if axis == 0 else 0, 0).flatten(1, -2)[
                    ..., first : first + rows * columns].unflatten(-1, (rows, columns))


def share_in_place(changes, places):
    """Return the share of changed rectangles (P) whose own area changes most, in maps of changes (P, rows, columns)."""
    rows, columns = changes.shape[1:]
    changes = changes / changes.mean((1, 2), keepdim=True).clamp(min=1e-30)
    changes = changes - changes.mean(0)  # what changes with every rectangle tells nothing
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
    for arrange in readings(tuple(output.shape), *found.maps.shape[1:]) if gradient is not None else ():
        x, g = arrange(output.detach()), arrange(gradient)
        if x.shape[0] != 4:
            continue
        terms = g.mean((2, 3), keepdim=True) * x
        cam, rounding = terms.sum(1).relu(), 1e-6 * float(terms.abs().sum(1).max())  # terms of both signs may nearly cancel, as
        # before a layer norm, whose gradient is at right angles to its input: what is left is inexact in any computation
        if cam.max() > 10 * rounding and torch.allclose(cam, found.maps, rtol=1e-3, atol=1e-4 * float(cam.max()) + rounding):
            values = arrange(layer_output(model, layer, images.detach())[0])
            return share_in_place((values[1:] - values[:1]).abs().mean(1), places)
    if not found.maps.any():
        return None
    raise AssertionError(f"the map of {layer} is Grad-CAM in no reading of {tuple(output.shape)}")

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


def to_tokens(x):
    return x.flatten(1, 2)


FORMS = {  # what a layer makes of (B, h, w, C), and the way back
    "sequence first": (lambda x: to_tokens(x).transpose(0, 1), lambda x: x.transpose(0, 1)),
    "channels, then tokens": (lambda x: to_tokens(x).mT, lambda x: x.mT),
    "heads": (lambda x: to_tokens(x).unflatten(2, (2, 12)).transpose(1, 2), lambda x: x.transpose(1, 2).flatten(2)),
    "a class token first": (lambda x: torch.cat([x.mean((1, 2))[:, None], to_tokens(x)], 1), lambda x: x[:, 1:]),
    "a class token last": (lambda x: torch.cat([to_tokens(x), x.mean((1, 2))[:, None]], 1), lambda x: x[:, :-1]),
    "four registers": (lambda x: torch.cat([x.new_zeros(len(x), 4, 24), to_tokens(x)], 1), lambda x: x[:, 4:])}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_forms_of_tokens(form, size):
    """The map of the tokens is the map of the layer before them, which has rows and columns."""
    there, back = FORMS[form]

    class Model(Stages):
        def forward(self, x):
            return self.head(back(self.form(self.two(self.one(x.permute(0, 2, 3, 1))))).mean(1))

    model, images = Model(24, there), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    two, tokens = explain(model, images, methods="grad_cam", layers=["two", "form"])
    assert torch.allclose(tokens.maps, two.maps, atol=1e-6) and two.maps.max() > 0


def windows(side):
    return lambda x: x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(1, 4)


def z_order(x):
    x = x.unflatten(2, (-1, 2, 2)).unflatten(1, (-1, 2, 2))  # (B, r, 2, 2, c, 2, 2, C)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 6)


ORDERS = {"windows of 2": (8, windows(2)), "windows of 4": (8, windows(4)), "windows of 3 on 6": (6, windows(3)),
          "windows of 2 on 6": (6, windows(2)), "windows of 2 on 4": (4, windows(2)), "windows of 7": (14, windows(7)),
          "windows of 4 on 12": (12, windows(4)), "z order": (8, z_order),
          "column by column": (8, lambda x: x.transpose(1, 2).flatten(1, 2)),
          "backwards": (8, lambda x: x.flip(1, 2).flatten(1, 2)),
          "bottom up": (8, lambda x: x.flip(1).flatten(1, 2)),
          "rolled by half": (8, lambda x: x.roll((4, 4), (1, 2)).flatten(1, 2)),
          "alternating": (8, lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1).flatten(1, 2)),
          "alternating on 6": (6, lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1).flatten(1, 2)),
          "shuffled": (8, lambda x: x.flatten(1, 2)[:, torch.randperm(64, generator=torch.Generator().manual_seed(3))])}


@pytest.mark.parametrize("size", [(2, 2), (2, 3), (3, 3), (4, 4), (7, 7)])
def test_noise_has_no_places(size):
    """What changes in a layer does not depend on where the image changes: hardly ever is there a layout."""
    generator, found, count = torch.Generator().manual_seed(0), 0, len(probe_images(torch.zeros(1, 3, 32, 32)))
    for strength in [0.05, 0.3, 1.0, 2.0] * 25:
        change = (strength * torch.randn(count, 1, *size, generator=generator)).exp()
        change[0] = 0  # the image itself
        found += locate(change, aspect=size[0] / size[1]) is not None
    assert found <= 1, f"{found} of 100"


@pytest.mark.parametrize("seed", range(3))
def test_small_images_do_not_decide_whether_a_network_is_explained(seed):
    """On 32×32 pixels the last positions of a ResNet-18 are 2×2; any picture shows where they are."""
    torch.manual_seed(seed)
    data, model = load_data("shapes"), torchvision.models.resnet18(num_classes=10).eval()
    for image in normalize(torch.tensor(data.test_images[:6]), data.mean, data.std).split(1):
        assert explain(model, image, 3, "grad_cam")[-1].layer in ("layer3", "layer3.0")  # positions of layer3: 2×2


@pytest.mark.parametrize("size", [(2, 2), (2, 3), (4, 4), (7, 7)])
def test_a_diffuse_layer_is_refused(size):
    """Each patch changes the layer exactly at its place, but only a little more than elsewhere."""
    images = probe_images(torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0)))
    own = F.adaptive_avg_pool2d((images - images[:1]).abs(), size)
    own = own / own.amax((2, 3), keepdim=True).clamp(min=1e-9)
    everywhere = torch.ones_like(own) * torch.arange(len(images))[:, None, None, None].sign()
    assert locate(own + 0.01 * everywhere, aspect=size[0] / size[1]) is not None
    assert locate(0.1 * own + everywhere, aspect=size[0] / size[1]) is None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_in_another_order_are_refused(order, seed):
    side, form = ORDERS[order]
    model, images = Stages(24, form, 1), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    with pytest.raises(InputError, match="whose positions follow those of the image"):
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
    weights = F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), 0.0, self.training)
    return torch.matmul(weights, v).contiguous()


WAYS = {
    "timm, unfused": lambda self, q, k, v: self.drop((q * 0.25 @ k.transpose(-2, -1)).softmax(dim=-1)) @ v,
    "vit-pytorch": lambda self, q, k, v: torch.matmul(self.drop(self.attend(torch.matmul(q, k.transpose(-1, -2)) * 0.25)), v),
    "eager": in_float32, "einsum": lambda self, q, k, v: torch.einsum("bhij,bhjd->bhid", by_softmax(q, k), v),
    "einsum, heads in another place": lambda self, q, k, v: torch.einsum("b h i j, b j h d -> b h i d", by_softmax(q, k),
                                                                          v.transpose(1, 2)),
    "values first": lambda self, q, k, v: (v.mT @ by_softmax(q, k).mT).mT,
    "bmm": lambda self, q, k, v: torch.bmm(by_softmax(q, k).flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, 2)),
    "flat from the start": lambda self, q, k, v: torch.bmm(torch.softmax(torch.baddbmm(
        torch.zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.25), -1), v.flatten(0, 1)).unflatten(0, (-1, 2)),
    "subtracting the maximum": lambda self, q, k, v: ((s := q @ k.mT * 0.25) - s.amax(-1, keepdim=True)).softmax(-1) @ v,
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


HIDDEN = {"keys first": lambda self, q, k, v: (k @ q.mT * 0.25).softmax(-2).mT @ v,
          "log": lambda self, q, k, v: (q @ k.mT * 0.25).log_softmax(-1).exp() @ v,
          "exponentials": lambda self, q, k, v: (e := (q @ k.mT * 0.25).exp()) / e.sum(-1, keepdim=True) @ v,
          "linear": lambda self, q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
          "over channels": lambda self, q, k, v: (v @ (q.mT @ k).softmax(-1))}


@pytest.mark.parametrize("way", HIDDEN)
def test_attention_that_cannot_be_read_gives_no_attention_maps(way):
    """There is still Grad-CAM, at layers whose order of tokens is known."""
    found = explain(OfTokens(type("Other", (Attention,), {"mix": HIDDEN[way]})), IMAGES)
    assert {one.method for one in found} == {"grad_cam"} and found[-1].maps.shape == (2, 4, 4)


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
    with pytest.raises(InputError, match="attention_rollout cannot explain this model"):
        explain(model, IMAGES, methods="attention_rollout")
    with pytest.raises(InputError):
        explain(model, IMAGES, methods="grad_cam")


def test_a_layer_without_the_image_is_refused():
    model = OfTokens(nn.Identity)
    with pytest.raises(InputError, match="whose positions follow those of the image"):
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


def small(outputs=10, last=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, outputs), *last)


class Named(nn.Module):
    """Logits under a name, in an object's place."""

    def __init__(self, body, form):
        super().__init__()
        self.body, self.form = body, form

    def forward(self, x):
        return self.form(self.body(x))


ONE = {"(B, 1)": lambda x: x, "(B,)": lambda x: x[:, 0], "dictionary": lambda x: {"logits": x}, "tuple": lambda x: (x,)}


@pytest.mark.parametrize("form", ONE)
def test_one_logit_separates_two_classes(form):
    """The same network with the logits -z/2 and z/2 is the oracle for probabilities; a map against is that of -z."""
    model = Named(small(1), ONE[form])
    logits = model.body(IMAGES).detach()[:, 0]
    found = explain(model, IMAGES, layers=["body.2"])[0]
    assert torch.equal(found.targets, (logits > 0).long())
    two = Named(small(1), lambda x: torch.cat([-x, x], 1))
    for target, sign in ((0, -1), (1, 1)):
        one = explain(model, IMAGES, target, "grad_cam", ["body.2"])[0]
        assert torch.allclose(one.probabilities, torch.sigmoid(sign * logits), atol=1e-6)
        assert torch.equal(one.maps, explain(two, IMAGES, target, "grad_cam", ["body.2"])[0].maps)
    against = explain(model, IMAGES, 0, "grad_cam", ["body.2"])[0]
    assert not torch.equal(against.maps, one.maps)
    assert all(0 < check.deletion < 1 for check in check_explanations(model, IMAGES, [one], steps=2))


def test_multi_label_outputs_get_sigmoid_probabilities():
    model = small(10)
    logits = model(IMAGES).detach()
    one = explain(model, IMAGES, 3, "grad_cam", multi_label=True)[0]
    assert one.multi_label and torch.allclose(one.probabilities, logits[:, 3].sigmoid(), atol=1e-6)
    assert torch.allclose(explain(model, IMAGES, 3, "grad_cam")[0].probabilities, logits.softmax(1)[:, 3], atol=1e-6)
    (check,) = check_explanations(model, IMAGES, [one], steps=2)
    blurry = (model(blurred(IMAGES)).sigmoid()[:, 3].mean() + logits[:, 3].sigmoid().mean()) / 2
    assert abs(check.deletion - float(blurry)) < 0.1, "the area under a curve of sigmoids"


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid(), nn.Softmax(-1)], ids=str)
@pytest.mark.parametrize("outputs", [1, 10])
def test_probabilities_instead_of_logits_are_refused(last, outputs):
    with pytest.raises(InputError, match="returns probabilities"):
        explain(small(outputs, [last]), IMAGES)


@pytest.mark.parametrize("form", [lambda x: x[:, :, None], lambda x: (x, x.clone()), lambda x: x.sum(), lambda x: None,
                                  lambda x: {"a": x}, lambda x: "text"])
def test_outputs_without_class_scores_are_refused(form):
    with pytest.raises(InputError) as refused:
        explain(Named(small(), form), IMAGES)
    assert "\n" not in str(refused.value)


class Keeping(nn.Module):
    """Keep activations in attributes, lists and dictionaries, as for a loss of one's own."""

    def __init__(self):
        super().__init__()
        self.body, self.kept, self.named = small(), [], {}

    def forward(self, x):
        self.last = self.body[:3](x)
        self.kept.append(self.last)
        self.named["features"] = (self.last,)
        return self.body[3:](self.last)


def with_norm(norm):
    model = small()
    norm(model[0])
    norm(model[2])
    return model


UNUSUAL = {"activations in attributes": Keeping, "weight norm": lambda: with_norm(nn.utils.parametrizations.weight_norm),
           "spectral norm": lambda: with_norm(nn.utils.parametrizations.spectral_norm),
           "spectral norm by hooks": lambda: with_norm(nn.utils.spectral_norm),
           "weight norm by hooks": lambda: with_norm(nn.utils.weight_norm),
           "traced by fx": lambda: torch.fx.symbolic_trace(small())}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_networks_that_keep_tensors_with_a_history(kind):
    """They are explained and tested as they are, also after a training step, which leaves a history behind."""
    model = UNUSUAL[kind]()
    model(IMAGES).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = explain(model, IMAGES)
    assert len(check_explanations(model, IMAGES, found, steps=2)) == len(found)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(IMAGES).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: torch.jit.script(small()), lambda: torch.jit.trace(small(), IMAGES),
                                  lambda: torch.jit.freeze(torch.jit.script(small().eval())),
                                  lambda: nn.Sequential(torch.jit.script(small()), nn.ReLU()), lambda: "model", lambda: small])
def test_what_takes_no_hooks_is_refused_in_one_line(make):
    with pytest.raises(InputError) as refused:
        explain(make(), IMAGES)
    assert "\n" not in str(refused.value)


def test_networks_made_in_inference_mode_are_refused_in_one_line():
    with torch.inference_mode():
        whole, part = small(), nn.Linear(8, 10)
        statistics = nn.BatchNorm2d(3)
    body = small()
    body[5] = part
    for model in (whole, body, nn.Sequential(statistics.requires_grad_(False), small())):
        with pytest.raises(InputError, match="inference_mode"):
            explain(model, IMAGES)


def test_images_made_in_inference_mode_are_explained():
    with torch.inference_mode():
        images = IMAGES.clone()
    assert torch.equal(explain(small(), images)[0].maps, explain(small(), IMAGES)[0].maps)


def test_layers_are_modules_or_names():
    model = small()
    expected = explain(model, IMAGES, layers=["0", "2"])
    for layers in ([model[0], model[2]], ["0", model[2]], (model[0], model[2]), {"grad_cam": [model[0], "2"]}):
        found = explain(model, IMAGES, methods="grad_cam", layers=layers)
        assert [one.layer for one in found] == ["0", "2"]
        assert all(torch.equal(one.maps, right.maps) for one, right in zip(found, expected, strict=True))
    assert explain(model, IMAGES, layers=model[2])[0].layer == "2"
    compiled = torch.compile(model, backend="eager")
    assert explain(compiled, IMAGES, layers=[model[2]])[0].layer == "2" == explain(nn.DataParallel(model), IMAGES,
                                                                                  layers=[model[2]])[0].layer
    vit = OfTokens(Attention)
    rollout = explain(vit, IMAGES, methods="attention_rollout", layers=[vit.layers[1]])
    assert [one.layer for one in rollout] == ["layers.1"]
    for wrong in ([nn.Conv2d(3, 8, 3)], [model], [""], [0]):
        with pytest.raises(InputError):
            explain(model, IMAGES, layers=wrong)


# Networks of timm and torchvision, no two from the same source file: image size and options.
WIDE = (160, 224)
SWEEP = {
    "timm.resnet10t": (WIDE, {}), "timm.vit_tiny_patch16_224": ((64, 96), {"img_size": (64, 96), "depth": 4}),
    "timm.levit_128s": ((224, 224), {}), "timm.swin_tiny_patch4_window7_224": ((224, 224), {}),
    "timm.mobilenetv3_small_050": (WIDE, {}),
    "timm.deit_tiny_distilled_patch16_224": ((96, 64), {"img_size": (96, 64), "depth": 4}),
    "timm.efficientformer_l1": ((224, 224), {}), "timm.swinv2_tiny_window8_256": ((256, 256), {}),
    "timm.densenet121": (WIDE, {}), "timm.cait_xxs24_224": ((96, 96), {"img_size": 96, "depth": 4}),
    "timm.efficientformerv2_s0": ((224, 224), {}), "timm.hiera_tiny_224": ((224, 224), {}),
    "timm.ghostnet_050": (WIDE, {}), "timm.beit_base_patch16_224": ((96, 96), {"img_size": 96, "depth": 3, "embed_dim": 96,
                                                                             "num_heads": 3}),
    "timm.efficientvit_b0": (WIDE, {}), "timm.nest_tiny": ((224, 224), {}), "timm.hgnetv2_b0": (WIDE, {}),
    "timm.eva02_tiny_patch14_224": ((84, 84), {"img_size": 84, "depth": 3}), "timm.efficientvit_m0": ((224, 224), {}),
    "timm.pvt_v2_b0": ((128, 192), {}), "timm.inception_next_atto": (WIDE, {}),
    "timm.vit_relpos_small_patch16_224": ((96, 96), {"img_size": 96, "depth": 3}), "timm.fastvit_t8": (WIDE, {}),
    "timm.twins_svt_small": ((224, 224), {}), "timm.convnext_atto": (WIDE, {}), "timm.volo_d1_224": ((224, 224), {}),
    "timm.swiftformer_xs": ((224, 224), {}), "timm.davit_tiny": ((224, 224), {}), "timm.fasternet_t0": (WIDE, {}),
    "timm.tnt_s_patch16_224": ((224, 224), {"depth": 3}), "timm.visformer_tiny": ((224, 224), {}),
    "timm.mvitv2_tiny": ((224, 224), {}), "timm.regnetx_002": (WIDE, {}), "timm.xcit_nano_12_p16_224": ((128, 128), {}),
    "timm.mobilevit_xxs": ((192, 256), {}), "timm.gcvit_xxtiny": ((224, 224), {}), "timm.repghostnet_050": (WIDE, {}),
    "timm.crossvit_tiny_240": ((240, 240), {}), "timm.coat_lite_tiny": ((224, 224), {}), "timm.pit_ti_224": ((224, 224), {}),
    "timm.res2net50_26w_4s": (WIDE, {}), "timm.convit_tiny": ((96, 96), {"img_size": 96, "depth": 4}),
    "timm.coatnet_nano_rw_224": ((224, 224), {}), "timm.tiny_vit_5m_224": ((224, 224), {}), "timm.rexnetr_100": (WIDE, {}),
    "timm.edgenext_xx_small": ((192, 192), {}), "timm.starnet_s050": (WIDE, {}), "timm.vit_tiny_r_s16_p8_224": ((224, 224), {}),
    "timm.dla46x_c": (WIDE, {}), "timm.mambaout_femto": (WIDE, {}), "timm.poolformer_s12": (WIDE, {}),
    "timm.hrnet_w18_small": (WIDE, {}), "timm.repvit_m0_9": ((224, 224), {}), "torchvision.squeezenet1_1": (WIDE, {}),
    "torchvision.shufflenet_v2_x0_5": (WIDE, {}), "torchvision.mnasnet0_5": (WIDE, {}), "torchvision.maxvit_t": ((224, 224), {}),
    "torchvision.swin_t": ((128, 192), {})}


def make_network(name, options):
    library, name = name.split(".", 1)
    torch.manual_seed(0)
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name, num_classes=10, pretrained=False, **options)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():  # a classifier of zeros has no gradient
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def shares_of_network(name):
    """Explain a network and return the share of right places of each map; None for an empty map, {} if it is refused."""
    size, options = SWEEP[name]
    model = make_network(name, options)
    images, places = changed_images(size)
    try:
        found = explain(model, images[:1])
    except InputError as error:
        assert "\n" not in str(error)
        return {}
    shares = {one.layer: places_of_grad_cam(model, one.layer, size) for one in found if one.method == "grad_cam"}
    if any(one.method == "attention_rollout" for one in found):
        grids = {one.layer.split(" call ")[0]: one.maps.shape[1:]
                 for one in explain(model, images[:1], methods="attention_rollout")}
        for layer, tokens in attended_tokens(model, grids, images).items():
            shares[f"tokens of {layer}"] = max(
                share_in_place((x[1:] - x[:1]).abs().mean(1), places)
                for x in (arrange(tokens) for arrange in readings(tuple(tokens.shape), *grids[layer]))
                if len(x) == len(images))
        assert {f"tokens of {layer}" for layer in grids} <= set(shares), "the tokens of each attention are found"
    return shares


def check_shares(name, shares):
    wrong = {layer: share for layer, share in shares.items() if share is not None and share < 0.6}
    assert not wrong, f"{name} is explained at wrong places (share of right ones): {wrong}"


@pytest.mark.parametrize("name", ["timm.resnet10t", "timm.vit_tiny_patch16_224", "timm.efficientvit_b0",
                                  "torchvision.squeezenet1_1"])
def test_maps_of_other_networks_lie_where_the_image_changes(name):
    shares = shares_of_network(name)
    assert shares, f"{name} is not explained"
    check_shares(name, shares)


@pytest.mark.long
def test_many_networks_are_explained_at_the_right_places():
    pytest.importorskip("timm")
    explained = []
    for name in SWEEP:
        shares = shares_of_network(name)
        print(name, shares or "refused", flush=True)
        check_shares(name, shares)
        explained += [name] if any(share is not None for share in shares.values()) else []
    assert len(SWEEP) >= 40 and len(explained) >= 30, f"{len(explained)} of {len(SWEEP)} are explained"


def test_the_oracle_can_fail():
    """It notices a map that is transposed, mirrored or in the order of windows."""
    images, places = changed_images((32, 32))
    changes = (images[1:] - images[:1]).abs().mean(1)
    changes = F.avg_pool2d(changes, 4) + 0.01
    assert share_in_place(changes, places) == 1
    for wrong in (changes.mT, changes.flip(1), changes.flip(2), windows(4)(changes[..., None]).view(PATCHES, 8, 8)):
        assert share_in_place(wrong, places) < 0.6
