"""What the headers of audio files state of their length, and whether it can be true: libsndfile believes them."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import soundfile

UNKNOWN = 2**63 - 1  # libsndfile's number of frames for a FLAC file that does not state it
OGG_PAGE = 65_307  # bytes of the longest page
STREAMED = 0x7FFFF000  # bytes: sizes from here on are what programs write into a pipe, where they do not know the size
# times as many bytes as a file has: its frames have from 8 to 320 kbit/s, and the first one is seldom last
STRETCH = 20
# What libsndfile notes when a container states more bytes than the file has, such as "data : 64000 (should be 31978)"
CUT = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)$", re.MULTILINE)
# and when samples follow where the next chunk should be, because the size of the last one is too small
MORE = re.compile(r"^Length : (\d+)$.*Unknown chunk marker \(\w+\) at position (\w+)\. Exiting parser", re.M | re.S)
RIFF = re.compile(r"^RIFF : (\d+)", re.MULTILINE)
SPHERE_COUNT = re.compile(rb"\ANIST_1A\n.*^sample_count -i (\d+)", re.MULTILINE | re.DOTALL)  # the same for NIST SPHERE

Stream = io.FileIO | io.BytesIO


class Watched:
    """A stream that remembers what failed while it was read, which libsndfile takes for its end."""

    def __init__(self, stream: Stream):
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell
        self.failure: OSError | None = None

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self.stream.readinto(buffer)
        except OSError as error:
            self.failure = error
            return 0

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise at the end, in place of whatever else is raised, what has failed."""
        try:
            yield
        finally:
            if self.failure:
                raise self.failure


class Uncounted:
    """A FLAC stream with the number of samples in its header set to 0, so that it is decoded to its end.

    The number is the last 36 bits before byte 26 (RFC 9639, section 8.2).
    """

    COUNT = range(21, 26)

    def __init__(self, stream: Watched, head: bytes):
        self.stream, self.first = stream, head[self.COUNT[0]] & 0xF0
        self.seek, self.tell = stream.seek, stream.tell

    def readinto(self, buffer: memoryview) -> int:
        start, size = self.tell(), self.stream.readinto(buffer)
        for place in self.COUNT:
            if start <= place < start + size:
                buffer[place - start : place - start + 1] = bytes([self.first if place == self.COUNT[0] else 0])
        return size


class Stretched:
    """An MP3 stream that seems `STRETCH` times as long, with zeros at the end, so that it is decoded to its real end.

    Of one that states no number of samples libsndfile reads as many as fit its size at the bit rate of the first frame.
    """

    def __init__(self, stream: Watched):
        self.stream, self.tell = stream, stream.tell
        self.end = STRETCH * stream.seek(0, os.SEEK_END)
        stream.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.stream.seek(self.end + offset) if whence == os.SEEK_END else self.stream.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        start, size = self.tell(), self.stream.readinto(buffer)
        if size == 0 and self.end - 1024 <= start < self.end:  # where decoders look for a tag
            size = min(len(buffer), self.end - start)
            buffer[:size] = bytes(size)
            self.stream.seek(start + size)
        return size


@dataclass(frozen=True)
class Mp3:
    """What the first frame of an MP3 states: whether the number of samples, and the byte that the stream ends before.

    counted: in a way that libsndfile heeds, which is not that of VBRI. end: 0 if it does not say.
    """

    counted: bool
    end: int

    @staticmethod
    def of(stream: Stream) -> "Mp3 | None":
        """Of a stream of MPEG's layer III, behind a tag or without; None of any other."""
        stream.seek(0)
        tag = stream.read(10) or b""
        size = int.from_bytes(tag[6:10]) if tag.startswith(b"ID3") else 0
        start = 10 + sum(((size >> 8 * i) & 0x7F) << 7 * i for i in range(4)) if size else 0  # seven bits a byte
        stream.seek(start)
        frame = stream.read(64) or b""
        if not _begins_mp3(frame):
            return None
        place = max(frame.find(b"Xing"), frame.find(b"Info"))
        said, frames, size = (int.from_bytes(frame[at : at + 4]) for at in range(place + 4, place + 16, 4))
        counted = place > 0 and bool(said & 1 and frames)  # 0 is what an encoder leaves that was killed
        return Mp3(counted, start + size if counted and said & 2 and size else 0)

    def following(self, stream: Stream) -> float:
        """How many times as long as the stream that the header is of another one behind it is, as in joined files."""
        size = stream.seek(0, os.SEEK_END)
        stream.seek(self.end)
        head = stream.read(4) or b""
        return size / self.end - 1 if self.end and (head.startswith(b"ID3") or _begins_mp3(head)) else 0.0


def _begins_mp3(frame: bytes) -> bool:
    return len(frame) >= 4 and frame[0] == 0xFF and frame[1] & 0xE6 == 0xE2


def is_cut_ogg(stream: Stream) -> bool:
    """Whether the last page of an Ogg file is incomplete, or not marked as the last one (RFC 3533, section 6)."""
    stream.seek(0)
    if stream.read(4) != b"OggS":
        return False
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - OGG_PAGE))
    _, capture, page = (stream.read() or b"").rpartition(b"OggS")
    if not capture or len(page) < 23:
        return True
    head = 23 + page[22]
    return not page[1] & 4 or len(page) < head + sum(page[23:head])


def missing_s(file: soundfile.SoundFile, head: bytes) -> float:
    """Seconds that the container states and the file does not have; libsndfile takes what is there without a word."""
    if count := SPHERE_COUNT.search(head):
        return int(count[1]) / file.samplerate - file.frames / file.samplerate
    sizes = [(int(stated), int(there)) for stated, there in CUT.findall(file.extra_info)]
    shares = [stated / there - 1 for stated, there in sizes if there and stated % 2**32 < STREAMED]
    return max(shares, default=0) * file.frames / file.samplerate


def unstated_s(file: soundfile.SoundFile) -> float:
    """Seconds that lie in a container behind the samples that it states, where another chunk should be."""
    if not (found := MORE.search(file.extra_info)):
        return 0.0
    end, place = int(found[1]), int(found[2], 0)
    if riff := RIFF.search(file.extra_info):
        end = min(end, int(riff[1]) + 8)  # a tag may follow
    return (end - place) / place * file.frames / file.samplerate
