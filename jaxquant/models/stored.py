"""Models on disk: variables and formats by `jaxquant.checkpoint`, with what made them as metadata.

The metadata names the shape of the model, so that a folder is all one needs. Equal inputs give
equal files: no dates or paths are added here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxquant import checkpoint
from jaxquant.models.architectures import architecture_of, build
from jaxquant.models.decoder import DecoderShape


class Stored(NamedTuple):
  """A model with its variables.

  Attributes:
    model: the unbound module.
    variables: float or packed.
    about: JSON values; provenance, and "recipe" if the weights are packed.
  """

  model: nn.Module
  variables: dict
  about: dict


def write(path: str | os.PathLike, stored: Stored) -> str:
  """Makes the folder; returns the digest of its content.

  Raises:
    CheckpointError: the folder exists.
  """
  named = {"architecture": architecture_of(stored.model)}
  metadata = stored.about | named | {"shape": shape_to_json(stored.model.shape)}
  return checkpoint.save(path, stored.variables, metadata=metadata)


def read(path: str | os.PathLike) -> Stored:
  """What `write` wrote; packed weights come back packed, in their formats.

  Raises:
    CheckpointError: there is no such folder, it is damaged, or holds something else.
  """
  about = cast(dict, checkpoint.read_manifest(path)["metadata"])
  if "shape" not in about:
    raise checkpoint.CheckpointError(f"{path}: its metadata name no model shape.")
  model = build(about.pop("architecture", "transformer"), about.pop("shape"))
  return Stored(model, cast(dict, checkpoint.restore(path)), about)


def trained(workdir: pathlib.Path) -> Stored:
  """The newest parameters of a training run (`jaxquant.apps.train`), with its config as provenance.

  Raises:
    FileNotFoundError: the run has not saved anything.
  """
  folder = workdir.absolute() / "checkpoints"
  steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
  if not steps:
    raise FileNotFoundError(f"{workdir}: no finished checkpoint in {folder}.")
  saved = folder / str(max(steps))
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    config = reader.restore(saved / "config")
  with ocp.StandardCheckpointer() as reader:
    state = reader.restore(saved / "state")
  model = build(config.get("architecture", "transformer"), config["model"])
  return Stored(model, {"params": state["params"]}, {"step": int(state["step"]), "config": config})


def shape_to_json(shape: DecoderShape) -> dict:
  """The fields of a shape as JSON; its class `(**it)` is the shape again."""
  names = lambda k, v: jnp.dtype(v).name if k.endswith("dtype") else v
  return {k: names(k, v) for k, v in dataclasses.asdict(shape).items()}


def digest(variables: object) -> str:
  """sha256 of all arrays with their places: equal digests mean equal variables."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    array = np.asarray(leaf)
    found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
    found.update(array.tobytes())
  return found.hexdigest()
