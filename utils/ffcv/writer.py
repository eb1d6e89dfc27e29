"""Writing a .beton file by many processes, whole or not at all.

FFCV's fields, pages and table are used, its DatasetWriter is not: with a broken image or a full disk it waits forever
and leaves its processes and shared memory behind.

Import this module only if FFCV is asked for: it imports FFCV and Numba.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.errors import DataError, RunError
from utils.ffcv.library import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    IMAGE_MODES,
    JPEG_MODE,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    IntField,
    MemoryAllocator,
    RGBImageField,
    get_metadata_type,
)
from utils.ffcv.sources import ImageSource
from utils.files import rename
from utils.processes.signals import die_with_parent

CHUNK = 64  # images that a worker takes at a time
SMALLEST_PAGE = 1 << 23  # bytes, FFCV's default; an image must fit into a page
IMAGE_COLUMN, LABEL_COLUMN = "f0", "f1"  # of a row of metadata: numpy's names for FFCV's nameless fields
LONGEST_SIDE = 65535  # pixels: the format stores it in 16 bits
POLL_SECONDS = 0.1

Fields = dict[str, RGBImageField | IntField]  # of a sample, by name


@dataclass(frozen=True)
class Encoding:
    """How images are stored; its string is part of the file names.

    Attributes:
        max_resolution: longest side in pixels; larger images are shrunk. 0 = any side.
        compress_probability: share of images stored as JPEG; the others are stored as plain pixels.
        jpeg_quality: 1 to 100.
    """

    max_resolution: int
    compress_probability: float
    jpeg_quality: int

    def __str__(self) -> str:
        return f"{self.max_resolution}_{self.compress_probability:.2f}_{self.jpeg_quality}"

    def field(self) -> RGBImageField:
        modes = {0.0: "raw", 1.0: "jpg"}
        return RGBImageField(
            write_mode=modes.get(self.compress_probability, "proportion"),
            max_resolution=self.max_resolution or None,
            jpeg_quality=self.jpeg_quality,
            compress_probability=self.compress_probability,
        )

    def page_size(self, source: ImageSource) -> int:
        """Bytes per page: a power of two that holds the largest image."""
        pixels = source.largest() if self.max_resolution == 0 else self.max_resolution**2
        return max(SMALLEST_PAGE, 1 << (3 * pixels - 1).bit_length())


@dataclass
class Chunk:
    """Images that a worker has written: numbers, rows of metadata and places in the file; and faults of broken ones."""

    ids: list[int]
    rows: np.ndarray
    allocations: list[tuple[int, int, int]]
    broken: list[str]


def write_beton(path: Path, source: ImageSource, encoding: Encoding, workers: int, skip_broken: bool) -> list[str]:
    """Write `path`, under a temporary name until it is whole.

    Returns:
        one line per broken image that was left out.

    Raises:
        DataError: an image is broken (unless `skip_broken`), or all are.
        RunError: the disk is full, or a worker died.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        broken = _write(part, source, encoding, workers, skip_broken, path.name)
        rename(part, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return broken


def _write(
    part: Path, source: ImageSource, encoding: Encoding, workers: int, skip_broken: bool, name: str
) -> list[str]:
    fields: Fields = {"image": encoding.field(), "label": IntField()}
    rows_type, page_size = get_metadata_type(list(fields.values())), encoding.page_size(source)
    first = _header(fields, 0, page_size, 0)
    part.write_bytes(first)
    allocator = MemoryAllocator(str(part), len(first) + len(source) * rows_type.itemsize, page_size)
    # Numba compiles the look-up in this dict at its first use: here, and not once per worker.
    assert IMAGE_MODES["jpg"] == JPEG_MODE != IMAGE_MODES["raw"]
    job = WriteJob(source, fields["image"], rows_type, allocator, skip_broken)
    chunks, broken = [], []
    with tqdm(total=len(source), desc=name, unit="image", mininterval=0.5) as bar:
        for chunk in job.run(min(workers, len(source))):
            chunks.append(chunk)
            broken += chunk.broken
            bar.update(len(chunk.ids) + len(chunk.broken))
    if len(broken) == len(source):
        raise DataError(f"every image is broken; {broken[0]}")
    if part.stat().st_size != allocator.offset + allocator.next_page_written.value * page_size:
        raise RunError(f"cannot write {part}: it is shorter than what was written; is the disk full?")
    _finish(part, fields, chunks, page_size)
    return broken


def _header(fields: Fields, num_images: int, page_size: int, table_at: int) -> bytes:
    header = np.zeros(1, dtype=HeaderType)
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page_size
    header["num_samples"], header["alloc_table_ptr"] = num_images, table_at
    type_ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    descriptions = np.zeros(len(fields), dtype=FieldDescType)
    for description, (name, field) in zip(descriptions, fields.items()):
        description["type_id"] = type_ids[type(field)]
        description["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype=np.uint8)
        description["arguments"][:] = field.to_binary()[0]
    return header.tobytes() + descriptions.tobytes()


def _finish(part: Path, fields: Fields, chunks: list[Chunk], page_size: int) -> None:
    """Add header, metadata and table. Images are numbered without gaps for those that were left out."""
    ids = np.concatenate([chunk.ids for chunk in chunks]).astype(np.int64)
    rows = np.concatenate([chunk.rows for chunk in chunks])[np.argsort(ids)]
    table = np.array([entry for chunk in chunks for entry in chunk.allocations], dtype=ALLOC_TABLE_TYPE)
    table["sample_id"] = np.searchsorted(np.sort(ids), table["sample_id"].astype(np.int64))
    with open(part, "r+b") as file:
        table_at = file.seek(0, os.SEEK_END)
        file.write(table.tobytes())
        file.seek(0)
        file.write(_header(fields, len(rows), page_size, table_at))
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


class WriteJob:
    """Images of one file, read and encoded by worker processes."""

    def __init__(
        self,
        source: ImageSource,
        field: RGBImageField,
        rows_type: np.dtype,
        allocator: MemoryAllocator,
        skip_broken: bool,
    ):
        self.source, self.field, self.rows_type = source, field, rows_type
        self.allocator, self.skip_broken = allocator, skip_broken
        self.taken = multiprocessing.Value("q", 0)
        self.results: multiprocessing.Queue = multiprocessing.Queue()

    def run(self, workers: int) -> Iterator[Chunk]:
        """Chunks as they are written. No worker is left when this ends, however it ends.

        Raises:
            DataError: an image is broken.
            RunError: a worker died.
            OSError: the file cannot be written.
        """
        crew = [multiprocessing.Process(target=self._work, daemon=True) for _ in range(workers)]
        try:
            for worker in crew:
                worker.start()
            yield from self._watch(crew)
        finally:
            for worker in crew:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()

    def _watch(self, crew: Sequence[BaseProcess]) -> Iterator[Chunk]:
        while True:
            codes = [worker.exitcode for worker in crew]  # asked first: their last results are then in the queue
            try:
                result = self.results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                died = [code for code in codes if code]
                if died:
                    raise RunError(f"a worker died with exit code {died[0]} (-9: perhaps out of memory)") from None
                if all(code == 0 for code in codes):
                    return
                continue
            if isinstance(result, Exception):
                raise result
            yield result

    def _work(self) -> None:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends the workers
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        cv2.setNumThreads(1)
        try:
            with self.allocator:
                while ids := self._take():
                    self.results.put(self._encode(ids))
        except (DataError, OSError) as error:
            self.results.put(error)

    def _take(self) -> range:
        """Numbers of the next images that no worker has taken; empty if none is left."""
        with self.taken.get_lock():
            start = self.taken.value
            self.taken.value = min(start + CHUNK, len(self.source))
            return range(start, self.taken.value)

    def _encode(self, ids: range) -> Chunk:
        chunk = Chunk([], np.zeros(len(ids), dtype=self.rows_type), [], [])
        for index in ids:
            row = chunk.rows[len(chunk.ids) : len(chunk.ids) + 1]
            try:
                image, label = self.source[index]
                if max(image.shape) > LONGEST_SIDE and not self.field.max_resolution:
                    raise DataError(f"image {index} has a side of more than {LONGEST_SIDE} pixels")
                # The field draws JPEG or pixels from numpy's global generator: the same for an image in any process.
                np.random.seed(index)
                self.allocator.set_current_sample(index)
                self.field.encode(row[IMAGE_COLUMN], image, self.allocator.malloc)
                row[LABEL_COLUMN] = label
            except (ValueError, cv2.error) as error:  # ValueError: of DataError, and of FFCV's own checks
                if not self.skip_broken:
                    raise DataError(f"{error}; --skip_broken leaves such images out") from error
                chunk.broken.append(str(error))
            else:
                chunk.ids.append(index)
        chunk.rows = chunk.rows[: len(chunk.ids)]
        chunk.allocations, self.allocator.allocations = self.allocator.allocations, []
        return chunk
