"""hhdeploy sign."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.cli import ui
from hhdeploy.cli.progress import note


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.option(
    "--key", required=True, type=ui.FILE, help="Elliptic-curve private key in PEM, e.g. P-256."
)
@click.option(
    "--password-file", type=ui.FILE, help="Its first line is the key's password; default: none."
)
@ui.lock_timeout_option
def command(bundle: Path, key: Path, password_file: Path | None, lock_timeout: float) -> None:
    """Sign BUNDLE: every byte of every file, as OpenSSF's model-signing does.

    The next change of BUNDLE removes the signature and says so. A pair of keys:

    \b
      openssl ecparam -name prime256v1 -genkey -noout -out key.pem
      openssl ec -in key.pem -pubout -out key.pub
      hhdeploy sign bundle/ --key key.pem
      hhdeploy verify bundle/ --signature --public-key key.pub
    """
    from hhdeploy.bundle.signing import sign
    from hhdeploy.errors import ReadError
    from hhdeploy.files.plain import read_few

    password = None
    if password_file is not None:
        try:
            text = read_few(password_file).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ReadError(
                f"{password_file}: expected a text whose first line is the key's password: {error}."
            ) from error
        password = text.partition("\n")[0].rstrip("\r")
    written = sign(bundle, key, password=password, lock_timeout=lock_timeout, progress=note)
    click.echo(f"Wrote {written}")
