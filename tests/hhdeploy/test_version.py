"""A checkout that is only on the path has a version to show, too."""

from __future__ import annotations

import importlib.metadata

from tests.workshop import run_python


def test_it_is_the_installed_one():
    from hhdeploy.packages import own_version

    assert own_version() == importlib.metadata.version("hhdeploy")


def test_without_an_installation_everything_that_shows_it_works():
    code = """
        import importlib.metadata
        real = importlib.metadata.version

        def version(name):
            if name == "hhdeploy":
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        importlib.metadata.version = version
        from hhdeploy.runtime.serving.endpoint import server_metadata
        from hhdeploy.cli import main

        print(server_metadata()["version"])
        main(["--version"], prog_name="hhdeploy")
    """
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["unknown", "hhdeploy, version unknown"]
