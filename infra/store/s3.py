"""A prefix of an S3 bucket as object storage, through s3fs.

s3fs' and botocore's own retries are off: `retry.retried` is the only place that tries again. No listing is ever cached. After a fork a new
file system is made, because s3fs is not fork-safe; a pickled storage carries its address and settings only.
"""

import email.utils
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions
import botocore.session
import s3fs
from fsspec.exceptions import FSTimeoutError

from infra.store.filesystem import ObjectInfo
from infra.store.retry import retried
from infra.store.settings import StoreSettings
from schemas.errors import BadInput, RunFailed, StoreUnreachable, Transient

T = TypeVar("T")

PART_BYTES = 16 * 2**20
MOST_PARTS = 10_000
KEYS_A_DELETE = 1_000
PROBES = ".probe"

PASSING_ERRORS = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
    FSTimeoutError,
)
PASSING_CODES = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"})
PASSING_STATUS = frozenset({408, 409, 425, 429})
CREDENTIAL_ERRORS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.CredentialRetrievalError,
)


def _refusal(error: BaseException) -> tuple[int, str, str]:
    """HTTP status, code and message of the store's answer that lies behind what s3fs raised; `(0, "", "")` where there was none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, botocore.exceptions.ClientError):
            answer = seen.response
            said = answer.get("Error", {})
            return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), str(said.get("Code", "")), str(said.get("Message", ""))
        seen = seen.__cause__ or seen.__context__
    return 0, "", ""


def may_pass(error: Exception) -> bool:
    """True for errors of the connection and of a store that is busy or broken for a while; false for refusals."""
    status, code, _ = _refusal(error)
    if status:
        return status >= 500 or status in PASSING_STATUS or code in PASSING_CODES
    return isinstance(error, PASSING_ERRORS)


class S3Storage:
    """Objects under `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str, settings: StoreSettings) -> None:
        self.bucket, self.prefix, self.settings = bucket, prefix, settings
        self.address = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._forget()

    def _forget(self) -> None:
        self._pid = 0
        self._fs: Any = None
        self._slots = threading.BoundedSemaphore(self.settings.transfer_workers)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "address": self.address, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def check(self) -> None:
        probe = f"{PROBES}/{uuid.uuid4().hex}"
        try:
            self._call("list_objects_v2", retries=min(2, self.settings.retries), Prefix=self._key(PROBES), MaxKeys=1)
            self.put(probe, b"")
            self.delete([probe])
        except Transient as error:
            raise StoreUnreachable(f"store {self.address} cannot be reached at {self._endpoint()}: {error}") from error

    def now(self) -> float:
        headers = self._call("list_objects_v2", Prefix=self._key(PROBES), MaxKeys=1)["ResponseMetadata"]["HTTPHeaders"]
        return email.utils.parsedate_to_datetime(headers["date"]).timestamp()

    def read(self, key: str) -> bytes:
        data: bytes = self._retried(f"read {key}", lambda _: self._filesystem().cat_file(self._path(key), max_concurrency=1))
        return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""

        def get(_: int) -> bytes:
            try:
                data: bytes = self._filesystem().cat_file(self._path(key), start=start, end=stop)
            except OSError as error:
                if _refusal(error)[0] == 416:  # nothing at all from `start` on
                    return b""
                raise
            return data

        return self._retried(f"read {key}", get)

    def put(self, key: str, data: bytes) -> None:
        self._call("put_object", Key=self._key(key), Body=data)

    def put_new(self, key: str, data: bytes) -> bool:
        def put(attempt: int) -> bool:
            try:
                self._filesystem().call_s3("put_object", Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except OSError as error:
                if not isinstance(error, FileExistsError) and _refusal(error)[0] != 412:
                    raise
                # The answer to an earlier try may have been lost after it had won.
                return attempt > 0 and self.read(key) == data
            return True

        return self._retried(f"create {key}", put)

    def upload(self, path: Path, key: str, size: int, sha256: str) -> None:
        if size <= 2 * PART_BYTES:
            with self._slots:
                data = path.read_bytes()
                if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
                    raise _changed(path)
                self.put(key, data)
        else:
            self._upload_parts(path, self._key(key), size, sha256)

    def _upload_parts(self, path: Path, key: str, size: int, sha256: str) -> None:
        upload = self._call("create_multipart_upload", Key=key)["UploadId"]

        def send(number: int, data: bytes) -> dict[str, Any]:
            try:
                answer = self._call("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=data)
                return {"PartNumber": number, "ETag": answer["ETag"]}
            finally:
                self._slots.release()

        try:
            with ThreadPoolExecutor(self.settings.transfer_workers) as pool:
                sent = self._read_parts(path, size, sha256, lambda number, data: pool.submit(send, number, data))
                parts = [part.result() for part in sent]
            try:
                self._call("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
            except FileNotFoundError:  # completed by an earlier try whose answer was lost
                if self._call("head_object", Key=key)["ContentLength"] != size:
                    raise
        except BaseException:
            self._abort(key, upload)
            raise

    def _read_parts(
        self, path: Path, size: int, sha256: str, submit: Callable[[int, bytes], "Future[dict[str, Any]]"]
    ) -> list[Future[dict[str, Any]]]:
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        hasher, read = hashlib.sha256(), 0
        sent: list[Future[dict[str, Any]]] = []
        with path.open("rb") as file:
            while True:
                self._slots.acquire()  # bounds the memory of all uploads together; `send` gives it back
                if not (data := file.read(part_bytes)):
                    self._slots.release()
                    break
                hasher.update(data)
                read += len(data)
                sent.append(submit(len(sent) + 1, data))
        if (read, hasher.hexdigest()) != (size, sha256):
            raise _changed(path)
        return sent

    def copy(self, source: str, target: str) -> None:
        self._call("copy_object", Key=self._key(target), CopySource={"Bucket": self.bucket, "Key": self._key(source)})

    def link(self, key: str, path: Path) -> bool:  # noqa: ARG002 - bytes on a store have to be moved
        return False

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in self._pages("list_objects_v2", "NextContinuationToken", "ContinuationToken", Prefix=self._key(prefix)):
            for item in page.get("Contents", ()):
                key: str = item["Key"][len(self._key("")) :]
                if not key.endswith("/"):  # some stores list folders
                    yield ObjectInfo(key, int(item["Size"]), item["LastModified"].timestamp())

    def folders(self, parent: str, prefix: str = "") -> list[str]:
        at = self._key(f"{parent}/{prefix}")
        pages = self._pages("list_objects_v2", "NextContinuationToken", "ContinuationToken", Prefix=at, Delimiter="/")
        return sorted(item["Prefix"].rstrip("/").rpartition("/")[2] for page in pages for item in page.get("CommonPrefixes", ()))

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), KEYS_A_DELETE):
            objects = [{"Key": self._key(key)} for key in keys[start : start + KEYS_A_DELETE]]
            answer = self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            if errors := answer.get("Errors"):
                raise RunFailed(f"store {self.address} did not delete {errors[0].get('Key')}: {errors[0].get('Message')}")

    def leftovers(self, older_than: float) -> Iterator[ObjectInfo]:
        """Yield multipart uploads that were never completed (key: the object's key and the upload's id), and probes."""
        for info in self.objects(f"{PROBES}/"):
            if info.modified < older_than:
                yield info
        answer = self._call("list_multipart_uploads", Prefix=self._key(""))
        for item in answer.get("Uploads", ()):
            if (began := item["Initiated"].timestamp()) < older_than:
                yield ObjectInfo(f"{item['Key'][len(self._key('')) :]}?uploadId={item['UploadId']}", 0, began)

    def discard(self, leftover: ObjectInfo) -> None:
        key, separator, upload = leftover.key.rpartition("?uploadId=")
        if separator:
            self._abort(self._key(key), upload)
        else:
            self.delete([leftover.key])

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", Key=key, UploadId=upload)
        except (FileNotFoundError, Transient):  # gone already, or left for the collector
            return

    def _pages(self, method: str, answer_token: str, request_token: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._call(method, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments[request_token] = page[answer_token]

    def _call(self, method: str, *, retries: int | None = None, **arguments: Any) -> dict[str, Any]:
        what = f"{method} {arguments.get('Key', '')}".rstrip()

        def call(_: int) -> dict[str, Any]:
            answer: dict[str, Any] = self._filesystem().call_s3(method, Bucket=self.bucket, **arguments)
            return answer

        return self._retried(what, call, retries)

    def _retried(self, what: str, call: Callable[[int], T], retries: int | None = None) -> T:
        limit = self.settings.retries if retries is None else retries
        try:
            return retried(call, passing=may_pass, retries=limit, what=f"{self.address}: {what}")
        except CREDENTIAL_ERRORS as error:
            raise BadInput(
                f"no credentials for {self.address}: {error}. Expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
            ) from error
        except (OSError, botocore.exceptions.BotoCoreError, ValueError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        status, code, message = _refusal(error)
        if code == "NoSuchBucket":
            return BadInput(f"store {self.address}: the bucket {self.bucket!r} does not exist at {self._endpoint()}: create it first")
        if status in (401, 403):
            return BadInput(f"store {self.address}: {self._endpoint()} refused the credentials or the action ({code}: {message})")
        if status == 404 or isinstance(error, FileNotFoundError):
            return error if isinstance(error, FileNotFoundError) else FileNotFoundError(str(error))
        return BadInput(f"store {self.address}: {self._endpoint()} refused ({code or type(error).__name__}: {message or error})")

    def _endpoint(self) -> str:
        return self.settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{self._key(key)}"

    def _filesystem(self) -> Any:
        if self._pid != os.getpid() or self._fs is None:
            if self._pid not in (0, os.getpid()):
                self._forget()  # forked: locks and connections are the parent's
            with self._lock:
                if self._fs is None:
                    self._fs = self._connect()
                    self._pid = os.getpid()
        return self._fs

    def _connect(self) -> Any:
        region = self.settings.region or botocore.session.get_session().get_config_variable("region") or "us-east-1"
        config: dict[str, Any] = {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "connect_timeout": max(1.0, self.settings.timeout_seconds / 6),
            "read_timeout": self.settings.timeout_seconds,
            "max_pool_connections": 2 * self.settings.transfer_workers + 2,
        }
        if self._endpoint() != "AWS":
            config["s3"] = {"addressing_style": "path"}  # servers of one's own rarely have a host name a bucket
        filesystem = s3fs.S3FileSystem(
            endpoint_url=self.settings.endpoint_url,
            client_kwargs={"region_name": region},
            config_kwargs=config,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        filesystem.retries = 1
        return filesystem


def _changed(path: Path) -> RunFailed:
    return RunFailed(f"{path} changed while it was being published: nothing may write to a folder once it is handed to the store")
