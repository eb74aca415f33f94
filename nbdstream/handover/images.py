"""The images of an offer, at the source: which files they are, the fence around them, and their names."""

from __future__ import annotations

import asyncio
import os
import stat
import uuid
from typing import TYPE_CHECKING, Final

from nbdstream.block.chain import open_device
from nbdstream.block.files import open_image
from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.qed.opening import read_header
from nbdstream.errors import ImageError
from nbdstream.handover.journal import OfferedImage, sync_directory
from nbdstream.handover.manifest import manifest_path, read_manifest
from nbdstream.handover.switch import FreshReads, Switch
from nbdstream.handover.writers import careless_writers
from nbdstream.wire.handover.messages import Disk

if TYPE_CHECKING:
    from nbdstream.block.device import BlockDevice

_ELSEWHERE: Final = ("nfs", "cifs", "smb", "ceph", "fuse", "gfs2", "ocfs2", "9p", "glusterfs", "virtiofs")
"""What begins the names of file systems on which another host may have written what is in our page cache."""


def examine(path: str, image_format: str, export: str) -> tuple[OfferedImage, int]:
    """Return what an image to be offered is, and the epoch at which its disk is owned here (*blocking*).

    Raises ImageError if it cannot be offered: somebody writes it without saying so by QEMU's locks, or owns it wholly.
    """
    path = os.path.abspath(path)
    fd = open_image(path, writable=False)
    try:
        take_locks(fd, Sharing.BYSTANDER, path)
        about = os.fstat(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    refuse_careless_writers(path)
    identity = str(uuid.uuid4())
    if image_format == "qed":
        header, extension, backing = read_header(path)
        if backing is not None:
            raise ImageError(f"{path} has the backing file {backing}: only a whole image can be offered")
        size = header.image_size
        identity = str(extension.image_uuid) if extension else identity
    manifest = read_manifest(manifest_path(path))
    epoch = 1
    if manifest is not None:
        identity, epoch, size = manifest.uuid, manifest.epoch, min(size, manifest.size)
    block = stat.S_ISBLK(about.st_mode)
    device, inode = (0, 0) if block else (about.st_dev, about.st_ino)
    return OfferedImage(path, image_format, device, inode, Disk(identity, size, export)), epoch


def refuse_careless_writers(path: str) -> None:
    """Raise ImageError if somebody has the image open for writing whom the fence would not notice (*blocking*)."""
    if careless := careless_writers(path):
        raise ImageError(
            f"{path} is open for writing by {', '.join(careless)}, without the locks that keep other writers out "
            "(QEMU: locking=off or share-rw=on): it could not be fenced"
        )


class SourceImage:
    """One image of an offer, and what clients of the source read of it."""

    def __init__(self, about: OfferedImage, group: str) -> None:
        self.about = about
        self.hidden_path = f"{about.path}.handed-over-{group[:8]}"
        """What it is called while somebody else may own the disk."""
        self.guarded = about.inode != 0
        """Whether another name keeps an autostart from it. A block device has no such guard."""
        size = about.disk.size
        self._fresh = FreshReads(about.path, about.format, size)
        self.device = Switch(self._fresh, size=size, writable=False)
        self._fenced: BlockDevice | None = None

    @property
    def path(self) -> str:
        """Where it is now. Raises ImageError if it is not there, or is another file than the one that was offered."""
        found = [path for path in (self.about.path, self.hidden_path) if os.path.lexists(path)]
        for path in found:
            about = os.stat(path)
            if not self.guarded or (about.st_dev, about.st_ino) == (self.about.device, self.about.inode):
                return path
        if found:
            raise ImageError(f"{found[0]} is another file than the one that was offered")
        raise ImageError(f"{self.about.path} is gone")

    async def fence(self) -> None:
        """Keep every writer on this host out, and read the image afresh. Raises ImageError, ImageLockedError."""
        if self._fenced:
            return
        path = self.path
        await asyncio.to_thread(_forget_cached, path)
        device = await open_device(path, self.about.format, (), writable=False)
        if device.size < self.about.disk.size:
            await device.close()
            raise ImageError(f"{path} has {device.size} bytes, and was offered with {self.about.disk.size}")
        self._fenced = device
        self.device.become(device)

    async def release(self) -> None:
        """Let writers in again, and know nothing of what the image holds."""
        fenced, self._fenced = self._fenced, None
        if fenced:
            self.device.become(self._fresh)
            await fenced.close()

    def hide(self) -> None:
        """Give it the other name, durably (*blocking*). Raises OSError, ImageError."""
        if self.guarded:
            _rename(self.path, self.hidden_path)

    def show(self) -> None:
        """Give it its own name again, durably (*blocking*). Raises OSError, ImageError."""
        if self.guarded:
            _rename(self.path, self.about.path)

    def remove(self) -> None:
        """Remove it, durably (*blocking*). Raises OSError, ImageError. A block device is left as it is."""
        if self.guarded and os.path.lexists(self.hidden_path):
            os.unlink(self.path)
            sync_directory(os.path.dirname(self.about.path))


def _rename(old: str, new: str) -> None:
    if old != new:
        if os.path.lexists(new):
            raise ImageError(f"{old} cannot be renamed: there is a {new}")
        os.rename(old, new)
    sync_directory(os.path.dirname(new))  # also if it was renamed before: nobody knows whether that was durable


def _forget_cached(path: str) -> None:
    """On a file system that others write too, drop what the page cache has of it. Raises nothing."""
    kind = _file_system(os.stat(path))
    if kind.startswith(_ELSEWHERE):
        fd = open_image(path, writable=False)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _file_system(about: os.stat_result) -> str:
    """Return the kind of file system that a file lies on, by proc(5)'s mountinfo; empty if that is not known."""
    device = f"{os.major(about.st_dev)}:{os.minor(about.st_dev)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            if line.split()[2] == device:
                return line.partition(" - ")[2].split()[0]
    return ""
