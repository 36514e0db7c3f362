"""Which side of a picture is up: JavaScript reads a file as Python does, and turns it alike."""

from __future__ import annotations

import base64
import io
import itertools
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.preprocess import Preprocess, upright
from tests.js.conftest import decoded, sent

# Pillow says so of files that are damaged on purpose, when it looks for their resolution.
pytestmark = pytest.mark.filterwarnings("ignore:(Corrupt|Possibly corrupt) EXIF data")
WAYS = range(1, 9)
FORMATS = ("jpeg", "png", "webp")


def block(way: int, order: str = "<", width: str = "H") -> bytes:
    """EXIF with an orientation behind another tag."""
    tags = struct.pack(f"{order}HHI4s", 271, 2, 2, b"a\0")
    kind, padding = {"H": (3, 2), "I": (4, 0)}[width]
    tags += struct.pack(f"{order}HHI{width}", 274, kind, 1, way) + b"\0" * padding
    start = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, 2)
    return b"Exif\0\0" + start + tags + b"\0" * 4


def xmp(way: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><x tiff:Orientation="%d"/></x:xmpmeta>' % way


def profile(way: int) -> str:
    """As ImageMagick writes it."""
    digits = block(way).hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\nexif\n{len(digits) // 2:8}\n{lines}\n"


def saved(kind: str, **options) -> bytes:
    rng = np.random.default_rng(5)
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_text(name: str, text: str, zipped: bool = False) -> bytes:
    info = PngInfo()
    info.add_text(name, text, zip=zipped)
    return saved("png", pnginfo=info)


def with_xmp() -> bytes:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(6).decode())
    return saved("png", pnginfo=info)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def with_parts(kind: str, *parts: bytes) -> bytes:
    """Segments behind the beginning of a JPEG, or chunks behind a PNG's header."""
    plain, at = saved(kind), {"jpeg": 2, "png": 33}[kind]
    return plain[:at] + b"".join(parts) + plain[at:]


def segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def said_again() -> dict[str, bytes]:
    """Files that tell their orientation more than once, in pieces, or where nobody looks."""
    mark, six, three = b"Exif\0\0", block(6), block(3)
    in_xmp = [segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp(way)) for way in (6, 3)]
    in_text = [png_chunk(b"tEXt", b"XML:com.adobe.xmp\0" + xmp(6)),
               png_chunk(b"tEXt", b"xmp\0" + xmp(3)),
               png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(8))]  # fmt: skip
    profiles = [
        png_chunk(b"tEXt", b"Raw profile type exif\0" + profile(way).encode()) for way in (6, 3)
    ]
    webp = saved("webp", exif=six, xmp=xmp(8))
    flags, chunk = webp.index(b"VP8X") + 8, webp.index(b"EXIF")
    made = {
        "in two": with_parts("jpeg", segment(six[:20]), segment(mark + six[20:])),
        "in three": with_parts(
            "jpeg", segment(six[:9]), segment(mark + six[9:30]), segment(mark + six[30:])
        ),
        "empty before": with_parts("jpeg", segment(mark), segment(six)),
        "nonsense before": with_parts("jpeg", segment(mark + b"none"), segment(six)),
        "twice": with_parts("jpeg", segment(six), segment(three)),
        "marked twice": with_parts("jpeg", segment(mark + six)),
        "behind a restart": with_parts("jpeg", b"\xff\xd0", segment(six)),
        "behind what is padded": with_parts("jpeg", b"\xff\xff", segment(six)),
        "marked otherwise": with_parts("jpeg", segment(b"Exif\0\xff" + six[6:])),
        "xmp twice": with_parts("jpeg", *in_xmp),
        "chunks": with_parts("png", png_chunk(b"eXIf", six[6:]), png_chunk(b"eXIf", three[6:])),
        "a marked chunk": with_parts("png", png_chunk(b"eXIf", six)),
        "profiles": with_parts("png", *profiles),
        "a profile and a chunk": with_parts("png", *profiles, png_chunk(b"eXIf", block(5)[6:])),
        "webp twice": longer_webp(webp, b"EXIF" + struct.pack("<I", len(three)) + three),
        "webp without flags": webp[:flags] + b"\0" + webp[flags + 1 :],
        "webp with a flag": webp[:flags] + b"\4" + webp[flags + 1 :],
        "behind the webp": webp[:4] + struct.pack("<I", chunk - 8) + webp[8:],
    }
    for order in itertools.permutations(range(3)):
        made[f"texts {order}"] = with_parts("png", *(in_text[i] for i in order))
    return made


def longer_webp(webp: bytes, chunk: bytes) -> bytes:
    content = webp[8:] + chunk
    return b"RIFF" + struct.pack("<I", len(content)) + content


def files() -> dict[str, bytes]:
    made = {f"{kind} {way}": saved(kind, exif=block(way)) for kind in FORMATS for way in WAYS}
    for kind in FORMATS:
        made |= {
            f"{kind} MM": saved(kind, exif=block(6, ">")),
            f"{kind} long": saved(kind, exif=block(8, "<", "I")),
            f"{kind} MM long": saved(kind, exif=block(5, ">", "I")),
            f"{kind} nothing": saved(kind),
            f"{kind} cut": saved(kind, exif=block(6)[:-14]),
            f"{kind} nonsense": saved(kind, exif=b"Exif\0\0nonsense"),
            f"{kind} far": saved(kind, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
            f"{kind} out of range": saved(kind, exif=block(9)),
        }
    for kind in ("jpeg", "webp"):
        made[f"{kind} xmp"] = saved(kind, xmp=xmp(6))
        made[f"{kind} both"] = saved(kind, exif=block(3), xmp=xmp(6))
    made["png xmp"] = with_xmp()
    made["png text"] = with_text("Raw profile type exif", profile(6))
    made["png zipped"] = with_text("Raw profile type exif", profile(8), zipped=True)
    for key, text in (
        ("Raw profile type exif", profile(8)),
        ("XML:com.adobe.xmp", xmp(6).decode()),
    ):
        for zipped in (False, True):
            info = PngInfo()
            info.add_itxt(key, text, "en", "said", zip=zipped)
            made[f"png {key} {zipped}"] = saved("PNG", pnginfo=info)
            made[f"png text {key} {zipped}"] = with_text(key, text, zipped)
    made["png other text"] = with_text("Comment", profile(6))
    return made | said_again()


def asked(file: bytes) -> dict[str, object]:
    with Image.open(io.BytesIO(file)) as opened:
        (picture,) = sent([opened.convert("RGB")])
    return {"file": base64.b64encode(file).decode(), "picture": picture}


@pytest.fixture(scope="module")
def answered(ask):
    """The files, and what JavaScript makes of each."""
    made = files()
    (found,) = ask({"ask": "upright", "cases": {name: asked(file) for name, file in made.items()}})
    return made, found


def test_javascript_reads_and_turns_as_python_does(answered):
    made, found = answered
    turned = 0
    for name, file in made.items():
        with Image.open(io.BytesIO(file)) as opened:
            right = np.asarray(upright(opened).convert("RGB"))
            stored = np.asarray(opened.convert("RGB"))
        pixels = np.frombuffer(base64.b64decode(found[name]["data"]), np.uint8)
        height, width = found[name]["height"], found[name]["width"]
        assert np.array_equal(pixels.reshape(height, width, 3), right), name
        back = np.frombuffer(base64.b64decode(found[name]["back"]), np.uint8)
        assert np.array_equal(back.reshape(stored.shape), stored), name
        turned += not np.array_equal(right, stored)
    assert turned >= 7 * len(FORMATS) + 8


def test_a_browser_has_nothing_left_to_turn_by(answered):
    made, found = answered
    for name, file in made.items():
        with (
            Image.open(io.BytesIO(file)) as opened,
            Image.open(io.BytesIO(base64.b64decode(found[name]["plain"]))) as plain,
        ):
            assert plain.format == opened.format
            assert np.array_equal(plain, opened), name
            left = plain.info.get("exif", b"").removeprefix(b"Exif\0\0")
            assert left[:4] not in (b"II*\0", b"MM\0*"), name  # what begins so is EXIF


@pytest.mark.parametrize("exif", [True, False])
def test_an_adapter_says_itself_whether_it_sees_pictures_upright(
    ask, small, workshop, tmp_path, exif
):
    rival = load_adapter(workshop.directory("rival"))
    transform = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, exif=exif)
    own = replace(rival, config=replace(rival.config, preprocess=transform))
    save_adapter(own, tmp_path / "own")
    rng = np.random.default_rng(3)
    stored = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    (picture,) = sent([stored])
    question = {"where": str(small), "added": {"own": str(tmp_path / "own")}, "adapters": ["own"]}
    ((image,),) = ask({"ask": "images", **question, "pictures": [{**picture, "orientation": 6}]})
    seen = stored.transpose(Image.Transpose.ROTATE_270) if exif else stored
    right = transform(seen)
    assert not np.array_equal(transform(stored), transform(stored.rotate(-90)))
    assert np.abs(decoded(image, *right.shape) - right).max() <= 2 / 255
