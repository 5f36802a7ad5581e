"""The Prefect flow that trains one of the small networks (`e4s train visibility`, ...); the same command goes on where it stopped.

DATA/shard-*.npz         pictures of synthetic people with their labels (flows/training/data.py), which all trainings may share
DATA/photos-*.npz        aligned and labelled photographs, where a folder of them is given (flows/training/photos.py)
OUT/network.pt, .jsonl   checkpoint, a line per check
OUT/curves.png           losses and figures over steps
OUT/samples/*.png        what the network makes of held-out faces
OUT/NAME.safetensors     what ships, float16
OUT/training.json        the settings (`flows/training/folder.py`)
OUT/error.txt            the traceback of the last program error
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import flow

from e4s_models.weights import save_shipped
from flows.step import run_flow, tracked
from flows.tracking import Once
from flows.training.folder import DataSettings, NetworkSettings, opened
from flows.training.parts import make_people, part
from flows.training.recipes import load_recipe
from storage.run import make_folder

_opened: dict[str, Once[None]] = {}  # work in folders that this process holds already


@flow(name="train-network", persist_result=False, validate_parameters=False)
def train_network(out: str, network: str) -> None:
    """Train a network in a folder that `run_opened` prepared: a flow of its own, so that Prefect shows what is trained where."""
    with tracked():
        _opened.pop(out)()


def run_opened(folder: Path, settings: NetworkSettings, data: Path, made_with: DataSettings, photos: Path | None, device: str) -> None:
    """Run the flow in a folder that this process has opened with `settings`; `PREFECT_API_URL` must point at a server.

    Without a server the work is done all the same. Same arguments, same machine: same bytes, unless minutes end the training or a GPU
    computes. Raises UsageError, RunError (see `opened`), and TrainingCrash.
    """
    work = _opened[str(folder)] = Once(partial(train_parts, folder, settings, data, made_with, photos, device))
    run_flow(partial(train_network, out=str(folder), network=settings.network), work)


def train_parts(folder: Path, settings: NetworkSettings, data: Path, made_with: DataSettings, photos: Path | None, device: str) -> None:
    """Make the data that is missing, train, export; each part goes on from what is there."""
    with opened(data, made_with, "--data"):
        part(folder, make_people, data, made_with.people, made_with.seed)
        if photos:
            part(folder, read_photos, data, photos)
    part(folder, train, settings, data, folder, device)
    part(folder, export, settings.network, folder)


def read_photos(data: Path, photos: Path) -> None:
    """Align and label the photographs of which there is no shard yet."""
    from flows.training.photos import make_photo_shards

    for number in make_photo_shards(data, photos):
        print(f"photographs: shard {number} is there", flush=True)


def train(settings: NetworkSettings, data: Path, folder: Path, device: str) -> None:
    """Train the network of these settings in its folder."""
    from flows.training import loop

    make_folder(folder / "samples", "--out")
    loop.train(load_recipe(settings.network), data, folder, settings, device)


def export(network: str, folder: Path) -> None:
    """Write what ships, and the digest that the registry must declare."""
    from flows.training.loop import trained

    path = folder / f"{network}.safetensors"
    digest = save_shipped(trained(load_recipe(network), folder), path)
    print(f"{path.name}: sha256 {digest}, {path.stat().st_size} bytes", flush=True)
