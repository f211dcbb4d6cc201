"""Whatever a path leads to, every reader reads it or refuses it in one line that says what it is and what to give."""

from __future__ import annotations

import io
import os
import re
import socket
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ijepa_scale import terminal
from ijepa_scale.config.data import DataConfig
from ijepa_scale.data.sources.mistaken import TAR, TEXT, mistaken, what_is
from ijepa_scale.data.sources.open import build_source, reader_of, training_source
from ijepa_scale.errors import DataError, UserError

READERS = ("shards", "stream", "imagefolder", "list")


def image(form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, form)
    return buffer.getvalue()


def tar_of(name: str, content: bytes, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def folders(path: Path) -> None:
    (path / "a" / "b").mkdir(parents=True)


def special(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


Make = Callable[[Path], object]
# The name of a thing, how it is made, and what all its refusals say of it.
THINGS: dict[str, tuple[Make, str]] = {
    "notes.md": (lambda path: path.write_text("some words\nand more\n"), "a text file"),
    "run.yaml": (lambda path: path.write_text("data: {train: photos}\n"), "a text file"),
    "words": (lambda path: path.write_text("hello " * 500), "a text file"),
    "umlauts.rst": (lambda path: path.write_text("ü" * 300), "a text file"),
    "photo.jpg": (lambda path: path.write_bytes(image("JPEG")), "one image"),
    "photo": (lambda path: path.write_bytes(image("WEBP")), "one image"),
    "photos.bmp": (lambda path: path.write_bytes(image("BMP")), "one image"),
    "photos.zip": (lambda path: path.write_bytes(zip_of("a.png", image())), "zip"),
    "photos.parquet": (lambda path: path.write_bytes(b"PAR1\x15\0" + bytes(60) + b"PAR1"), "arquet"),
    "photos.tar.gz": (lambda path: path.write_bytes(tar_of("a.png", image(), "w:gz")), "a gzip file"),
    "photos.tar.bz2": (lambda path: path.write_bytes(tar_of("a.png", image() * 20, "w:bz2")), "a bzip2 file"),
    "photos.tar.xz": (lambda path: path.write_bytes(tar_of("a.png", image(), "w:xz")), "an xz file"),
    "weights.pth": (lambda path: path.write_bytes(zip_of("data.pkl", b"")), "a zip archive"),
    "noise.bin": (lambda path: path.write_bytes(bytes(range(256)) * 8), "noise.bin"),
    "empty": (Path.touch, "empty|names no images"),
    "empty.tar": (Path.touch, "empty|names no images"),
    "garbage.tar": (lambda path: path.write_bytes(b"\xfe\0garbage" * 200), "garbage.tar"),
    "text.tar": (lambda path: path.write_text("text " * 500), "a text file"),
    "no-image.tar": (lambda path: path.write_bytes(tar_of("a.txt", b"abc")), "no image|a tar, not"),
    "cut.tar": (lambda path: path.write_bytes(tar_of("a.png", image())[:540]), "cut short|a tar, not"),
    "pipe": (os.mkfifo, "a pipe"),
    "pipe.tar": (os.mkfifo, "a pipe|regular file"),
    "socket": (special, "a socket"),
    "/dev/null": (lambda path: None, "a device"),
    "folder": (Path.mkdir, "folder"),
    "folders": (folders, "folder"),
    "nowhere": (lambda path: path.symlink_to("missing"), "nowhere"),
    "itself": (lambda path: path.symlink_to("itself"), "itself"),
    "missing": (lambda path: None, "missing"),
    "missing.tar": (lambda path: None, "missing"),
    "m*.tar": (lambda path: None, "."),
    "unreadable.tar": (lambda path: path.write_bytes(tar_of("a.png", image())), "unreadable"),
    "unreadable": (Path.mkdir, "unreadable"),
}
# What isn't refused when it is named, but when it is read.
LATER = {("no-image.tar", "stream"), ("cut.tar", "stream")}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with all the things, which a user without rights may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for thing, (make, _) in THINGS.items():
            make(folder / thing)
        for thing in ("unreadable.tar", "unreadable"):
            (folder / thing).chmod(0)
        yield folder
        (folder / "unreadable").chmod(stat.S_IRWXU)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Takes root's right to read everything away for a test."""
    "".encode("utf-8-sig")  # codecs that are imported later might not be found
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def refused(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Returns the line that a command would print about an error, which ends with code 2; None without an error."""

    @terminal.command
    def main(arguments: list[str] | None = None) -> int:
        call()
        return 0

    capsys.readouterr()
    code = main([])
    text = capsys.readouterr().err
    assert code in (0, 2) and text.count("\n") == (code == 2), text
    return text.removesuffix("\n") if code else None


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("thing", list(THINGS))
def test_training_images_that_are_something_else(
    thing: str, reader: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / thing
    data = DataConfig(reader=reader, train=str(path), batch_size=1)
    line = refused(lambda: training_source(data, (8, 8)), capsys)
    if (thing, reader) in LATER:
        assert line is None
        return
    assert line is not None
    said, _, remedy = line.rpartition("; ")
    assert str(path) in said and remedy, line
    assert re.search(THINGS[thing][1], said.replace(str(place), "")), line
    assert re.search(r"\b(give|name|set|write|save|fix|check|copy|unpack|drop|remove)\b", remedy), line


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("thing", list(THINGS))
def test_images_of_which_no_reader_is_named(thing: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(place / thing)
    line = refused(lambda: build_source(reader_of(path), path), capsys)
    assert line is not None and path in line and "; " in line


def test_the_reader_that_a_refusal_names_reads_it(tmp_path: Path) -> None:
    """What a remedy says is tried: set the reader to what it names, or give the folder that it names."""
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "list").write_text("a.png\n")
    (tmp_path / "shard.tar").write_bytes(tar_of("a.png", image()))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(image())
    for thing, wrong in (("a.png", "shards"), ("list", "imagefolder"), ("list", "stream"), ("shard.tar", "list"),
                         ("shard.tar", "imagefolder"), ("photos", "list")):  # fmt: skip
        path = tmp_path / thing
        with pytest.raises(UserError) as caught:
            training_source(DataConfig(reader=wrong, train=str(path), batch_size=1), (8, 8))
        named = re.search(r"set the reader to (\w+)", str(caught.value))
        assert named, caught.value
        given = tmp_path / "photos" if "give the folder that it is in" in str(caught.value) else path
        source = training_source(DataConfig(reader=named[1], train=str(given), batch_size=1), (8, 8))
        assert source.num_samples == 1


@given(st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=80), min_size=1))
def test_a_list_is_never_taken_for_something_else(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.mktemp("list") / "list"
    path.write_bytes("\n".join(names).encode())
    assert what_is(path) == TEXT and mistaken(path, "list") is None


@given(
    st.sampled_from(["BM", "PAR1", "GIF8", "BZh", "Rar!"]), st.binary(max_size=40).filter(lambda each: 0 not in each)
)
def test_a_list_of_bytes_may_begin_like_another_file(
    tmp_path_factory: pytest.TempPathFactory, begin: str, rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("list") / "list"
    path.write_bytes(begin.encode() + b"/" + rest)
    assert mistaken(path, "list") is None


def test_a_list_whose_first_files_are_missing_is_one(tmp_path: Path) -> None:
    """As of DICOM files, whose names have no suffix: a missing one is a bad sample."""
    names = [f"IM{number:04}" for number in range(5)]
    (tmp_path / "list").write_text("\n".join(names))
    with pytest.raises(DataError, match="is a text file, not a list of images"):
        training_source(DataConfig(reader="list", train=str(tmp_path / "list"), batch_size=1), (8, 8))
    (tmp_path / names[3]).write_bytes(b"")
    assert (
        training_source(DataConfig(reader="list", train=str(tmp_path / "list"), batch_size=1), (8, 8)).num_samples == 5
    )


def test_tars_of_every_format_are_tars(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo("ü" * 40))
        assert what_is(tmp_path / "a.tar") == TAR
    header = bytearray((tmp_path / "a.tar").read_bytes()[:512])
    header[257:265] = bytes(8)  # as before 1988
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    (tmp_path / "old").write_bytes(header)
    assert what_is(tmp_path / "old") == TAR
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    assert what_is(tmp_path / "none.tar") == TAR
