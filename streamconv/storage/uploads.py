"""A file of S3 that is sent in parts, several at a time and in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Upload:
    """A file that is there when all of its bytes have been sent and it is completed, or never.

    What is as large as the file is sent by itself; else each piece is a part of a multipart upload. Errors are those of s3fs.

    Args:
        fs: s3fs's file system.
        path: of the file, with its bucket.
        size: of the file in bytes.
    """

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs = fs
        self._bucket, self._key, _ = fs.split_path(path)
        self._missing = self._size = size
        self._lock = threading.Lock()
        self._id, self._whole, self._on_their_way = "", b"", 0
        self._parts: dict[int, dict[str, Any]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a thread is sending now."""
        return self._on_their_way > 0

    def send(self, number: int, data: bytes) -> bool:
        """Takes a part, whose number says where it stands among the others; whether it is the last that was missing."""
        if len(data) == self._size:
            self._whole = data
            return True
        with self._sending():
            with self._lock:
                self._id = self._id or self._ask("create_multipart_upload")["UploadId"]
            answer = self._ask("upload_part", UploadId=self._id, PartNumber=number, Body=data)
        with self._lock:
            self._parts[number] = {"PartNumber": number} | {key: answer[key] for key in ("ETag", "ChecksumSHA256") if key in answer}
            self._missing -= len(data)
            return not self._missing

    def complete(self) -> None:
        """Has the file be there."""
        with self._sending():
            if not self._id:
                self._ask("put_object", Body=self._whole)
                return
            parts = [self._parts[number] for number in sorted(self._parts)]
            self._ask("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts})

    def discard(self) -> None:
        """Has nothing remain of it."""
        if self._id:
            self._ask("abort_multipart_upload", UploadId=self._id)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        with self._lock:
            self._on_their_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._on_their_way -= 1

    def _ask(self, method: str, **values: Any) -> Any:
        return self._fs.call_s3(method, Bucket=self._bucket, Key=self._key, **values)
