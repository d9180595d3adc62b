"""Any bytes give BadImage or a view of the right shape, in bounded memory."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sret_jax.data.views.images import BadImage, EvalTransform, decode, decode_crop
from sret_jax.data.views.training_view import TrainTransform
from tests.archives import encode, photographs
from tests.conftest import run_python

SIZE = 16
TRAIN = TrainTransform(SIZE, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, "rand-m9-mstd0.5-inc1", 0.3)
EVAL = EvalTransform(SIZE, 0.875)
PHOTO = photographs(1, seed=4)[0].resize((61, 47))
PALETTE, TURNED = PHOTO.convert("P"), PHOTO.rotate(90)


def turned_exif():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description stored elsewhere"
    return exif.tobytes()


def save(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


FILES = {
    **{f"JPEG {mode}": encode(PHOTO, "JPEG", mode) for mode in ("RGB", "L", "CMYK")},
    "JPEG progressive": save(PHOTO, "JPEG", progressive=True),
    "JPEG restarts": save(PHOTO, "JPEG", restart_marker_rows=1),
    "JPEG EXIF": save(PHOTO, "JPEG", exif=turned_exif()),
    "JPEG XMP": save(PHOTO, "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    "MPO": save(PHOTO, "MPO", save_all=True, append_images=[TURNED]),
    **{f"PNG {mode}": encode(PHOTO, "PNG", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA")},
    "PNG 16 bits": save(PHOTO.convert("L").convert("I;16"), "PNG"),
    "PNG palette with transparency": save(PALETTE, "PNG", transparency=bytes(range(256))),
    "PNG EXIF, profile": save(PHOTO, "PNG", exif=turned_exif(), icc_profile=bytes(300)),
    "APNG": save(PHOTO, "PNG", save_all=True, append_images=[TURNED.resize(PHOTO.size)]),
    "GIF": encode(PHOTO, "GIF", "P"),
    "GIF of two": save(PALETTE, "GIF", save_all=True, append_images=[TURNED], transparency=3),
    "WebP": encode(PHOTO, "WEBP"),
    "WebP lossless": save(PHOTO.convert("RGBA"), "WEBP", lossless=True),
    "WebP of two": save(PHOTO, "WEBP", save_all=True, append_images=[TURNED]),
    **{f"BMP {mode}": encode(PHOTO, "BMP", mode) for mode in ("RGB", "L", "P", "1")},
    "TIFF": encode(PHOTO, "TIFF"),
}
REFUSED = ("TIFF",)

PNG_START = b"\x89PNG\r\n\x1a\n"
LARGE = [b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\x00\x00\x40\x00"]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 63) | st.integers(0, 1 << 16),  # position; the beginning matters most
        st.integers(0, 20) | st.just(1 << 16),  # number of bytes removed
        st.binary(max_size=2) | st.sampled_from(LARGE),  # bytes inserted
        st.integers(0, 60),  # number of bytes repeated afterwards
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def damaged_files(draw):
    """A real image file, changed, cut or repeated at a few places; checksums may be corrected."""
    data = FILES[draw(st.sampled_from(list(FILES)))]
    for place, removed, put, repeated in draw(EDITS):
        place %= len(data) + 1
        data = data[:place] + put + data[place : place + repeated] + data[place + removed :]
    data = with_right_sums(data) if draw(st.booleans()) else data
    return data + draw(st.sampled_from([b"", b"\xff\xd9"]))


def chunk(kind, content):
    sum_ = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", sum_)


def with_right_sums(data):
    """Corrects the checksums of a PNG's chunks; returns other files unchanged."""
    if not data.startswith(PNG_START):
        return data
    chunks, rest = [PNG_START], data[len(PNG_START) :]
    while len(rest) >= 12:
        length = int.from_bytes(rest[:4], "big")
        chunks.append(chunk(rest[4:8], rest[8 : 8 + length]))
        rest = rest[12 + length :]
    return b"".join(chunks)


def views(data):
    """Yields (name, array) for each way to view the image; None for a bad image."""
    ways = {
        "decode": lambda: np.asarray(decode(data)),
        "part": lambda: decode_crop(data, lambda w, h: (w // 3, h // 4, w, h), SIZE),
        "train": lambda: TRAIN(data, np.random.default_rng(0)),
        "eval": lambda: EVAL(data),
    }
    for name, see in ways.items():
        try:
            yield name, see()
        except BadImage:
            yield name, None


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_a_bad_image(data):
    assert all(view is None for _, view in views(data))


@given(damaged_files())
def test_damaged_bytes_are_a_bad_image_or_have_views_of_the_right_shape(data):
    for name, view in views(data):
        if view is not None:
            assert view.dtype == np.uint8 and view.ndim == 3 and view.shape[2] == 3 and view.size
            assert name in ("decode", "part") or view.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("name", FILES)
def test_a_format_of_the_list_has_every_view_and_another_none(name):
    assert [view is None for _, view in views(FILES[name])] == [name in REFUSED] * 4


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def test_a_header_that_only_one_decoder_reads_is_a_bad_image():
    jpeg = FILES["JPEG RGB"]
    header = segment(0xE0, b"JFIF") + segment(0xE1, turned_exif())
    with pytest.raises(BadImage, match="no readable JPEG"):
        TRAIN(jpeg[:2] + header + jpeg[20:], np.random.default_rng(0))


def test_a_filled_header_with_a_false_frame_behind_it_decodes_whole():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    jpeg = save(Image.fromarray(pixels), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    filled = jpeg[:frame] + b"\xff" + jpeg[frame:]
    behind = frame + 2 + int.from_bytes(filled[frame + 2 : frame + 4], "big")
    data = filled + bytes(behind - len(filled)) + b"\xff\xc0\0\0\xff\xd9"
    part = decode_crop(data, lambda w, h: (0, 0, 100, 60), 100)
    np.testing.assert_array_equal(part, np.asarray(decode(jpeg))[:60, :100])


def deflated_zeros(count):
    compressor, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [compressor.compress(block[: count - start]) for start in range(0, count, len(block))]
    return b"".join(parts) + compressor.flush()


def png(side, *chunks, bits=8):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0))
    return b"".join([PNG_START, header, *chunks, chunk(b"IEND", b"")])


def plain_png(*chunks):
    return png(8, *chunks, chunk(b"IDAT", deflated_zeros(72)))


def webp(side):
    """A lossless WebP of one colour: five Huffman codes of one symbol each, no bits per pixel."""
    fields = [(side - 1, 14), (side - 1, 14), (0, 4), (0, 3), *[(1, 4)] * 5]
    bits = "".join(f"{value:0{width}b}"[::-1] for value, width in fields)
    content = b"\x2f" + int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
    content = b"VP8L" + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


def tiff(side, tile):
    """A TIFF with one tile whose sides are far larger than the image's."""
    data = deflated_zeros(1 << 28)
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile)]
    tags += [(323, tile), (324, 8 + 2 + 12 * 10 + 4), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


EIGHT = Image.new("RGB", (8, 8))
SIDE = struct.pack("<H", 60_000)
TOO_MANY = r"exceeds limit of 178956970 pixels"
BOMBS = {
    "PNG": (lambda: png(30_000, chunk(b"IDAT", deflated_zeros(30_000 * 3751)), bits=1), TOO_MANY),
    "PNG text": (
        lambda: plain_png(chunk(b"zTXt", b"k\0\0" + deflated_zeros(1 << 28))),
        "too large",
    ),
    "PNG texts": (
        lambda: plain_png(*[chunk(b"zTXt", b"k\0\0" + deflated_zeros(1_000_000))] * 100),
        "Too much memory used in text chunks",
    ),
    "PNG profile": (
        lambda: plain_png(chunk(b"iCCP", b"k\0\0" + deflated_zeros(1 << 28))),
        "too large",
    ),
    "PNG surplus": (lambda: png(8, chunk(b"IDAT", deflated_zeros(1 << 28))), None),
    "GIF": (lambda: encode(EIGHT, "GIF", "P").replace(b"\x08\0\x08\0", SIDE * 2), TOO_MANY),
    "GIF frame": (
        lambda: encode(EIGHT, "GIF", "P")[::-1].replace(b"\0\x08\0\x08", SIDE[::-1] * 2, 1)[::-1],
        TOO_MANY,
    ),
    "WebP": (lambda: webp(16_384), TOO_MANY),
    "BMP": (
        lambda: encode(EIGHT, "BMP").replace(
            struct.pack("<ii", 8, 8), struct.pack("<ii", 60_000, 60_000)
        ),
        TOO_MANY,
    ),
    "JPEG": (
        lambda: encode(EIGHT).replace(b"\x08\0\x08\0\x08\x03", b"\x08\xea\x60\xea\x60\x03"),
        TOO_MANY,
    ),
    "TIFF tile": (lambda: tiff(8, 20_000), "no readable JPEG, PNG, GIF, WEBP, BMP"),
    "PPM": (lambda: b"P6 60000 60000 255\n" + bytes(99), "no readable JPEG"),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no readable"),
}
DECODE_ALL = """
import pathlib, resource, sys
import numpy as np
from sret_jax.data.views.images import BadImage, EvalTransform
from sret_jax.data.views.training_view import TrainTransform

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
views = [EvalTransform(16, 0.875), TrainTransform(16, (0.08, 1.0), (0.75, 1.34))]
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    before = peak()
    for view in views:
        try:
            view(data, np.random.default_rng(0))
            reason = "decoded"
        except BadImage as e:
            reason = str(e)
        print(path.name, peak() - before, reason, sep=":")
"""


def test_a_decompression_bomb_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "0").write_bytes(b"no image")  # warms up
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    done = run_python("-c", DECODE_ALL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line.split(":", 2) for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {"0", *BOMBS}
    for name, megabytes, reason in lines[2:]:
        assert int(megabytes) < 80, (name, megabytes)
        assert (BOMBS[name][1] or "decoded") in reason, (name, reason)
