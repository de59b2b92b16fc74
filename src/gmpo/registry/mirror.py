"""The registry's versions and champions in MLflow's model registry, for people who look there."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gmpo.errors import ConfigError, DependencyError, StoreError
from gmpo.registry.line import serving_line
from gmpo.shown_urls import shown_url, without_url
from gmpo.store import ModelVersion, Store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["mirror_to_mlflow"]

_VERSION_TAG = "gmpo.version"
_ALIASES = ("champion", "previous")


def mirror_to_mlflow(store: Store, name: str, *, uri: str) -> int:
    """Bring MLflow's registered model of that name to what the store says.

    Versions that it lacks are registered, with the digest as tag `gmpo.version`; the aliases
    `champion` and `previous` are set, or taken away where there is none. It is a copy for looking
    at: nothing is read back, and doing it again changes nothing.

    Args:
        store: holds the truth.
        name: of the model.
        uri: of MLflow: a server, or sqlite:///PATH.

    Returns:
        How many versions were new there.

    Raises:
        DependencyError: MLflow is not installed.
        ConfigError: MLflow does not take the name.
        StoreError: MLflow cannot be reached or refuses; the store is as it was.
    """
    if find_spec("mlflow") is None:
        raise DependencyError("the mirror needs MLflow; install it: pip install 'gmpo[mlflow]'")
    if any(letter in name for letter in "/:'\""):
        raise ConfigError(f"model name {name!r} holds one of / : ' \", which MLflow does not take")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return _mirror(client, store, name)
    except MlflowException as error:
        first_line = str(error).strip().splitlines()[0]
        if not uri.startswith("sqlite:"):  # a file's path is no secret
            first_line, uri = without_url(first_line, uri), shown_url(uri)
        raise StoreError(
            f"MLflow at {uri} does not take model {name!r}: {first_line}; the store is right: mend "
            "MLflow, then gmpo registry mirror"
        ) from None


def _mirror(client: MlflowClient, store: Store, name: str) -> int:
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name)
    known = {
        found.tags[_VERSION_TAG]: str(found.version)
        for found in client.search_model_versions(f"name = '{name}'", max_results=10_000)
        if _VERSION_TAG in found.tags
    }
    new = [version for version in store.model_versions(name) if version.version not in known]
    for version in new:
        known[version.version] = _register(client, version)
    line = list(dict.fromkeys(reversed(serving_line(store.champion_history(name)))))
    standing = client.get_registered_model(name).aliases
    for alias, wanted in zip(_ALIASES, [*line[:2], None, None], strict=False):
        if wanted is None and alias in standing:
            client.delete_registered_model_alias(name, alias)
        elif wanted is not None and str(standing.get(alias)) != known[wanted]:
            client.set_registered_model_alias(name, alias, known[wanted])
    return len(new)


def _register(client: MlflowClient, version: ModelVersion) -> str:
    tags = {
        _VERSION_TAG: version.version,
        "gmpo.parent": version.parent or "",
        "gmpo.metrics": json.dumps(version.metrics),
    }
    made = client.create_model_version(
        version.name,
        source=Path(version.path).resolve().as_uri(),
        tags=tags,
        await_creation_for=0,
    )
    return str(made.version)
