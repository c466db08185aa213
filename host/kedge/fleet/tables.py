"""The tables of the state database."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

SCHEMA_VERSION = 2
"""Stored as SQLite's ``user_version``. Version 2 has the table ``latency`` more than version 1, which is brought up."""


class Base(DeclarativeBase):
    """Of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, str]: JSON}


class Meta(Base):
    """Single values: ``client_id`` (the controller's name at the broker) and ``changes``, which grows with every
    change that the controller must act upon."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Device(Base):
    """A device. ``managed`` once a rollout wanted something of it: before, nothing is published for it, and what it has
    it keeps. A removed one keeps its row: its ``desired_version`` must never fall, and its retained desired state must
    be cleared at the broker."""

    __tablename__ = "device"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    target: Mapped[str]
    labels: Mapped[dict[str, str]]
    added_at: Mapped[float]
    desired_version: Mapped[int] = mapped_column(default=0)
    managed: Mapped[bool] = mapped_column(default=False)
    removed: Mapped[bool] = mapped_column(default=False)

    desired: Mapped[list[DesiredModel]] = relationship(cascade="all, delete-orphan")
    state: Mapped[DeviceState | None] = relationship(cascade="all, delete-orphan")


class DesiredModel(Base):
    """One model that a device shall run; ``size`` is of the manifest in bytes."""

    __tablename__ = "desired_model"

    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    size: Mapped[int]


class DeviceState(Base):
    """What a device said last; ``reported`` is the message as it came."""

    __tablename__ = "device_state"

    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    online: Mapped[bool] = mapped_column(default=False)
    boot_id: Mapped[str] = mapped_column(default="")
    session: Mapped[int] = mapped_column(default=0)
    seen_at: Mapped[float] = mapped_column(default=0.0)
    reported: Mapped[bytes | None]
    reported_boot_id: Mapped[str] = mapped_column(default="")
    reported_seq: Mapped[int] = mapped_column(default=0)
    answered_version: Mapped[int] = mapped_column(default=0)


class Telemetry(Base):
    """A short history of telemetry; ``document`` is the message as it came."""

    __tablename__ = "telemetry"

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), index=True)
    at: Mapped[float]
    document: Mapped[bytes]


class Latency(Base):
    """What one call of a bundle took on a device when it proved it there, in milliseconds; the latest proof's.
    ``target`` is the device's at that time, ``files`` the digest of the file that the runtime opens."""

    __tablename__ = "latency"

    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    bundle: Mapped[str] = mapped_column(primary_key=True)
    files: Mapped[str]
    target: Mapped[str]
    p50_ms: Mapped[float]
    p95_ms: Mapped[float]
    calls: Mapped[int]
    at: Mapped[float]


class Release(Base):
    """A published release."""

    __tablename__ = "release"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[str]
    digest: Mapped[str]
    published_at: Mapped[float]

    bundles: Mapped[list[Bundle]] = relationship(back_populates="release", order_by="Bundle.target")


class Bundle(Base):
    """A bundle of a release; ``digest`` and ``size`` are of its manifest."""

    __tablename__ = "bundle"
    __table_args__ = (UniqueConstraint("release_id", "target"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("release.id"))
    target: Mapped[str]
    digest: Mapped[str] = mapped_column(index=True)
    size: Mapped[int]
    backend: Mapped[str]
    precision: Mapped[str]

    release: Mapped[Release] = relationship(back_populates="bundles")
    blobs: Mapped[list[BundleBlob]] = relationship()


class Blob(Base):
    """A blob that devices may ask for."""

    __tablename__ = "blob"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]


class BundleBlob(Base):
    """A blob that a bundle is made of; its manifest and configuration too."""

    __tablename__ = "bundle_blob"

    bundle_id: Mapped[int] = mapped_column(ForeignKey("bundle.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blob.digest"), primary_key=True)


class Rollout(Base):
    """A rollout of one model. ``state`` is ``active`` or ``superseded``."""

    __tablename__ = "rollout"

    id: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(index=True)
    version: Mapped[str]
    kind: Mapped[str]
    state: Mapped[str]
    started_at: Mapped[float]
    selected: Mapped[dict[str, str]]
    reverts: Mapped[int | None] = mapped_column(ForeignKey("rollout.id"))

    devices: Mapped[list[RolloutDevice]] = relationship(cascade="all, delete-orphan")


class RolloutDevice(Base):
    """A device's part in a rollout. ``digest`` is None where the model is taken away; ``previous`` is what the device
    was to have before, None for nothing; ``bytes_before`` is what it had been sent of the bundle's blobs."""

    __tablename__ = "rollout_device"

    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollout.id"), primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    digest: Mapped[str | None]
    previous: Mapped[str | None]
    previous_size: Mapped[int] = mapped_column(default=0)
    desired_version: Mapped[int]
    bytes_before: Mapped[int] = mapped_column(default=0)

    device: Mapped[Device] = relationship()


class Transfer(Base):
    """What one device was sent of one blob (``kind`` ``blob``) or of its map (``map``). ``served`` and ``have`` are
    bitmaps: blocks served ever, and blocks that the device ever said it had finished."""

    __tablename__ = "transfer"

    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    served: Mapped[bytes]
    have: Mapped[bytes]
    blocks_served: Mapped[int]
    finished_served_again: Mapped[int]
    bytes_served: Mapped[int]
