"""Encoded pictures: three formats, within limits on what they cost."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hhdeploy.preprocess import Preprocess
from hhdeploy.runtime.serving.errors import FailedError, RequestError, TooLargeError
from hhdeploy.runtime.serving.pictures.images import load_picture, open_and_decode, open_picture

MOST = 10_000


def encoded(form: str, size: tuple[int, int] = (40, 30), **options) -> bytes:
    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it has that many pixels, whatever its data are."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def decode(content: bytes) -> Image.Image:
    return load_picture(open_picture(content, most_pixels=MOST, name="image 3"), name="image 3")


def refused(content: bytes, kind: type[RequestError] = RequestError) -> str:
    with pytest.raises(RequestError) as caught:
        decode(content)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith("image 3: ") and message.isprintable() and len(message) < 300
    return message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_on_its_side_is_preprocessed_upright(form):
    exif = Image.Exif()
    exif[0x112] = 8
    way = Preprocess((3, 31, 29), (0.5,) * 3, (0.25,) * 3)
    found = way(decode(encoded(form, exif=exif)))
    stored = way(decode(encoded(form)))
    assert np.array_equal(found, way(decode(encoded(form)).transpose(Image.Transpose.ROTATE_90)))
    assert np.abs(found - stored).max() > 0.1
    assert np.array_equal(replace(way, exif=False)(decode(encoded(form, exif=exif))), stored)


def test_a_picture_for_a_model_of_other_channels_is_refused_by_its_number():
    """Also where a process of its own decodes it, of which all else is the server's failure."""
    way = Preprocess((5, 31, 29), (0.5,) * 5, (0.25,) * 5)
    with pytest.raises(RequestError, match="image 3: the model takes 5 channels") as caught:
        open_and_decode(encoded("PNG"), MOST, "image 3", [way])
    assert caught.value.status == 400


def test_sixteen_bits_are_scaled():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint16) * 257).save(file, "PNG")
    assert np.array_equal(np.asarray(decode(file.getvalue()))[..., 1], levels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_formats(form):
    content = encoded(form)
    found = decode(content)
    with Image.open(io.BytesIO(content)) as opened:
        expected = opened.convert("RGB")
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "I;16"])
def test_modes_become_rgb(mode):
    file = io.BytesIO()
    Image.new(mode, (4, 3)).save(file, "PNG")
    assert decode(file.getvalue()).mode == "RGB"


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_other_decoders_are_not_asked(form):
    assert "expected an encoded JPEG, PNG, WEBP picture" in refused(encoded(form, (32, 32)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_pictures_are_refused(form):
    content = encoded(form)
    for length in (0, 1, 8, 20, len(content) // 2):
        refused(content[:length])
    refused(b"\0" + content)


@pytest.mark.parametrize("step", ["as_rgb", "Preprocess.__call__"])
def test_no_memory_is_no_fault_of_the_picture(monkeypatch, step):
    """It was a 400 without a reason, for which a client throws the picture away."""

    def used_up(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"hhdeploy.runtime.serving.pictures.images.{step}", used_up)
    way = Preprocess((3, 31, 29), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(FailedError, match=r"^image 3 could not .* memory is used up\. Try again"):
        open_and_decode(encoded("JPEG"), MOST, "image 3", [way])


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue", "lime")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(np.asarray(decode(file.getvalue())), np.asarray(frames[0]))


def test_pixels_are_counted_before_they_are_decoded():
    assert decode(encoded("PNG", (100, 100))).size == (100, 100)
    message = refused(encoded("PNG", (100, 101)), TooLargeError)
    assert message == "image 3: 100 x 101 pixels, at most 10000 are taken."
    # Pillow itself warns of the second one and refuses the others, by a limit that is none here.
    assert "5000 x 5000" in refused(png(5000, 5000), TooLargeError)
    assert "12000 x 12000" in refused(png(12_000, 12_000), TooLargeError)
    for side in (60_000, 2**31 - 1):
        message = refused(png(side, side), TooLargeError)
        assert message == f"image 3: {side} x {side} pixels, at most 10000 are taken."


def test_as_many_pixels_are_taken_as_the_server_is_told():
    """Also beyond Pillow's limit, which stays as it is for others."""
    limit = Image.MAX_IMAGE_PIXELS
    opened = open_picture(png(20_000, 20_000), most_pixels=400_000_000, name="image 3")
    assert opened.size == (20_000, 20_000)
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(RequestError):
        open_picture(b"none", most_pixels=1, name="image 3")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_text_chunks_do_not_swell():
    bomb = zlib.compress(bytes(80 << 20))
    assert len(bomb) < 1 << 17
    refused(png(10, 10, (b"zTXt", b"comment\0\0" + bomb)))


def test_lines_are_refused():
    """A line of 10 MB would be resized to one of 1 TB, the short side of which fits the model."""
    assert decode(encoded("PNG", (50, 1))).size == (50, 1)
    for size in ((51, 1), (1, 51), (2, 110)):
        assert "at most 50 times the other" in refused(encoded("PNG", size), TooLargeError)


def webp(chunks: bytes) -> bytes:
    """Of the extended format, which may have chunks that nobody knows."""
    size = bytes([39, 0, 0, 29, 0, 0])
    parts = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + encoded("WEBP", lossless=True)[12:]
    body = b"WEBP" + parts + chunks
    return b"RIFF" + struct.pack("<I", len(body)) + body


def of_parts(kind: str, number: int) -> bytes:
    """A picture with so many parts that say nothing."""
    jpeg, start, empty = encoded("JPEG"), b"\xff\xd8", b"\xff\xef\0\2"
    whole = encoded("PNG")
    pixels = whole.index(b"IDAT") - 4
    made = {
        "segments": start + number * empty + jpeg[2:],
        "segments behind an end": start + b"\xff\xd9" + number * empty + jpeg[2:],
        "bytes of none": start + empty + bytes(number) + jpeg[2:],
        "padding": start + number * b"\xff" + jpeg[2:],
        "chunks": whole[:pixels] + number * chunk(b"prVt") + whole[pixels:],
        "empty pixels": whole[:pixels] + number * chunk(b"IDAT") + whole[pixels:],
        "chunks behind": whole[:-12] + number * chunk(b"prVt") + whole[-12:],
        "chunks of WebP": webp(number * b"abcd\0\0\0\0"),
    }
    return made[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "segments", "segments behind an end", "bytes of none", "padding",
        "chunks", "empty pixels", "chunks behind", "chunks of WebP",
    ],
)  # fmt: skip
def test_pictures_of_many_parts_are_refused(kind):
    open_picture(of_parts(kind, 200), most_pixels=MOST, name="image 3")
    assert "few segments or chunks" in refused(of_parts(kind, 20_000), TooLargeError)


def test_a_large_picture_of_small_chunks_is_taken():
    rows = np.random.default_rng(1).integers(0, 256, (4000, 1501), np.uint8)
    rows[:, 0] = 0  # no filter
    data = zlib.compress(rows.tobytes(), 0)
    pixels = b"".join(chunk(b"IDAT", data[i : i + 4096]) for i in range(0, len(data), 4096))
    content = png(500, 4000)
    content = content[:33] + pixels + chunk(b"IEND")
    opened = open_picture(content, most_pixels=2_000_000, name="image 0")
    assert np.array_equal(load_picture(opened, name="image 0"), rows[:, 1:].reshape(4000, 500, 3))


def test_a_jpeg_of_a_thousand_scans_is_refused():
    """Each scan is decoded over all pixels: 1 MB of them would take minutes."""
    content = encoded("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    scan, end = content[last:-2], content[-2:]
    assert decode(content[:-2] + 20 * scan + end).size == (40, 30)
    assert "100 scans" in refused(content[:-2] + 1000 * scan + end, TooLargeError)


def test_threads_do_not_change_the_filters_of_warnings():
    before = list(warnings.filters)
    pictures = [encoded("PNG", (20 + n, 30)) for n in range(4)]

    def work(content: bytes) -> None:
        for _ in range(100):
            decode(content)

    threads = [threading.Thread(target=work, args=(content,)) for content in pictures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
