"""What the tests on a real S3 service share: the cluster's buckets, what lies in them, and which requests were sent."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from services import ceph

needs_ceph = pytest.mark.skipif(ceph.missing() is not None, reason=str(ceph.missing()))


def use(cluster: ceph.Cluster, monkeypatch: pytest.MonkeyPatch, user: ceph.User | None = None) -> None:
    """Points every new S3 client of this process, and of those it starts, at the cluster."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in ceph.environment(cluster, user).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


def new_bucket() -> str:
    """The URL of an empty bucket."""
    name = f"arc-{uuid.uuid4().hex[:12]}"
    client().mkdir(name)
    return f"s3://{name}"


def client() -> Any:
    """A plain client, as a user would make it."""
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def keys(url: str) -> set[str]:
    """All keys below a URL, relative to it."""
    return {str(key).removeprefix(url.removeprefix("s3://") + "/") for key in client().find(url)}


@contextlib.contextmanager
def recorded_requests(filesystem: Any) -> Iterator[list[tuple[str, str]]]:
    """The (operation, key or prefix) of every request that a client sends within the block, retries apart."""
    sent: list[tuple[str, str]] = []

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        sent.append((model.name, str(params.get("Key", params.get("Prefix", "")))))

    filesystem.connect()
    events = filesystem.s3.meta.events
    events.register("before-parameter-build.s3", note)
    try:
        yield sent
    finally:
        events.unregister("before-parameter-build.s3", note)
