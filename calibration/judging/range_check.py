"""Does an adapter that came after the calibration stay inside the calibrated ranges?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import calibration_files
from hhdeploy.calibration.feeds import Feed, Feeder
from hhdeploy.calibration.scales import read_scales
from hhdeploy.choices import QuantisedPrecision
from hhdeploy.errors import BundleError, PlanError, as_code, require
from hhdeploy.files.bundle_json import json_object
from hhdeploy.files.folders import list_images, part_of, spread
from hhdeploy.preprocess import open_image

if TYPE_CHECKING:
    from hhdeploy.calibration.probe import RangeExcess

# New images of calibrated adapters leave the ranges a little too, which are the largest values of
# some images: on the starter models by at most 0.006 % of a site's values.
NEGLIGIBLE_SHARE = 1e-4


@dataclass(frozen=True)
class RangeCheck:
    """What the check found.

    Attributes:
        adapter: the one checked.
        precision: of the calibration.
        images: how many were run.
        sites: how many have a range.
        excess: the sites whose activations left it, the worst first.
    """

    adapter: str
    precision: QuantisedPrecision
    images: int
    sites: int
    excess: tuple[RangeExcess, ...]

    @property
    def clipped(self) -> tuple[RangeExcess, ...]:
        """The sites where more values are clipped than is negligible."""
        return tuple(e for e in self.excess if e.clipped > NEGLIGIBLE_SHARE)

    def advice(self) -> str:
        """What the figures mean and what to do, in words."""
        if not self.excess:
            return (
                f"{self.adapter} stays inside the calibrated ranges at all {self.sites} sites: "
                f"the {self.precision} graph serves it as it is."
            )
        if not self.clipped:
            return (
                f"{self.adapter} leaves the range at {len(self.excess)} of {self.sites} sites, but "
                f"with fewer than {NEGLIGIBLE_SHARE:.2%} of the values: the {self.precision} graph "
                "should serve it as it is. Measure its accuracy if it matters."
            )
        return (
            f"{self.adapter} leaves the range at {len(self.excess)} of {self.sites} sites; at "
            f"{len(self.clipped)} of them {NEGLIGIBLE_SHARE:.2%} of the values or more are "
            "clipped. That alone tells little of its answers: compare them in both precisions, on "
            "images whose classes you know. If they got worse, calibrate again with its images "
            "among the data, keep these sites in "
            "floating point (`exclude`), or serve this adapter from the float32 or float16 graph."
        )

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return {
            "adapter": self.adapter,
            "precision": self.precision,
            "images": self.images,
            "sites": self.sites,
            "inside": not self.excess,
            "advice": self.advice(),
            "excess": [site.to_json() for site in self.excess],
        }


def check_adapter(
    path: str | Path, adapter: str, data: str | Path, *, precision: QuantisedPrecision, images: int
) -> RangeCheck:
    """Run an adapter's images through the float32 graph and compare with the stored ranges.

    Args:
        path: a bundle that was calibrated in this precision.
        adapter: name in the bundle.
        data: a folder of its images: ``DIR/ADAPTER/...`` if there is one, else all of DIR.
        precision: whose calibration.
        images: at most this many, evenly spread over the folder.

    Raises:
        BundleError: not calibrated, no such adapter, a changed file.
        PlanError: the precision quantises no activations.
        DataError: no images.
    """
    bundle = Bundle.open(path)
    bundle.manifest.adapter(adapter)
    for package in ("onnx", "onnx_ir", "onnxruntime"):
        require(package, "calibrate", "checking ranges")

    from hhdeploy.calibration.probe import range_excess
    from hhdeploy.calibration.qdq import FORMATS, find_sites
    from hhdeploy.graph import open_graph

    findings_file, scales_file = calibration_files(precision)
    if not bundle.manifest.has(scales_file):
        raise BundleError(
            f"{path} holds no {precision} calibration to check against. Make one with: "
            + as_code(
                "calibrate",
                path,
                data="DIR",
                settings=as_code("CalibrationSettings", precision=precision),
            )
        )
    form = FORMATS[precision]
    if not form.activations:
        raise PlanError(
            f"{precision} quantises no activations: there are no ranges to leave, any adapter fits."
        )
    name = bundle.manifest.named(findings_file)
    findings = json_object(bundle.read(name), bundle.path / name)
    active = {name for name, info in findings["sites"].items() if info["quantised"]}
    scales = {
        n: s
        for n, s in read_scales(bundle.file(bundle.manifest.named(scales_file))).items()
        if n in active
    }
    graph = bundle.graph("float32")
    sites = find_sites(open_graph(graph).graph, bundle.manifest.backbone.classifier)
    files = spread(list_images(part_of(Path(data), adapter)).paths, images)
    excess = range_excess(
        graph,
        {name: site for name, site in sites.items() if name in active},
        scales,
        _feeds(Feeder(bundle), adapter, files),
        form,
    )
    return RangeCheck(adapter, precision, len(files), len(active), tuple(excess))


def _feeds(feeder: Feeder, adapter: str, files: list[Path]) -> Iterator[Feed]:
    transform = feeder.preprocess(adapter)
    for file in files:
        yield feeder.feed(adapter, transform(open_image(file)))
