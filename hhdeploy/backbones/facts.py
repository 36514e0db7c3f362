"""What everybody who does not hold the model needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.preprocess import Preprocess


@dataclass(frozen=True)
class BackboneFacts:
    """What planning, a bundle and its manifest need to know of the frozen timm model.

    Attributes:
        model: timm name with its tag.
        args: further arguments of ``timm.create_model``.
        sha256: digest of the frozen weights (design of the adapter format, ``base_sha256``).
        linears: the Linears that adapters can change, in execution order; none in a manifest,
            whose row layout has those with a branch.
        classifier: module path of the classifier.
        dim: features that the classifier sees.
        classes: classes of the backbone's own classifier, 0 if it has none.
        preprocess: timm's evaluation transform of the model.
        extra: further keys of a manifest's entry, kept as they came.
    """

    model: str
    args: Mapping[str, Any]
    sha256: str
    linears: tuple[LinearSpec, ...]
    classifier: str
    dim: int
    classes: int
    preprocess: Preprocess
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``backbone`` entry, without the Linears (the row layout has them)."""
        return {
            "model": self.model,
            "args": dict(self.args),
            "sha256": self.sha256,
            "classifier": self.classifier,
            "dim": self.dim,
            "classes": self.classes,
            "preprocess": self.preprocess.to_json(),
            **self.extra,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BackboneFacts:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError if it is damaged."""
        rest = dict(content)
        return cls(
            model=rest.pop("model"),
            args=dict(rest.pop("args")),
            sha256=rest.pop("sha256"),
            linears=(),
            classifier=rest.pop("classifier"),
            dim=rest.pop("dim"),
            classes=rest.pop("classes"),
            preprocess=Preprocess.from_json(rest.pop("preprocess")),
            extra=rest,
        )


# Further arguments of timm.create_model that an adapter or a user may name: those that shape
# the architecture. Anything else (checkpoint paths, callables) has no place in a file that
# comes from elsewhere.
BASE_MODEL_ARGS = frozenset(
    {
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "global_pool",
        "class_token",
        "no_embed_class",
        "reg_tokens",
        "embed_dim",
        "depth",
        "depths",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "init_values",
        "pre_norm",
        "final_norm",
        "fc_norm",
        "window_size",
        "swiglu_mlp",
        "scale_mlp",
        "use_rot_pos_emb",
        "use_abs_pos_emb",
        "dynamic_img_size",
        "dynamic_img_pad",
        "num_reg_tokens",
    }
)
