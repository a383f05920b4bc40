"""Features that need a later version of a dependency than the package itself."""

from importlib import metadata

from packaging.version import Version


def require_version(package: str, version: str, feature: str) -> None:
    """Check that a package is recent enough for a feature.

    Args:
        package (`str`): Name of the package, as pip knows it.
        version (`str`): The first version that is recent enough.
        feature (`str`): What needs it, as the beginning of a sentence.

    Raises:
        ImportError: If an earlier version is installed.
    """
    installed = metadata.version(package)
    if Version(installed) < Version(version):
        raise ImportError(
            f'{feature} needs {package} {version} or later, and {installed} is installed: `pip install -U "{package}>={version}"`.'
        )
