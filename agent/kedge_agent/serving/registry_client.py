"""Pulls a release from an OCI registry (distribution-spec 1.1), anonymously or with an anonymous token.

Every blob is checked against the requested digest.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kedge_protocol import digest
from kedge_protocol.addresses import is_loopback
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Bundle, Layout, parse_manifest
from kedge_protocol.errors import BundleError, ConfigError, StorageError

_REFERENCE = re.compile(
    r"(?:oci://)?(?P<host>[A-Za-z0-9.-]+(?::\d+)?)/(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?\Z"
)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_ACCEPTED = f"{oci.INDEX_TYPE}, {oci.MANIFEST_TYPE}"
_SECONDS = 30.0
_MAX_DOCUMENT = 4 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Reference:
    """A release in a registry.

    Attributes:
        host: host name, with its port.
        name: name of the repository.
        version: tag or digest.
    """

    host: str
    name: str
    version: str

    @property
    def url(self) -> str:
        """Return the repository's URL; plain HTTP on this machine only."""
        scheme = "http" if is_loopback(self.host.partition(":")[0]) else "https"
        return f"{scheme}://{self.host}/v2/{self.name}"


def parse_reference(text: str) -> Reference | None:
    """Parse ``[oci://]host[:port]/name[:tag|@digest]``; return None for other text (a host has a dot or a port, or is
    localhost)."""
    match = _REFERENCE.match(text)
    if match is None:
        return None
    host = match["host"]
    if "." not in host and ":" not in host and host != "localhost":
        return None
    return Reference(host, match["name"], match["digest"] or match["tag"] or "latest")


class RegistryClient:
    """Pulls a release into an OCI image layout.

    Args:
        reference: the release.
        folder: an empty folder for the layout.
    """

    def __init__(self, reference: Reference, folder: Path) -> None:
        self._reference = reference
        self._folder = folder
        self._token: str | None = None

    def pull_index(self) -> Layout:
        """Pull the release's index, which lists the targets that it has bundles for.

        Raises:
            ConfigError: no such registry, repository or tag.
            BundleError: it is not a release.
        """
        raw = self._document(f"manifests/{self._reference.version}")
        found = digest.of_bytes(raw)
        if self._reference.version.startswith("sha256:"):
            digest.verify_bytes(raw, self._reference.version, where=self._reference.url)
        (self._folder / "blobs" / "sha256").mkdir(parents=True)
        self._blob_path(found).write_bytes(raw)
        descriptor = {"mediaType": oci.INDEX_TYPE, "digest": found, "size": len(raw)}
        index = {"schemaVersion": 2, "mediaType": oci.INDEX_TYPE, "manifests": [descriptor]}
        (self._folder / "index.json").write_text(json.dumps(index))
        (self._folder / oci.LAYOUT_FILE).write_text('{"imageLayoutVersion": "1.0.0"}')
        return Layout(self._folder)

    def pull_bundles(self, layout: Layout, target: str, backend: str | None = None) -> tuple[Bundle, ...]:
        """Pull the bundles for a target with their files: all of them, or those by one backend.

        Raises:
            BundleError: no bundle for the target, or a damaged one.
            ConfigError: the registry refuses it or cannot be reached.
        """
        several = layout.release().candidates.get(target, ())
        wanted = [one for one in several if backend in (None, one.annotations.get(oci.BACKEND, backend))]
        for descriptor in wanted or several:
            raw = self._document(f"manifests/{descriptor.digest}")
            digest.verify_bytes(raw, descriptor.digest, where=self._reference.url)
            self._blob_path(descriptor.digest).write_bytes(raw)
            manifest = parse_manifest(raw, where=descriptor.digest)
            for blob in (manifest.config, *manifest.layers):
                self._pull_blob(blob)
        if not several:
            return layout.candidates(target)  # which tells what there is
        return tuple(map(layout.read_bundle, wanted or several))

    def _pull_blob(self, blob: oci.Descriptor) -> None:
        path = self._blob_path(blob.digest)
        if path.is_file():
            return
        with self._open(f"blobs/{blob.digest}") as source, path.open("wb") as file:
            left = blob.size
            while chunk := source.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise BundleError(f"blob {blob.digest} is longer than it says", where=self._reference.url)
                try:
                    file.write(chunk)
                except OSError as error:
                    raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error
        digest.verify_file(path, blob.digest)

    def _blob_path(self, blob: str) -> Path:
        return self._folder / "blobs" / "sha256" / digest.hex_of(blob)

    def _document(self, path: str) -> bytes:
        with self._open(path) as source:
            raw = source.read(_MAX_DOCUMENT + 1)
        if len(raw) > _MAX_DOCUMENT:
            raise BundleError("a manifest is too large", where=f"{self._reference.url}/{path}")
        return raw

    def _open(self, path: str) -> IO[bytes]:
        url = f"{self._reference.url}/{path}"
        try:
            try:
                return self._request(url)
            except urllib.error.HTTPError as error:
                if error.code != 401 or self._token is not None:
                    raise
                self._token = self._anonymous_token(error.headers.get("WWW-Authenticate", ""))
                return self._request(url)
        except urllib.error.HTTPError as error:
            raise ConfigError(
                f"the registry answers {error.code} {error.reason}", where=url, remedy="Check the name and the tag"
            ) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(f"the registry cannot be reached: {reason}", where=url) from error

    def _request(self, url: str) -> IO[bytes]:
        fields = {"Accept": _ACCEPTED}
        if self._token:
            fields["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(url, headers=fields)
        opened: IO[bytes] = urllib.request.urlopen(request, timeout=_SECONDS)
        return opened

    def _anonymous_token(self, challenge: str) -> str:
        """Return the anonymous token of the registry's token service (docker/distribution, token authentication)."""
        scheme, _, rest = challenge.partition(" ")
        asked = dict(_CHALLENGE.findall(rest))
        realm = asked.pop("realm", "")
        if scheme.lower() != "bearer" or not realm.startswith("https://"):
            return ""
        with urllib.request.urlopen(f"{realm}?{urllib.parse.urlencode(asked)}", timeout=_SECONDS) as source:
            given = json.loads(source.read(_MAX_DOCUMENT))
        return str(given.get("token") or given.get("access_token") or "")
