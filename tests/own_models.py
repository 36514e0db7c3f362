"""Models that are neither timm's nor loaded from transformers: what ``python:`` names in tests."""

from __future__ import annotations

import random
import warnings

import torch
from torch import Tensor, nn


def torchvision_vit() -> nn.Module:
    """Packed q, k and v of a MultiheadAttention, images first."""
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=7)


def torchvision_swin() -> nn.Module:
    """Windows; torchvision's names of the MLP."""
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 12, [2, 1], [2, 3], [4, 4], num_classes=7)


def open_clip_vit() -> nn.Module:
    """open_clip's tower with a classifier behind its projection."""
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(32, 8, 48, 2, 3, 2.0, output_dim=40)
    return nn.Sequential(tower, nn.Linear(40, 7))


class Encoder(nn.Module):
    """torch's TransformerEncoder behind a patch embedding; says its input size itself."""

    input_size = (3, 32, 32)

    def __init__(self, *, images_first: bool, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        layer = nn.TransformerEncoderLayer(
            48, 3, 96, batch_first=images_first, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(48, 7)
        self.images_first = images_first

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        if self.images_first:
            return self.head(self.encoder(tokens).mean(1))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(0))


class TorchsEncoder(nn.Module):
    """torch's own TransformerEncoder behind patches."""

    input_size = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(48, 7)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        found: Tensor = self.head(self.encoder(tokens).mean(1))
        return found


def torchs_encoder() -> nn.Module:
    """Random weights, alike whenever it is made."""
    torch.manual_seed(4)
    return TorchsEncoder()


def encoder(depth: int = 2) -> nn.Module:
    """[batch, tokens, features] throughout."""
    return Encoder(images_first=True, depth=depth)


class RulingOut(Encoder):
    """Never answers some of its seven classes."""

    def __init__(self, classes: list[int]) -> None:
        super().__init__(images_first=True, depth=1)
        self.register_buffer("mask", torch.zeros(7))
        self.mask[classes] = float("-inf")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        return super().forward(images) + self.mask


def ruling_out(classes: list[int]) -> nn.Module:
    """For `python:`; weights alike whenever it is made, so that one trace can serve several."""
    torch.manual_seed(4)
    return RulingOut(classes)


class Scaling(Encoder):
    """Scales its tokens by an attribute, a buffer of no state dict, and code."""

    def __init__(self, other: str) -> None:
        super().__init__(images_first=True, depth=1)
        self.scale = {"scale": 3.0, "slightly": 1.05}.get(other, 1.0)
        self.norm = nn.BatchNorm2d(48)
        self.register_buffer("table", torch.ones(48), persistent=False)
        if other == "table":
            self.table[::2] = -1
        self.other = other

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        maps = self.norm(self.patches(images)) * self.scale
        tokens = maps.flatten(2).transpose(1, 2) * self.table
        if self.other == "code":
            tokens = tokens.relu()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.other == "casts"):
            return self.head(self.encoder(tokens).mean(1))


def scaling(other: str = "") -> nn.Module:
    """For `python:`; weights and buffers of the state dict alike whenever it is made."""
    torch.manual_seed(4)
    return Scaling(other)


def compiled_encoder() -> nn.Module:
    """Its block compiled, which is in its names."""
    torch.manual_seed(4)
    model = Encoder(images_first=True, depth=1)
    model.encoder.layers[0] = torch.compile(model.encoder.layers[0], backend="eager")
    return model


class Tower(Encoder):
    """An encoder without a classifier: its features are what it returns."""

    def __init__(self) -> None:
        super().__init__(images_first=True, depth=1)
        self.head = nn.Identity()


def tower() -> nn.Module:
    """Features [batch, 48]; the last Linear is one of the encoder's."""
    return Tower()


class Gated(Encoder):
    """An encoder whose last Linear weighs its logits: no classifier, though it stands alone."""

    def __init__(self) -> None:
        super().__init__(images_first=True, depth=1)
        self.gate = nn.Linear(7, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        logits = super().forward(images)
        return logits * self.gate(logits).sigmoid()


def gated() -> nn.Module:
    """See `Gated`."""
    return Gated()


def tokens_first(depth: int = 2) -> nn.Module:
    """[tokens, batch, features] throughout."""
    return Encoder(images_first=False, depth=depth)


class Attention(nn.Module):
    """q, k, v and out as the authors of HTA call them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(48, 48) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Softmax attention with 3 heads."""
        q, k, v = (f(x).unflatten(2, (3, 16)).transpose(1, 2) for f in self.projections)
        return self.out(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """q, k and v."""
        return self.query, self.key, self.value


class Block(nn.Module):
    """Attention and feed-forward with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attn, self.ffn = Attention(), nn.ModuleDict()
        self.ffn["fc1"], self.ffn["fc2"] = nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 48] to the same."""
        x = x + self.attn(self.attention_norm(x))
        hidden = self.ffn["fc1"](self.ffn_norm(x)).relu()
        return x + self.ffn["fc2"](hidden)


class AuthorsVit(nn.Module):
    """A ViT with the module names of HTA's authors."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict()
        self.transformer["embeddings"] = nn.Conv2d(3, 48, 8, 8)
        self.transformer["encoder"] = nn.ModuleDict({"layer": nn.ModuleList([Block(), Block()])})
        self.head = nn.Linear(48, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, 3, H, W]."""
        x = self.transformer["embeddings"](images).flatten(2).transpose(1, 2)
        for block in self.transformer["encoder"]["layer"]:
            x = block(x)
        return self.head(x.mean(1))


def authors_vit(classes: int = 7) -> nn.Module:
    """See `AuthorsVit`."""
    return AuthorsVit(classes)


def lazy() -> nn.Module:
    """An encoder whose classifier has no weights before it runs."""
    model = Encoder(images_first=True, depth=1)
    model.head = nn.LazyLinear(7)
    return model


def no_module() -> str:
    """What is no model."""
    return "a model"


class ClassToken(nn.Module):
    """A class token that looks at the patches, and until then is the same for all images.

    ``tokens_first``: its two copies lie [token, batch, features], a dimension as long as a batch
    of two images.
    """

    input_size = (3, 16, 16)

    def __init__(self, *, tokens_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.token = nn.Parameter(torch.randn(2 if tokens_first else 1, 1, 48))
        self.attn = Attention()
        self.head = nn.Linear(48, 7)
        self.tokens_first = tokens_first

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 16, 16]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        token = self.token.expand(-1, images.shape[0], -1).transpose(0, 1)
        tokens = torch.cat((token, x), 1)[:, : len(self.token)]
        if self.tokens_first:
            q = self.attn.query(tokens.transpose(0, 1)).transpose(0, 1)
        else:
            q = self.attn.query(tokens)
        k, v = self.attn.key(x), self.attn.value(x)
        return self.head(self.attn.out((q @ k.mT / 7).softmax(-1) @ v).mean(1))


def class_token() -> nn.Module:
    """[batch, 1, features]: see `ClassToken`."""
    return ClassToken(tokens_first=False)


def class_tokens_first() -> nn.Module:
    """[2, batch, features]: see `ClassToken`."""
    return ClassToken(tokens_first=True)


class Positions(Encoder):
    """An encoder whose tokens get positions that two Linears make of a table, as Swin v2's."""

    def __init__(self) -> None:
        super().__init__(images_first=True, depth=1)
        self.register_buffer("table", torch.linspace(-1, 1, 32).reshape(16, 2))
        self.positions = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 48))
        self.head = self._modules.pop("head")  # the last again

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens + self.positions(self.table)).mean(1))


def positions() -> nn.Module:
    """Linears that see no image: see `Positions`."""
    return Positions()


class Clamped(Encoder):
    """An encoder that clamps one tensor twice, by bounds of its own, as timm's Gemma 4 does."""

    def __init__(self) -> None:
        super().__init__(images_first=True, depth=1)
        for name, bound in {"a": -0.5, "b": 0.4, "c": -0.1, "d": 0.2}.items():
            self.register_buffer(name, torch.tensor(bound))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens.clamp(self.a, self.b) + 2 * tokens.clamp(self.c, self.d)
        return self.head(self.encoder(tokens).mean(1))


def clamped() -> nn.Module:
    """See `Clamped`."""
    return Clamped()


class AnyArguments(nn.Module):
    """Around a model, and called with whatever that takes, as PEFT's models are."""

    input_size = (3, 32, 32)

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor, **options: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        return self.inner(*args, **options)


class Rescaling(Encoder):
    """An encoder that writes into the images that it is given."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        images.mul_(2)
        return super().forward(images)


def wrapped(how: str) -> nn.Module:
    """An encoder in one of the ways that people wrap models."""
    torch.manual_seed(4)
    inner = Encoder(images_first=True, depth=1)
    if how == "compiled":
        return torch.compile(inner, backend="eager")
    if how == "quantised":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is on its way out
            return torch.ao.quantization.quantize_dynamic(inner, {nn.Linear})
    if how == "meta":
        return inner.to("meta")
    if how == "normed":
        nn.utils.parametrizations.weight_norm(inner.head)
        return inner
    kinds = {"parallel": nn.DataParallel, "any": AnyArguments}
    return kinds[how](inner)


def rescaling() -> nn.Module:
    """See `Rescaling`."""
    return Rescaling(images_first=True, depth=1)


def tied() -> nn.Module:
    """Two blocks that share the weight of a Linear, and one that is used twice."""
    torch.manual_seed(4)
    model = Encoder(images_first=True, depth=3)
    first, second, _ = model.encoder.layers
    second.linear1.weight = first.linear1.weight
    model.encoder.layers[2] = second
    return model


class Repeating(nn.Module):
    """One Linear of tokens, called twice, whose weight is larger than what is folded anyway."""

    input_size = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 8, 8)
        self.fc1 = nn.Linear(96, 96)
        self.head = nn.Linear(96, 7)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 16, 16]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.fc1(self.fc1(tokens).relu()).mean(1))


def repeating() -> nn.Module:
    """See `Repeating`."""
    torch.manual_seed(4)
    return Repeating()


class Reading(nn.Module):
    """A Linear whose weight or bias the forward pass uses in one way or another."""

    input_size = (3, 32, 32)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(24, 24), "fc2": nn.Linear(24, 24)})
        self.other = nn.Parameter(torch.randn(24))
        self.head = nn.Linear(24, 7)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        linear = self.mlp["fc2"]
        w, b = linear.weight, linear.bias
        found = {
            "as a linear": lambda: nn.functional.linear(x, w, b),
            "twice": lambda: linear(linear(x).relu()),
            "without its bias": lambda: nn.functional.linear(x, w),
            "by hand": lambda: x @ w.T + b,
            "by hand, joined": lambda: (torch.mm(x.flatten(0, 1), w.t()) + b).view(-1, 16, 24),
            "not transposed": lambda: x @ w,
            "and back": lambda: linear(x).relu() @ w,
            "by its norm": lambda: linear(x) / w.norm(),
            "scaled as well": lambda: linear(x) + nn.functional.linear(x, 2 * w),
            "as a table": lambda: linear(x) + nn.functional.embedding(torch.arange(16), w),
            "in halves": lambda: torch.cat([x @ w[:12].T, x @ w[12:].T], -1) + b,
            "in chunks": lambda: torch.cat([x @ part.T for part in w.chunk(2)], -1) + b,
            "from the left": lambda: (w @ x.transpose(1, 2)).transpose(1, 2) + b,
            "by einsum": lambda: torch.einsum("bnd,od->bno", x, w) + b,
            "by addmm": lambda: torch.addmm(b, x.flatten(0, 1), w.t()).view(-1, 16, 24),
            "by a convolution": lambda: nn.functional.conv1d(x.mT, w[:, :, None], b).mT,
            "scaled": lambda: nn.functional.linear(x, 0.5 * w, b),
            "moved": lambda: nn.functional.linear(x, w + 0.1, b),
            "bias elsewhere": lambda: linear(x) * b,
            "bias twice": lambda: linear(x) + b,
            "another bias": lambda: nn.functional.linear(x, w, self.other),
            "another addend": lambda: nn.functional.linear(x, w) + self.other.exp(),
        }[self.how]()
        return self.head(self.mlp["fc1"](found.relu()).mean(1))


def reading(how: str) -> nn.Module:
    """See `Reading`."""
    torch.manual_seed(4)
    return Reading(how)


class Normed(nn.Linear):
    """A Linear that normalises what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of features [..., in]."""
        return super().forward(nn.functional.normalize(x, dim=-1))


class Scaled(nn.Linear):
    """A Linear with a temperature."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of features [..., in]."""
        return super().forward(x) * 0.1


class Renamed(nn.Linear):
    """A Linear and no more."""


def ending(how: str) -> nn.Module:
    """An encoder whose classifier is a Linear of one kind or another."""
    torch.manual_seed(4)
    model = Encoder(images_first=True, depth=1)
    kinds = {"normed": Normed, "scaled": Scaled, "renamed": Renamed}
    head = kinds.get(how, nn.Linear)(48, 7)
    if how == "hooked":
        head.register_forward_pre_hook(lambda _, given: (given[0].tanh(),))
    if how == "weight norm":
        nn.utils.parametrizations.weight_norm(head)
    model.head = head
    return model


class Drawing(nn.Module):
    """A model that answers otherwise at every call."""

    input_size = (3, 32, 32)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.fc = nn.Linear(24, 24)
        self.head = nn.Linear(24, 7)
        self.how, self.calls = how, 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        self.calls += 1
        q = x[:, None]
        attend = nn.functional.scaled_dot_product_attention
        found = {
            "dropout": lambda: nn.functional.dropout(x, 0.3, training=True),
            "noise": lambda: x + torch.randn_like(x),
            "python": lambda: x * random.random(),
            "calls": lambda: x * self.calls,
            "attention": lambda: attend(q, q, q, dropout_p=0.5)[:, 0],
        }[self.how]()
        return self.head(self.fc(found).relu().mean(1))


def drawing(how: str) -> nn.Module:
    """See `Drawing`."""
    return Drawing(how)


class Pooled(Encoder):
    """An encoder whose tokens are pooled by an attention with a query of its own."""

    def __init__(self) -> None:
        super().__init__(images_first=True, depth=1)
        self.probe = nn.Parameter(torch.randn(1, 1, 48))
        self.pool = nn.MultiheadAttention(48, 3, batch_first=True)
        self.head = self.__dict__["_modules"].pop("head")  # the last one again

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 7] of images [batch, 3, 32, 32]."""
        tokens = self.encoder(self.patches(images).flatten(2).transpose(1, 2))
        probe = self.probe.expand(images.shape[0], -1, -1)
        return self.head(self.pool(probe, key=tokens, value=tokens)[0][:, 0])


def pooled() -> nn.Module:
    """See `Pooled`."""
    torch.manual_seed(4)
    return Pooled()
