"""TLS by certificate files, for the server and for those who talk to it."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path

from arc_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a server shows: PEM files, as made by ``openssl req -x509``.

    Attributes:
        cert: the certificate, and those between it and the authority.
        key: its private key, without a passphrase.
    """

    cert: Path
    key: Path

    @staticmethod
    def of(cert: Path | None, key: Path | None) -> Certificate | None:
        """Both files, or None when neither is named.

        Raises:
            ConfigError: one without the other.
        """
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            missing = "ARC_TLS_CERT" if cert is None else "ARC_TLS_KEY"
            raise ConfigError(f"{missing} is not set, but its other half is. Set both, or neither for plain HTTP.")
        return Certificate(cert=cert, key=key)


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """For a server.

    Raises:
        ConfigError: a file cannot be read, or they do not fit each other.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty passphrase: a key with one must fail, not ask at the terminal.
        context.load_cert_chain(certificate.cert, certificate.key, password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ARC_TLS_CERT={certificate.cert} and ARC_TLS_KEY={certificate.key} cannot be used: {error}. "
            f"Name a PEM certificate and its key without a passphrase."
        ) from error
    return context


def client_context(authority: Path | None) -> ssl.SSLContext:
    """For a client: it talks only to who can show a certificate of `authority` (None: the system's) for its address.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ARC_TLS_CA={authority} cannot be used: {error}. Name a PEM certificate.") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
