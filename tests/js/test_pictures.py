"""Pictures that browsers show otherwise than Python reads them: it is the same, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError, features

from hhdeploy.preprocess import as_rgb, upright
from tests.browser import CHROMIUM, PATIENCE_MS, WHY_NOT
from tests.js.test_orientation import WAYS, block, png_chunk, said_again, saved

# Pillow says so of files that are damaged on purpose, when it looks for their resolution.
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:(Corrupt|Possibly corrupt) EXIF data"),
    # And of colours that are transparent, which are kept on purpose.
    pytest.mark.filterwarnings("ignore:Palette images with Transparency"),
]
PAGE = """<!doctype html><script type="module">
import { decodePicture, HhdeployError } from "./dist/index.js";
import { upright } from "./dist/orientation.js";
const plain = ({ data, width, height }) => ({ data: Array.from(data), width, height });
window.read = async (name) => {
  try {
    const picture = await decodePicture(await (await fetch(name)).blob());
    return { stored: plain(picture), upright: plain(upright(picture)) };
  } catch (error) {
    if (!(error instanceof HhdeployError)) throw error;
    return { error: error.message };
  }
};
</script>"""
SIDE = 40
avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow has no AVIF here")


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (level, 0, 255 - level))


def animated(kind: str, **options) -> bytes:
    out = io.BytesIO()
    flat(200).save(out, kind, save_all=True, append_images=[flat(90), flat(10)], **options)
    return out.getvalue()


def indexed(depth: int, colours: int) -> bytes:
    """A PNG with all indices of its depth, and fewer colours."""
    rng = np.random.default_rng(depth)
    values = rng.integers(0, 2**depth, (8, 8))
    bits = "".join(f"{0:08b}" + "".join(f"{value:0{depth}b}" for value in row) for row in values)
    lines = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", 8, 8, depth, 3, 0, 0, 0)
    palette = rng.integers(1, 256, 3 * colours, np.uint8).tobytes()
    chunks = {b"IHDR": header, b"PLTE": palette, b"IDAT": zlib.compress(lines), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(k, v) for k, v in chunks.items())


def odd() -> dict[str, bytes]:
    made = said_again()
    made |= {f"depth {d}": indexed(d, max(1, 2**d - 3)) for d in (1, 2, 4, 8)}
    made |= {f"whole depth {d}": indexed(d, 2**d) for d in (1, 2, 4, 8)}
    made["long palette"] = indexed(2, 7)
    made["apng"] = animated("PNG")
    made["apng with another picture"] = animated("PNG", default_image=True)
    made["gif"] = animated("GIF")
    made["webp"] = animated("WEBP", lossless=True)
    made["line"] = long_line(40_000)
    made |= gifs()
    made["clear grey"] = clear_png(0, b"\0\5")
    made["clear colour"] = clear_png(2, b"\0\6\0\7\0\x08")
    made |= deep_greys() | clear_colours() | careless()
    made["clear indices"] = clear_png(3, bytes([0, 128, 255, 9]), bytes(range(7, 7 + 48)))
    return made


def deep_greys() -> dict[str, bytes]:
    """PNGs of 16 bits of grey, of every filter, interlaced and not."""
    return rewritten("grey", np.dtype(">u2"), 0, 1)


def clear_colours() -> dict[str, bytes]:
    """PNGs with transparency, of which Python sees the colours as they are stored."""
    made = {}
    for dtype in (np.dtype("u1"), np.dtype(">u2")):
        made |= rewritten("clear grey", dtype, 4, 2) | rewritten("clear colour", dtype, 6, 4)
    return made


def rewritten(name: str, dtype: np.dtype, kind: int, levels_each: int) -> dict[str, bytes]:
    rng = np.random.default_rng(16)
    made = {}
    bits = 8 * dtype.itemsize
    for width, height in ((11, 13), (3, 2), (1, 1)):
        levels = rng.integers(0, 2**bits, (height, width, levels_each)).astype(dtype)
        sides = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4))
        sides += ((1, 0, 2, 2), (0, 1, 1, 2))
        passes = [levels[y::down, x::right] for x, y, right, down in sides]
        lines = b"".join(filtered(each) for each in passes if each.size)
        named = f"{name} of {bits} bits"
        made[f"{named} in passes {width}"] = deep(width, height, lines, 1, bits, kind)
        made[f"{named} {width}"] = deep(width, height, filtered(levels), 0, bits, kind)
    return made


def deep(
    width: int, height: int, lines: bytes, passes: int, bits: int = 16, kind: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, passes)
    packed = zlib.compress(lines)
    chunks = [(b"IHDR", header)] + ([] if kind else [(b"tRNS", lines[1:3])])
    chunks += [(b"IDAT", packed[:9]), (b"IDAT", packed[9:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def filtered(levels: np.ndarray) -> bytes:
    """Rows as a PNG has them, the five filters in turn; ``levels``: [height, width, each]."""
    rows = np.ascontiguousarray(levels).view(np.uint8).reshape(len(levels), -1).astype(int)
    each = levels.shape[2] * levels.itemsize
    padded = np.pad(rows, ((1, 0), (each, 0)))
    left, above, both = padded[1:, :-each], padded[:-1, each:], padded[:-1, :-each]
    guess = left + above - both
    away = np.abs(np.stack([guess - left, guess - above, guess - both]))
    paeth = np.choose(away.argmin(0), [left, above, both])
    told = [np.zeros_like(rows), left, above, (left + above) // 2, paeth]
    kinds = np.arange(len(rows)) % 5
    lines = [bytes([k, *((rows[y] - told[k][y]) % 256)]) for y, k in enumerate(kinds)]
    return b"".join(lines)


def careless() -> dict[str, bytes]:
    """PNGs of which Python reads all pixels, and browsers none."""
    good = indexed(4, 16)
    place = good.index(b"IEND") - 4
    return {
        "wrong checksum of the pixels": good[: place - 1]
        + bytes([good[place - 1] ^ 1])
        + good[place:],
        "no end": good[:place],
    }


def gifs() -> dict[str, bytes]:
    """One whose colours are transparent, and one without a table of colours."""
    indices = Image.fromarray((np.arange(64, dtype=np.uint8) % 8).reshape(8, 8))
    table = np.random.default_rng(5).integers(0, 256, 24, np.uint8).tobytes()
    coloured = indices.copy()
    coloured.putpalette(table)
    out = io.BytesIO()
    coloured.save(out, "GIF", transparency=3, comment=b"a" * 300, optimize=False)
    clear = out.getvalue()
    size = 6 << (clear[10] & 7)
    bare = clear[:10] + bytes([clear[10] & 0x7F]) + clear[11:13] + clear[13 + size :]
    return {"clear gif": clear, "gif without colours": bare}


def clear_png(kind: int, clear: bytes, palette: bytes = b"") -> bytes:
    """Of the colours of a kind some, which are there, count as transparent."""
    each = {0: 1, 2: 3, 3: 1}[kind]
    lines = b"".join(b"\0" + bytes(range(y * each, (y + 8) * each)) for y in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 8, kind, 0, 0, 0)
    chunks = {b"IHDR": header, **({b"PLTE": palette} if palette else {}), b"tRNS": clear}
    chunks |= {b"IDAT": zlib.compress(lines), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(k, v) for k, v in chunks.items())


def runs() -> bytes:
    """A BMP of runs of pixels, the first of which ends before its row does."""
    data = bytes([4, 200, 0, 0, 8, 100, 0, 1])
    palette = b"".join(bytes([i, 255 - i, i // 2, 0]) for i in range(256))
    sizes = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + len(sizes) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + sizes + palette + data


def long_line(width: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, 2), (200, 30, 90)).save(out, "PNG")
    return out.getvalue()


def turned_avifs() -> dict[str, bytes]:
    """Turned as EXIF says, and in all ways of which the file's header knows."""
    options = {"quality": 100, "subsampling": "4:4:4"}
    made = {f"avif {way}": saved("avif", exif=block(way), **options) for way in WAYS}
    mirrored = made["avif 5"]
    turn, mirror = mirrored.index(b"irot") + 4, mirrored.index(b"imir") + 4
    for quarters in range(4):
        for axis in range(2):
            file = bytearray(mirrored)
            file[turn], file[mirror] = quarters, axis
            made[f"avif turned {quarters}, mirrored {axis}"] = bytes(file)
    made["avif mif1"] = made["avif 6"].replace(b"ftypavif", b"ftypmif1")
    return made


@pytest.fixture
def read(browser, dist, served, tmp_path):
    """Lets a browser decode files: name -> what it finds."""
    (tmp_path / "dist").symlink_to(dist)
    (tmp_path / "index.html").write_text(PAGE)
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served(tmp_path))
        page.wait_for_function("window.read !== undefined", timeout=PATIENCE_MS)

        def found(files: dict[str, bytes]):
            for number, (name, file) in enumerate(files.items()):
                Path(tmp_path / f"{number}.bin").write_bytes(file)
                yield name, file, page.evaluate("(name) => read(name)", f"{number}.bin")

        yield found


def pixels(seen: dict) -> np.ndarray:
    return np.asarray(seen["data"], np.uint8).reshape(seen["height"], seen["width"], -1)[..., :3]


def assert_as_python(name: str, file: bytes, seen: dict) -> None:
    assert "error" not in seen, (name, seen)
    with Image.open(io.BytesIO(file)) as opened:
        for way, picture in (("upright", upright(opened)), ("stored", opened)):
            right = np.asarray(as_rgb(picture))
            assert np.array_equal(pixels(seen[way]), right), (name, way)


def test_a_browser_sees_what_python_reads(read):
    for name, file, seen in read(odd()):
        assert_as_python(name, file, seen)


@avif
def test_an_avif_comes_as_it_is_stored(read):
    for name, file, seen in read(turned_avifs()):
        assert_as_python(name, file, seen)


@avif
def test_what_browsers_show_otherwise_is_refused(read):
    twice = turned_avifs()["avif 5"].replace(b"imir", b"irot")
    files = {"animated": animated("AVIF"), "twice": twice}
    words = {"animated": "found an animated AVIF", "twice": "how it is turned, found 2 times"}
    for name, _, seen in read(files):
        assert words[name] in seen["error"]


@pytest.mark.parametrize("key", [b"tEXt", b"pHYs", b"PLTE"])
def test_a_png_of_a_wrong_checksum_is_refused(read, key):
    """As Python refuses it; behind the pixels nobody looks."""
    content = {b"tEXt": b"a\0b", b"pHYs": struct.pack(">IIB", 1, 1, 1), b"PLTE": bytes(12)}[key]
    good = indexed(2, 4)
    place = good.index(b"IDAT") - 4
    chunk = png_chunk(key, content)
    wrong = chunk[:-1] + bytes([chunk[-1] ^ 1])
    behind = good[:-12] + wrong + good[-12:]
    if key == b"PLTE":
        place, behind = good.index(b"PLTE") - 4, good
    files = {"wrong": good[:place] + wrong + good[place:], "behind": behind}
    found = {name: (file, seen) for name, file, seen in read(files)}
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(files["wrong"]))
    assert f"found one whose {key.decode()} has another checksum" in found["wrong"][1]["error"]
    assert_as_python("behind", *found["behind"])


def test_runs_of_pixels_are_refused(read):
    ((_, _, seen),) = read({"runs": runs()})
    assert "found one of runs (RLE). Save it as a PNG" in seen["error"]


def test_a_bmp_of_16_bits_is_refused(read):
    """A browser's levels are one off."""
    sizes = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 0, 128, 0, 0, 0, 0)
    file = b"BM" + struct.pack("<IHHI", 54 + 128, 0, 0, 54) + sizes + bytes(range(128))
    ((_, _, seen),) = read({"shallow": file})
    assert "found one of 16 bits a pixel. Save it as a PNG" in seen["error"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_gif_that_its_first_picture_does_not_fill_is_refused(read, kept):
    """What it leaves out is black there, and the first of its colours to Python."""
    good = gifs()["clear gif"]
    frame = good.index(b"," + struct.pack("<HHHH", 0, 0, 8, 8)) + 1
    larger = good[:6] + struct.pack("<HH", 12, 11) + good[10:]
    moved = larger[:frame] + struct.pack("<HH", 2, 1) + larger[frame + 4 :]
    ((_, _, seen),) = read({"file": larger if kept else moved})
    place = "(0, 0)" if kept else "(2, 1)"
    assert f"found 12 x 11 pixels with one of 8 x 8 at {place}. Save it as a" in seen["error"]


def test_damaged_pixels_of_16_bits_of_grey_are_refused(read):
    rows = filtered(np.arange(64, dtype=">u2").reshape(8, 8, 1))
    good, cut = deep(8, 8, rows, 0), deep(8, 8, rows[:-5], 0)
    at = good.index(b"IEND") - 10  # zlib's own checksum
    for _, _, seen in read({"cut": cut, "sum": good[:at] + b"\0" + good[at + 1 :]}):
        assert "found one whose pixels are damaged. Save it again" in seen["error"]


def test_a_bit_of_a_pixel_that_changed_is_refused(read):
    """Python finds it by zlib's checksum; of the PNG's own it does not ask, nor do browsers."""
    out = io.BytesIO()
    flat(200).save(out, "PNG", compress_level=0)  # pixels as they are
    file = bytearray(out.getvalue())
    file[len(file) // 2] ^= 1
    with pytest.raises(OSError, match="broken data stream"):
        Image.open(io.BytesIO(file)).load()
    ((_, _, seen),) = read({"bit": bytes(file)})
    assert "found one whose pixels are damaged. Save it again" in seen["error"]


def test_what_is_no_picture_is_an_error_of_the_package(read):
    for _, _, seen in read({"none": b"none", "empty": b"", "cut": gifs()["clear gif"][:-9]}):
        assert "expected a picture that this browser can read, found none" in seen["error"]


def test_a_canvas_that_stays_empty_is_no_black_picture(read):
    ((_, _, seen),) = read({"line": long_line(70_000)})
    assert "this browser's canvas holds, found 70000 x 2 pixels" in seen["error"]
